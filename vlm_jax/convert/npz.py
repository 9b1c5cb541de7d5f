"""Reads .npz checkpoints as big_vision and vision_transformer write them, array by array.

Their keys are paths of Flax modules. Arrays below one collection ("params/", "opt/target/") are
named without it; layers that a scan stacked ("encoderblock/...", "llm/layers/...") are named one by
one ("encoderblock_3/..."), so that one table describes both kinds of file.
"""

import os
import re
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.lib import format as npy

from vlm_jax.core.errors import DataError

COLLECTIONS = re.compile(r"^(opt/target/|params/)+")
STACKED = re.compile(r"((?<=encoderblock)|(?<=^llm/layers))(?=/)")


class Reader:
  """The arrays of an .npz file by key; reads one only when it is asked for.

  Attributes:
    shapes: key to shape, known without reading any.
  """

  def __init__(self, path: str | os.PathLike):
    """Opens the file and reads the header of every array.

    Raises:
      DataError: it is damaged, or holds Python objects.
    """
    self.path = Path(path)
    self.shapes: dict[str, tuple[int, ...]] = {}
    self._members: dict[str, tuple[str, int | None]] = {}  # key to (member, layer)
    self._cached: tuple[str, np.ndarray] | None = None  # the last stack of layers, nothing else
    try:
      self._archive = zipfile.ZipFile(self.path)
    except (OSError, zipfile.BadZipFile) as error:
      raise DataError(f"{self.path}: cannot be read as .npz ({error}); download it again"
                      ) from error
    for member in self._archive.namelist():
      self._add(member)

  def _add(self, member: str) -> None:
    try:
      with self._archive.open(member) as file:
        version = npy.read_magic(file)
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = header(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
      self.close()
      raise DataError(f"{self.path}: '{member}' cannot be read ({error}); download it again"
                      ) from error
    if dtype.hasobject:
      self.close()
      raise DataError(f"{self.path}: '{member}' holds Python objects, which may run code; save it "
                      "as arrays")
    key = COLLECTIONS.sub("", member.removesuffix(".npy"))
    if not STACKED.search(key):
      self._members[key], self.shapes[key] = (member, None), shape
      return
    for layer in range(shape[0]):
      name = STACKED.sub(f"_{layer}", key)
      self._members[name], self.shapes[name] = (member, layer), shape[1:]

  def __getitem__(self, key: str) -> np.ndarray:
    member, layer = self._members[key]
    if self._cached and self._cached[0] == member:
      array = self._cached[1]
    else:
      array = self._read(member)
      self._cached = (member, array) if layer is not None else None
    return array if layer is None else array[layer]

  def _read(self, member: str) -> np.ndarray:
    try:
      with self._archive.open(member) as file:
        array = npy.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
      raise DataError(f"{self.path}: '{member}' is damaged ({error}); download it again"
                      ) from error
    # numpy has no name for bfloat16 and writes two bytes without one.
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array

  def __enter__(self) -> "Reader":
    return self

  def __exit__(self, *error) -> None:
    self.close()

  def close(self) -> None:
    """Closes the file."""
    self._cached = None
    self._archive.close()
