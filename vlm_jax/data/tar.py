"""Random access to the samples of a WebDataset tar: members that share a name up to its first dot.

A tar is read once to note where every member lies; nothing is ever extracted. The index is kept
beside it as `NAME.tar.index.npz`, and made again when the tar's size or time of change is another.
Where that folder cannot be written, the index is only kept in memory.
"""

import contextlib
import os
import tarfile
import zipfile
from collections.abc import Sequence

import numpy as np

from vlm_jax.core.errors import DataError

VERSION = 2
BLOCK = tarfile.BLOCKSIZE


class TarFile(Sequence):
  """The samples of one tar, in the order in which each begins: {"key", extension: bytes, ...}."""

  def __init__(self, path: str, expects: str):
    """Reads the index or makes it; a damaged tar, or one that reaches outside, is a DataError."""
    self._path = path
    stat = os.stat(path)
    stamp = np.array([VERSION, stat.st_size, stat.st_mtime_ns], np.int64)
    saved = f"{path}.index.npz"
    index = _load(saved, stamp)
    if index is None:
      index = _scan(path, stat.st_size, expects) | {"stamp": stamp}
      _save(saved, index)
    # i64[samples + 1] and i64[members + 1]; a sample's members lie together.
    self._first, self._names_end = index["first"], index["names_end"]
    self._offsets, self._sizes, self._names = index["offsets"], index["sizes"], index["names"]

  def __len__(self) -> int:
    return len(self._first) - 1

  def __getitem__(self, index: int) -> dict[str, bytes | str]:
    """The members of a sample by extension, and its key."""
    sample: dict[str, bytes | str] = {}
    with open(self._path, "rb") as file:
      for member in range(self._first[index], self._first[index + 1]):
        name = self._names[self._names_end[member] : self._names_end[member + 1]].tobytes().decode()
        sample["key"], extension = split_name(name)
        file.seek(int(self._offsets[member]))
        sample[extension] = file.read(int(self._sizes[member]))
    return sample


def split_name(name: str) -> tuple[str, str]:
  """A member's sample and lower-case extension: "a/b.0.JPG" to ("a/b", "0.jpg")."""
  folder, base = os.path.split(name)
  stem, _, extension = base.partition(".")
  return os.path.join(folder, stem), extension.lower()


def _scan(path: str, size: int, expects: str) -> dict[str, np.ndarray]:
  members: dict[str, list[tuple[bytes, int, int]]] = {}
  end, last = 0, ""
  try:
    with tarfile.open(path, "r:") as tar:
      for member in tar:
        _refuse(path, member)
        end, last = member.offset_data + -(-member.size // BLOCK) * BLOCK, member.name
        if member.isfile() and not os.path.basename(member.name).startswith("."):
          if member.offset_data + member.size > size:
            raise DataError(f"{path} ends early, inside '{member.name}'; copy it again")
          key = split_name(member.name)[0]
          members.setdefault(key, []).append(
            (member.name.encode(), member.offset_data, member.size))
        tar.members = []  # type: ignore[attr-defined]  # it would keep every header
    with open(path, "rb") as file:  # tarfile takes half a header, or a damaged one, for the end
      file.seek(end)
      if last and file.read(BLOCK) != bytes(BLOCK):
        raise DataError(f"{path} ends early or is damaged behind '{last}'; copy it again")
  except (tarfile.TarError, OSError, UnicodeEncodeError) as error:
    raise DataError(f"{path} cannot be read as an uncompressed tar ({error}); expected {expects}"
                    ) from error
  if not members:
    raise DataError(f"{path} has no members; expected {expects}")
  flat = [member for sample in members.values() for member in sample]
  ends = lambda lengths: np.cumsum([0, *lengths], dtype=np.int64)
  return {
    "first": ends(len(sample) for sample in members.values()),
    "names_end": ends(len(name) for name, _, _ in flat),
    "names": np.frombuffer(b"".join(name for name, _, _ in flat), np.uint8),
    "offsets": np.array([offset for _, offset, _ in flat], np.int64),
    "sizes": np.array([length for _, _, length in flat], np.int64),
  }


def _refuse(path: str, member: tarfile.TarInfo) -> None:
  """DataError for what an honest tar of samples never has."""
  if member.isdir() or member.isfile():
    why = "leads out of it" if member.name.startswith("/") or ".." in member.name.split("/") else ""
  else:
    why = "is a link" if member.islnk() or member.issym() else "is no file"
  if why:
    raise DataError(f"{path}: the member '{member.name}' {why}, which is refused; pack the tar "
                    "again from plain files")


def _load(path: str, stamp: np.ndarray) -> dict[str, np.ndarray] | None:
  try:
    with np.load(path, allow_pickle=False) as saved:
      index = dict(saved)
  except (OSError, ValueError, zipfile.BadZipFile, EOFError, KeyError):
    return None
  return index if np.array_equal(index.get("stamp"), stamp) else None


def _save(path: str, index: dict[str, np.ndarray]) -> None:
  temporary = f"{path}.{os.getpid()}"
  try:
    with open(temporary, "wb") as file:
      np.savez(file, **index)  # type: ignore[arg-type]
    os.replace(temporary, path)  # whole or not at all, whoever else writes it
  except OSError:
    with contextlib.suppress(OSError):
      os.remove(temporary)
