"""The prepared files: an ArrayRecord a split, a msgpack record a picture or topic, one manifest."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import msgpack
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from vlm_jax.core.errors import DataError, UsageError, nearest
from vlm_jax.data.sources import Record, folder

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
AGAIN = "run `vlm-jax data prepare` again"


def write(path: str, records: Iterable[Record]) -> int:
  """Writes one split, synced to disk; returns the number of records."""
  writer = ArrayRecordWriter(path, "group_size:1")
  count = 0
  for record in records:
    writer.write(msgpack.packb(record, use_bin_type=True))
    count += 1
  writer.close()
  with open(path, "rb") as file:
    os.fsync(file.fileno())
  return count


class ArrayRecord(Sequence):
  """Random access to the bytes of every record; can be pickled and opens the file again."""

  WAY_OUT = AGAIN  # what to do about a damaged file, or what it should have been

  def __init__(self, path: str):
    """Opens an ArrayRecord file; a damaged one is a DataError."""
    self.path = path
    try:
      self._source = ArrayRecordDataSource(path)
      self._length = len(self._source)
    except Exception as error:  # the reader raises whatever the file format's library raises
      raise DataError(f"{path} cannot be read ({error}); {self.WAY_OUT}") from error

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Any:
    return self._source[index]

  def __reduce__(self):
    return type(self), (self.path,)


class Reader(ArrayRecord):
  """The records of one split."""

  def __getitem__(self, index: int) -> Record:
    """Record `index`, 0 <= index < len; a damaged one is a DataError."""
    try:
      return msgpack.unpackb(super().__getitem__(index), raw=False)
    except Exception as error:
      raise DataError(f"{self.path}: record {index} cannot be read ({error}); {AGAIN}") from error


def open_split(root: str, source: str, split: str) -> Reader:
  """The records of one split of a prepared source.

  Raises:
    DataError: nothing was prepared there, or a file has another size than when it was written.
    UsageError: the source or the split is not among the prepared ones.
  """
  manifest = check(root)
  name = folder(source)
  if name not in manifest["sources"]:
    raise UsageError(f"config.data.root={root} has no source '{name}' "
                     f"({nearest(name, manifest['sources'])}); {AGAIN} with --sources")
  splits = manifest["sources"][name]["records"]
  if split not in splits:
    raise UsageError(f"source '{name}' has no split '{split}'; {nearest(split, splits)}")
  if not splits[split]:
    raise DataError(f"{root}: split '{split}' of source '{name}' is empty; choose another split")
  return Reader(os.path.join(root, name, f"{split}.array_record"))


def check(root: str, verify: bool = False) -> dict:
  """Reads the manifest and compares every file with it.

  Args:
    root: where `vlm-jax data prepare` wrote.
    verify: compare the sha256 of every file, not only its size.

  Raises:
    DataError: there is no manifest, or a file is missing or not what was written.
  """
  path = os.path.join(root, MANIFEST)
  try:
    with open(path, encoding="utf-8") as file:
      manifest = json.load(file)
    files = manifest["files"]
  except FileNotFoundError as error:
    raise DataError(f"{root}: there is no prepared data; run `vlm-jax data prepare --root={root}` "
                    "or set config.data.root") from error
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise DataError(f"{path} cannot be read ({error}); {AGAIN}") from error
  for name, entry in files.items():
    file_path = os.path.join(root, name)
    size = os.path.getsize(file_path) if os.path.isfile(file_path) else None
    if size is None:
      raise DataError(f"{file_path} is missing; {AGAIN}")
    if size != entry["bytes"]:
      raise DataError(f"{file_path} has {size} bytes, not {entry['bytes']}; {AGAIN}")
    if verify and digest(file_path) != entry["sha256"]:
      raise DataError(f"{file_path} is damaged: its sha256 is not the manifest's; {AGAIN}")
  return manifest


def digest(path: str) -> str:
  """The sha256 of a file, in hexadecimal."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
