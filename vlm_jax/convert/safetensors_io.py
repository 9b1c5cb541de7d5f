"""Reads and writes safetensors checkpoints, one file or shards with an index, tensor by tensor.

Nothing here knows a model. Arrays are numpy (bfloat16 through ml_dtypes) and keep their dtype.
"""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vlm_jax.core.errors import DataError, DiskError, UsageError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # what hubs and loaders expect a file to stay below


class Tensor(NamedTuple):
  """A tensor to be written: its size, and a function that gives it when its turn comes."""

  nbytes: int
  get: Callable[[], np.ndarray]


class Reader:
  """The tensors of a checkpoint directory by key; reads one only when it is asked for.

  Attributes:
    shapes: key to shape, of every tensor, known without reading any.
  """

  def __init__(self, directory: str | os.PathLike):
    """Opens every file.

    Raises:
      DataError: no weights, a missing shard, a damaged file, a key twice.
    """
    self.directory = Path(directory)
    self.shapes: dict[str, tuple[int, ...]] = {}
    self._files: dict[str, safe_open] = {}
    self._stack = contextlib.ExitStack()
    for name in self._names():
      path = self.directory / name
      try:
        file = self._stack.enter_context(safe_open(path, framework="np"))
      except (SafetensorError, OSError) as error:
        self.close()
        raise DataError(f"{path}: cannot be read as safetensors ({error}); download it again"
                        ) from error
      for key in file.keys():
        if key in self._files:
          raise DataError(f"{path}: holds '{key}' a second time; remove the files that are not in "
                          f"{INDEX}")
        self._files[key] = file
        self.shapes[key] = tuple(file.get_slice(key).get_shape())

  def _names(self) -> list[str]:
    index = self.directory / INDEX
    if index.exists():
      return sorted(set(read_json(index).get("weight_map", {}).values()))
    if (self.directory / SINGLE).exists():
      return [SINGLE]
    raise DataError(f"{self.directory}: holds neither {SINGLE} nor {INDEX}; give the directory of "
                    "a safetensors checkpoint")

  def __getitem__(self, key: str) -> np.ndarray:
    return self._files[key].get_tensor(key)

  def __enter__(self) -> "Reader":
    return self

  def __exit__(self, *error) -> None:
    self.close()

  def close(self) -> None:
    """Closes every file."""
    self._files = {}
    self._stack.close()


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
  """Writes a checkpoint; never holds more than one shard.

  Args:
    directory: must exist. A file appears under its name only once it is complete.
    tensors: by key, in the order of writing.
    shard_bytes: largest size of a file; a larger tensor has a file of its own.

  Raises:
    DiskError: a file cannot be written.
  """
  directory = Path(directory)
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
  for name, keys in zip(names, shards, strict=True):
    arrays = {key: np.require(tensors[key].get(), requirements="C") for key in keys}
    _replace(directory / name, lambda path, arrays=arrays: save_file(
      arrays, path, metadata={"format": "pt"}))
  if len(shards) > 1:
    where = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


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
  except (OSError, SafetensorError) as error:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise DiskError(f"{path}: cannot be written ({error}); free space or choose another directory"
                    ) from error
