"""ArrayRecord files of msgpack or JSON objects, with the images as bytes inside (msgpack only).

A record is what vlm_jax/data/turns.py reads: {"images": [bytes, ...], "conversations": [...]}, or
`messages`, `content`, `texts`, `captions`, `caption`, `text`.
"""

import json
from collections.abc import Sequence

import msgpack
from array_record.python.array_record_data_source import ArrayRecordDataSource
from ml_collections import ConfigDict

from vlm_jax.core.errors import DataError
from vlm_jax.data import files, turns
from vlm_jax.data.bad import BadExample
from vlm_jax.data.sources import Parts, Record

FORMS = ("document",)
FIELDS = ("conversations", "messages", "content", "texts", "captions", "caption", "text")
EXPECTS = 'ArrayRecord of msgpack or JSON objects {"images": [bytes], "messages": [...]}'


class File(Sequence):
  """Random access to the objects of one file; can be pickled and opens the file again."""

  def __init__(self, path: str):
    """Reads the index of the file; a damaged one is a DataError."""
    self._path = path
    try:
      self._source = ArrayRecordDataSource(path)
      self._length = len(self._source)
    except Exception as error:  # the reader raises whatever the file format's library raises
      raise DataError(f"{path} cannot be read ({error}); expected {EXPECTS}") from error

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Record:
    """Record `index`; BadExample when it is neither msgpack nor JSON, or damaged."""
    try:
      data = self._source[index]
      return json.loads(data) if data[:1] == b"{" else msgpack.unpackb(data, raw=False)
    except Exception as error:
      raise BadExample("wrong_record", f"{self._path} record {index}: {error}") from error

  def __reduce__(self):
    return File, (self._path,)


def reader(entry: ConfigDict, split: str) -> Sequence[Record]:
  """Random access to the records of `entry.path`."""
  del split
  return files.Joined([File(path) for path in files.paths(entry.path, EXPECTS)])


def parts(record: Record, form: str) -> list[Parts]:
  """The document of a record; of `captions`, one document each."""
  del form
  return turns.documents(record, FIELDS)
