"""OBELICS (arXiv:2306.16527): parquet of web pages, texts and images in parallel lists.

`texts[i]` or `images[i]` is null at every position of a page. The published files name images by
URL, which is never fetched: give file names below image_root, or struct<bytes, path>, in `images`.
"""

import itertools
from collections.abc import Sequence

from ml_collections import ConfigDict

from vlm_jax.data import files, turns
from vlm_jax.data.bad import BadExample
from vlm_jax.data.sources import Parts, Record
from vlm_jax.data.sources.parquet import Rows

FORMS = ("document",)
EXPECTS = "parquet with the parallel lists texts and images, one of them null at every position"


def reader(entry: ConfigDict, split: str) -> Sequence[Record]:
  """Random access to the pages of `entry.path`."""
  del split
  return files.Joined([Rows(path, ("id", "key", "texts", "images"), ("texts",), EXPECTS)
                       for path in files.paths(entry.path, EXPECTS)])


def parts(record: Record, form: str) -> list[Parts]:
  """One page, all of its text learned."""
  del form
  texts, images = record.get("texts"), record.get("images") or []
  if not isinstance(texts, list) or any(text and not isinstance(text, str) for text in texts):
    raise BadExample("wrong_record", "texts is not a list of texts")
  items = []
  for text, picture in itertools.zip_longest(texts, images):
    items += [text] if text else []
    items += [turns.image(picture)] if picture else []
  return [turns.say(items, "text", loss=True)]
