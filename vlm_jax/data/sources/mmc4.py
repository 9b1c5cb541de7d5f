"""Multimodal C4 (arXiv:2304.06939): JSON lines of pages whose images are matched to sentences.

    {"text_list": [...], "image_info": [{"image_name": "1.jpg", "matched_text_index": 0}, ...]}

An image stands before the sentence it is matched to; sentences between images are joined by a
space. Images are files below image_root; the URLs in the files are never fetched.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from vlm_jax.core.document import Image
from vlm_jax.data import files, turns
from vlm_jax.data.bad import BadExample
from vlm_jax.data.sources import Parts, Record

FORMS = ("document",)
EXPECTS = ('JSON lines of {"text_list": ["..."], "image_info": [{"image_name": "1.jpg", '
           '"matched_text_index": 0}]}')


def reader(entry: ConfigDict, split: str) -> Sequence[Record]:
  """Random access to the pages of `entry.path`."""
  del split
  return files.json_files(entry.path, EXPECTS)


def parts(record: Record, form: str) -> list[Parts]:
  """One page, all of its text learned."""
  del form
  try:
    sentences = [str(sentence) for sentence in record["text_list"]]
    before: dict[int, list[Image]] = {}
    for info in record.get("image_info") or []:
      before.setdefault(int(info["matched_text_index"]), []).append(
        turns.image(info["image_name"]))
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise BadExample("wrong_record", f"{type(error).__name__}: {error}") from error
  if any(not 0 <= index < len(sentences) for index in before):
    raise BadExample("wrong_record", "matched_text_index names no sentence")
  items: list[str | Image] = []
  for index, sentence in enumerate(sentences):
    items += before.get(index, [])
    if items and isinstance(items[-1], str):
      items[-1] += f" {sentence}"
    else:
      items.append(sentence)
  return [turns.say(items, "text", loss=True)]
