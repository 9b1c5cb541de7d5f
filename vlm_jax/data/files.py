"""A user's own files: which they are, random access to their records, and the images they name.

Every format source reads through these few classes. None keeps a file open, so all can be pickled
and shared by threads, and none holds more than offsets and the small parts of a file.
"""

import base64
import binascii
import glob
import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core.errors import DataError, UsageError, nearest
from vlm_jax.data import images
from vlm_jax.data.bad import BadExample

SPLIT = "{split}"
PLACES = ("path", "annotations", "image_root")  # fields of a source that may hold SPLIT
NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")  # WebDataset's shard-{000..012}.tar
URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip", b"BZh": "bzip2"}
FIRST = 10  # records that must not all be of another form than the source expects


def names_split(entry: ConfigDict) -> bool:
  """Whether a source's files are named by split."""
  return any(SPLIT in entry[field] for field in PLACES)


def of_split(entry: ConfigDict, split: str) -> ConfigDict:
  """The source's entry with `{split}` filled in."""
  entry = entry.copy_and_resolve_references()
  with entry.unlocked():
    entry.update({field: entry[field].replace(SPLIT, split) for field in PLACES})
  return entry


def share(count: int, held_out: float, split: str, field: str) -> np.ndarray:
  """i64[n], the records that belong to a split.

  Record i is held out when a hash of i is below `held_out`: the same in every format, and what was
  held out stays so when records are added at the end.

  Raises:
    UsageError: `split` is neither "train" nor "validation", or nothing is held out.
  """
  if split not in ("train", "validation"):
    raise UsageError(f"{field} has no split '{split}'; {nearest(split, ('train', 'validation'))} "
                     f"(or write {SPLIT} in the path)")
  if not 0 <= held_out < 1:
    raise UsageError(f"{field}.held_out is {held_out}; it must be at least 0 and below 1")
  mixed = np.arange(1, count + 1, dtype=np.uint64)
  for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
    mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
  held = (mixed ^ (mixed >> np.uint64(31))) / 2.0**64 < held_out
  chosen = np.flatnonzero(held if split == "validation" else ~held)
  if not len(chosen):
    raise UsageError(f"{field}: none of its {count} records belongs to split '{split}'; "
                     f"set {field}.held_out, or write {SPLIT} in its path")
  return chosen


def paths(pattern: str, expects: str) -> list[str]:
  """The files of a path, which may have `*`, `?` or `{000..012}`; sorted.

  Raises:
    DataError: there is none; says what the format expects.
  """
  if not pattern:
    raise UsageError(f"the source has no path; set its `path` to {expects}")
  patterns, found = [os.path.expanduser(pattern)], NUMBERS.search(pattern)
  if found:
    low, high = found.groups()
    numbers = (str(n).zfill(len(low)) for n in range(int(low), int(high) + 1))
    patterns = [patterns[0].replace(found[0], number) for number in numbers]
  files = []
  for one in patterns:
    some = [one] if os.path.isfile(one) else sorted(filter(os.path.isfile, glob.glob(one)))
    if not some:
      raise DataError(f"{one} does not exist; expected {expects}")
    files += some
  return files


class Joined(Sequence):
  """Several readers one behind the other."""

  def __init__(self, readers: Sequence[Sequence]):
    """Readers of one format, in order."""
    self._readers = list(readers)
    self._ends = np.cumsum([len(reader) for reader in self._readers])

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, index: int) -> dict[str, Any]:
    number = int(np.searchsorted(self._ends, index, "right"))
    return self._readers[number][index - (int(self._ends[number - 1]) if number else 0)]


class Chosen(Sequence):
  """Some records of a reader, each a dict with a "key"."""

  def __init__(self, reader: Sequence, chosen: np.ndarray):
    """`chosen`: i64[n], indices into `reader`."""
    self._reader, self._chosen = reader, chosen

  def __len__(self) -> int:
    return len(self._chosen)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Record `index`; BadExample when it is not what the format says."""
    number = int(self._chosen[index])
    record = self._reader[number]
    if not isinstance(record, dict):
      raise BadExample("wrong_record", f"record {number} is a {type(record).__name__}")
    return record | {"key": str(record.get("key", record.get("id", number)))}


def check_first(reader: Sequence, documents: Callable, path: str, expects: str) -> None:
  """DataError when not one of the first records is of the format."""
  reason = ""
  for index in range(min(FIRST, len(reader))):
    try:
      documents(reader[index])
      return
    except BadExample as error:
      if error.reason != "wrong_record":
        return
      reason = reason or error.detail
  raise DataError(f"{path}: no record is of the format: {reason}; expected {expects}")


class JsonFile(Sequence):
  """Random access to the values of a JSON list or of JSON lines; holds their offsets only."""

  def __init__(self, path: str, expects: str):
    """Finds where every value begins; a file that is no such thing is a DataError."""
    self.path, self._expects = path, expects
    head = self._head()
    if head[:1] == b"[":
      self._starts, self._ends = self._list()
    else:
      self._starts, self._ends = self._lines()

  def _head(self) -> bytes:
    try:
      with open(self.path, "rb") as file:
        head = file.read(1024)
    except OSError as error:
      raise DataError(f"{self.path} cannot be read ({error.strerror}); expected {self._expects}"
                      ) from error
    for magic, kind in PACKED.items():
      if head.startswith(magic):
        raise DataError(f"{self.path} is compressed ({kind}), which allows no random access; "
                        "decompress it")
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()

  def _lines(self) -> tuple[np.ndarray, np.ndarray]:
    starts, ends, offset = [], [], 0
    with open(self.path, "rb") as file:
      for line in file:
        if line.strip():
          starts.append(offset)
          ends.append(offset + len(line))
        offset += len(line)
    return np.array(starts, np.int64), np.array(ends, np.int64)

  def _list(self) -> tuple[np.ndarray, np.ndarray]:
    with open(self.path, "rb") as file:
      text = file.read().decode("latin-1")  # a character a byte, and the same brackets and quotes
    scan, space = json.JSONDecoder().raw_decode, re.compile(r"[ \t\n\r]*")
    skip = lambda position: space.match(text, position).end()  # type: ignore[union-attr]
    starts, ends = [], []
    position = skip(text.index("[") + 1)
    try:
      while text[position : position + 1] != "]":
        if starts:
          if text[position : position + 1] != ",":
            raise json.JSONDecodeError("expected ',' or ']'", text, position)
          position = skip(position + 1)
        starts.append(position)
        position = scan(text, position)[1]
        ends.append(position)
        position = skip(position)
    except (ValueError, RecursionError) as error:
      where = getattr(error, "pos", position)
      raise DataError(f"{self.path} is not valid JSON at byte {where} ("
                      f"{getattr(error, 'msg', error)}); expected {self._expects}") from error
    return np.array(starts, np.int64), np.array(ends, np.int64)

  def __len__(self) -> int:
    return len(self._starts)

  def __getitem__(self, index: int) -> Any:
    """Value `index`; BadExample("wrong_record") when it is not JSON."""
    start, end = int(self._starts[index]), int(self._ends[index])
    try:
      with open(self.path, "rb") as file:
        file.seek(start)
        return json.loads(file.read(end - start).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
      raise BadExample("wrong_record", f"{self.path} at byte {start}: {error}") from error


def json_files(pattern: str, expects: str) -> Joined:
  """The values of all JSON or JSONL files of a path."""
  return Joined([JsonFile(path, expects) for path in paths(pattern, expects)])


def json_object(path: str, lists: Sequence[str], expects: str) -> dict[str, Any]:
  """A whole JSON file that is an object with these lists; else DataError."""
  try:
    with open(path, encoding="utf-8-sig") as file:
      value = json.load(file)
  except (OSError, ValueError, RecursionError) as error:
    raise DataError(f"{path} cannot be read ({error}); expected {expects}") from error
  missing = [name for name in lists
             if not isinstance(value, dict) or not isinstance(value.get(name), list)]
  if missing:
    raise DataError(f"{path} has no list '{missing[0]}'; expected {expects}")
  return value


class ImageFolder:
  """Reads images that records name: files below one folder, and data: URLs."""

  def __init__(self, root: str):
    """`root`: folder that no name may leave."""
    self._root = os.path.realpath(os.path.expanduser(root or "."))

  def read(self, name: str) -> bytes:
    """The bytes of an encoded image.

    Raises:
      BadExample: "remote_image", "outside_root", "missing_file", or "not_an_image" for a data: URL
        that is not base64.
    """
    if name.startswith("data:"):
      return _data_url(name)
    if URL.match(name):
      raise BadExample("remote_image", name[:200])
    try:
      path = os.path.realpath(os.path.join(self._root, name))
      inside = path.startswith(os.path.join(self._root, ""))
      usable = os.path.isfile(path)
    except (OSError, ValueError) as error:
      raise BadExample("missing_file", f"{name[:200]!r}: {error}") from error
    if not inside:
      raise BadExample("outside_root", f"{name[:200]} is {path[:200]}, not below {self._root}")
    if not usable:
      raise BadExample("missing_file", path[:400])
    return images.read(path)


def _data_url(url: str) -> bytes:
  head, comma, body = url.partition(",")
  if not comma or not head.endswith(";base64"):
    raise BadExample("not_an_image", f"{head[:60]}: only base64 data: URLs are read")
  try:
    return base64.b64decode(body, validate=True)
  except (binascii.Error, ValueError) as error:
    raise BadExample("not_an_image", f"{head[:60]}: {error}") from error
