"""Reads and writes safetensors checkpoints, one file or shards with an index, tensor by tensor.

Nothing here knows a model. Arrays are numpy (bfloat16 through ml_dtypes) and keep their dtype.
"""

import contextlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from vlm_jax.core.errors import DataError, DiskError, UsageError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
          "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}
NAMES = {name: np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
         for dtype, name in DTYPES.items()}
SHARD_BYTES = 5 * 10**9  # what hubs and loaders expect a file to stay below


class Tensor(NamedTuple):
  """A tensor to be written: what it is, and a function that gives it when its turn comes."""

  shape: tuple[int, ...]
  dtype: np.dtype
  get: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    """Its size in the file."""
    return math.prod(self.shape) * self.dtype.itemsize


class Reader:
  """The tensors of a checkpoint by key; reads one only when it is asked for.

  Attributes:
    shapes: key to shape, of every tensor, known without reading any.
    dtypes: key to dtype.
  """

  def __init__(self, path: str | os.PathLike):
    """Opens every file of a directory, or one file.

    Raises:
      DataError: no weights, a missing shard, a damaged file, a key twice, a dtype without numbers.
    """
    path = Path(path)
    self.directory, names = (path.parent, [path.name]) if path.is_file() else (path, None)
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.dtypes: dict[str, np.dtype] = {}
    self._places: dict[str, tuple[Path, int]] = {}
    self._files: dict[Path, BinaryIO] = {}
    try:
      for name in names or self._names():
        self._open(self.directory / name)
    except BaseException:
      self.close()
      raise

  def _names(self) -> list[str]:
    index = self.directory / INDEX
    if index.exists():
      return sorted(set(read_json(index).get("weight_map", {}).values()))
    if (self.directory / SINGLE).exists():
      return [SINGLE]
    raise DataError(f"{self.directory}: holds neither {SINGLE} nor {INDEX}; give the directory of "
                    "a safetensors checkpoint")

  def _open(self, path: Path) -> None:
    """Notes where the tensors of a file are.

    The library checks the file. It reads by mapping it into memory, whose pages stay: of a large
    checkpoint all of it, so the bytes are read from the file itself.
    """
    try:
      with safe_open(path, framework="np"):
        file = self._files[path] = open(path, "rb")
      (length,) = struct.unpack("<Q", file.read(8))
      header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
      raise DataError(f"{path}: cannot be read as safetensors ({error}); download it again"
                      ) from error
    header.pop("__metadata__", None)
    for key, entry in header.items():
      if key in self._places:
        raise DataError(f"{path}: holds '{key}' a second time; remove the files that are not in "
                        f"{INDEX}")
      if entry["dtype"] not in NAMES:
        raise DataError(f"{path}: '{key}' is {entry['dtype']}; {', '.join(NAMES)} can be read")
      self._places[key] = path, 8 + length + entry["data_offsets"][0]
      self.shapes[key] = tuple(entry["shape"])
      self.dtypes[key] = NAMES[entry["dtype"]]

  def __getitem__(self, key: str) -> np.ndarray:
    (path, start), array = self._places[key], np.empty(self.shapes[key], self.dtypes[key])
    file = self._files[path]
    file.seek(start)
    if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
      raise DataError(f"{path}: ends inside '{key}'; download it again")
    return array

  def __enter__(self) -> "Reader":
    return self

  def __exit__(self, *error) -> None:
    self.close()

  def close(self) -> None:
    """Closes every file."""
    for file in self._files.values():
      file.close()
    self._files = {}


def new_directory(directory: str | os.PathLike) -> Path:
  """Makes the directory of a checkpoint that is to be written, if missing.

  Raises:
    UsageError: it holds a checkpoint.
    DiskError: it cannot be made.
  """
  directory = Path(directory)
  if directory.exists() and any(directory.glob("*.safetensors*")):
    raise UsageError(f"{directory}: already holds a checkpoint; choose an empty directory")
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise DiskError(f"{directory}: cannot be made ({error}); choose another directory") from error
  return directory


def write(
  directory: str | os.PathLike,
  tensors: dict[str, Tensor],
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes a checkpoint; holds one tensor at a time.

  Args:
    directory: must exist. A file appears under its name only once it is complete.
    tensors: by key, in the order of writing.
    shard_bytes: largest size of a file; a larger tensor has a file of its own.

  Raises:
    DiskError: there is not enough space, or a file cannot be written; nothing is left behind.
  """
  directory = Path(directory)
  space(directory, sum(tensor.nbytes for tensor in tensors.values()))
  shards: list[list[str]] = [[]]
  filled = 0
  for key, tensor in tensors.items():
    if shards[-1] and filled + tensor.nbytes > shard_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(key)
    filled += tensor.nbytes
  names = [SINGLE] if len(shards) == 1 else [
    f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
  ]
  try:
    for name, keys in zip(names, shards, strict=True):
      write_file(directory / name, {key: tensors[key] for key in keys})
  except BaseException:
    for name in names:
      (directory / name).unlink(missing_ok=True)
    raise
  if len(shards) > 1:
    where = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def write_file(path: Path, tensors: dict[str, Tensor]) -> None:
  """Writes one file, tensor by tensor.

  The format: the header's length as u64, the header in JSON, then the bytes of every tensor.

  Raises:
    DiskError: it cannot be written.
  """
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for key, tensor in tensors.items():
    start, end = end, end + tensor.nbytes
    header[key] = {"dtype": DTYPES[tensor.dtype.name], "shape": list(tensor.shape),
                   "data_offsets": [start, end]}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)

  def save(temporary: str) -> None:
    with open(temporary, "wb") as file:
      file.write(struct.pack("<Q", len(text)) + text)
      for key, tensor in tensors.items():
        array = np.require(tensor.get(), requirements="C")  # ascontiguousarray has no scalars
        if (array.shape, array.dtype) != (tuple(tensor.shape), tensor.dtype):
          raise ValueError(f"{key} is {array.dtype}{array.shape}, not {tensor.dtype}{tensor.shape}")
        file.write(array.reshape(-1).view(np.uint8).data)

  _replace(path, save)


def space(directory: Path, size: int) -> None:
  """Refuses to begin what does not fit on the disk.

  Raises:
    DiskError: fewer than `size` bytes are free, or there is no such directory.
  """
  try:
    free = shutil.disk_usage(directory).free
  except OSError as error:
    raise DiskError(f"{directory}: cannot be written ({error.strerror}); make it or choose another"
                    ) from error
  if size > free:
    raise DiskError(f"{directory}: {size / 1e9:,.2f} GB are to be written and {free / 1e9:,.2f} GB "
                    "are free; free space or choose another directory")


def read_json(path: Path) -> dict:
  """The content of a JSON file.

  Raises:
    DataError: the file is missing or not JSON.
  """
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise DataError(f"{path}: cannot be read as JSON ({error}); it belongs beside the weights of a "
                    "checkpoint") from error


def write_json(path: Path, content: dict) -> None:
  """Writes a JSON file, complete or not at all."""
  text = json.dumps(content, indent=2) + "\n"
  _replace(path, lambda temporary: Path(temporary).write_text(text))


def _replace(path: Path, save: Callable[[str], object]) -> None:
  temporary = path.with_name(path.name + ".tmp")
  try:
    save(str(temporary))
    temporary.replace(path)
  except BaseException as error:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    if not isinstance(error, OSError):
      raise
    raise DiskError(f"{path}: cannot be written ({error}); free space or choose another directory"
                    ) from error
