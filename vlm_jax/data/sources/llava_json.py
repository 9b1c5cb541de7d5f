"""LLaVA's instruction format (github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md).

A JSON list, or JSON lines, of {"id", "image", "conversations": [{"from", "value"}, ...]}: "human"
asks, "gpt" answers and is learned. `image` is a file name below image_root, a list of them, or left
out for text alone; `<image>` says where it stands.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from vlm_jax.data import files, turns
from vlm_jax.data.sources import Parts, Record

FORMS = ("document",)
EXPECTS = 'a JSON list of {"image": "1.jpg", "conversations": [{"from": "human", "value": "..."}]}'


def reader(entry: ConfigDict, split: str) -> Sequence[Record]:
  """Random access to the records of `entry.path`."""
  del split
  return files.json_files(entry.path, EXPECTS)


def parts(record: Record, form: str) -> list[Parts]:
  """One conversation."""
  del form
  return turns.documents(record, ("conversations",))
