"""WebDataset: tars in which the files 000.jpg, 000.txt and 000.json are one sample.

`txt` is a caption; `json` may be a conversation or page as in LLaVA's or OpenAI's form instead, or
have a "caption". Several images are 000.0.jpg, 000.1.jpg, ...: `<image>` and {"type": "image"} take
them in the order of their names. `path` may be shards: "shard-{000..012}.tar". Not extracted, ever.
"""

import json
import re
from collections.abc import Sequence

from ml_collections import ConfigDict

from vlm_jax.data import files, turns
from vlm_jax.data.bad import BadExample
from vlm_jax.data.sources import Parts, Record
from vlm_jax.data.tar import TarFile

FORMS = ("document",)
FIELDS = ("conversations", "messages", "content", "caption", "text")
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
EXPECTS = "an uncompressed tar of samples: 000.jpg with 000.txt or 000.json, 001.jpg, ..."


def reader(entry: ConfigDict, split: str) -> Sequence[Record]:
  """Random access to the samples of the tars `entry.path`."""
  del split
  return files.Joined([TarFile(path, EXPECTS) for path in files.paths(entry.path, EXPECTS)])


def parts(record: Record, form: str) -> list[Parts]:
  """The document of one sample."""
  del form
  row = {}
  if "json" in record:
    try:
      row = json.loads(record["json"])
    except (ValueError, RecursionError) as error:
      raise BadExample("wrong_record", f"its json: {error}") from error
    if not isinstance(row, dict):
      raise BadExample("wrong_record", "its json is not an object")
  if "txt" in record and not {"conversations", "messages", "content"} & set(row):
    row = {"caption": record["txt"]}
  names = sorted((name for name in record if name.rsplit(".", 1)[-1] in PICTURES), key=_number)
  row = {key: value for key, value in row.items() if key not in ("image", "images")}
  return turns.documents(row | {"images": [record[name] for name in names]}, FIELDS)


def _number(name: str) -> list[int | str]:
  return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]
