"""ArrayRecord files of msgpack or JSON objects, with the images as bytes inside (msgpack only).

A record is what vlm_jax/data/turns.py reads: {"images": [bytes, ...], "conversations": [...]}, or
`messages`, `content`, `texts`, `captions`, `caption`, `text`.
"""

import json
from collections.abc import Sequence

import msgpack
from ml_collections import ConfigDict

from vlm_jax.data import files, turns
from vlm_jax.data.bad import BadExample
from vlm_jax.data.records import ArrayRecord
from vlm_jax.data.sources import Parts, Record

FORMS = ("document",)
FIELDS = ("conversations", "messages", "content", "texts", "captions", "caption", "text")
EXPECTS = 'ArrayRecord of msgpack or JSON objects {"images": [bytes], "messages": [...]}'


class File(ArrayRecord):
  """Random access to the objects of one file."""

  WAY_OUT = f"expected {EXPECTS}"

  def __getitem__(self, index: int) -> Record:
    """Record `index`; BadExample when it is neither msgpack nor JSON, or damaged."""
    try:
      data = super().__getitem__(index)
      return json.loads(data) if data[:1] == b"{" else msgpack.unpackb(data, raw=False)
    except Exception as error:
      raise BadExample("wrong_record", f"{self.path} record {index}: {error}") from error


def reader(entry: ConfigDict, split: str) -> Sequence[Record]:
  """Random access to the records of `entry.path`."""
  del split
  return files.Joined([File(path) for path in files.paths(entry.path, EXPECTS)])


def parts(record: Record, form: str) -> list[Parts]:
  """The document of a record; of `captions`, one document each."""
  del form
  return turns.documents(record, FIELDS)
