"""Reads GGUF files, version 2 and 3: metadata, and tensors one by one, dequantised to f32.

The layout is that of ggml's specification: a header, metadata, a table of tensors, aligned data.
Quantised rows are blocks of 32 values behind their own f16 scale.
"""

import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vlm_jax.core.errors import DataError

BLOCK = 32  # values of a quantised block
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q",
           11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9


def _scale(blocks: np.ndarray, start: int) -> np.ndarray:
  return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _nibbles(blocks: np.ndarray) -> np.ndarray:
  """u8[n,16] to f32[n,32]: the low halves of all bytes, then the high ones."""
  return np.concatenate([blocks & 15, blocks >> 4], axis=1).astype(np.float32)


class Kind(NamedTuple):
  """A type of tensor: bytes of `values` values, and how they become numbers of a dtype."""

  name: str
  size: int
  values: int
  decode: Callable[[np.ndarray], np.ndarray]
  dtype: np.dtype = np.dtype(np.float32)


# By the number that the file has for them; u8[n,size] to values.
KINDS = {
  0: Kind("F32", 4, 1, lambda b: b.view(np.float32)),
  1: Kind("F16", 2, 1, lambda b: b.view(np.float16), np.dtype(np.float16)),
  2: Kind("Q4_0", 18, BLOCK, lambda b: _scale(b, 0) * (_nibbles(b[:, 2:]) - 8)),
  3: Kind("Q4_1", 20, BLOCK, lambda b: _scale(b, 0) * _nibbles(b[:, 4:]) + _scale(b, 2)),
  8: Kind("Q8_0", 34, BLOCK, lambda b: _scale(b, 0) * b[:, 2:].view(np.int8).astype(np.float32)),
  30: Kind("BF16", 2, 1, lambda b: b.view(ml_dtypes.bfloat16), np.dtype(ml_dtypes.bfloat16)),
}


class Place(NamedTuple):
  """Where a tensor is: shape (numpy's order), kind, first byte, bytes."""

  shape: tuple[int, ...]
  kind: Kind
  start: int
  size: int


class Reader:
  """The tensors of a GGUF file by key; reads one only when it is asked for.

  Attributes:
    fields: metadata by name, e.g. "llama.block_count".
    shapes: key to shape, known without reading any.
    dtypes: key to dtype, f32 for quantised tensors.
  """

  def __init__(self, path: str | os.PathLike):
    """Opens the file and reads everything before the data.

    Raises:
      DataError: it is damaged, of another version, or has a type of tensor that is not known.
    """
    self.path = Path(path)
    try:
      self._data = np.memmap(self.path, np.uint8, mode="r")
      self.fields, self._places = _Parser(self._data, self.path).parse()
    except (OSError, ValueError, struct.error, KeyError) as error:
      raise DataError(f"{self.path}: cannot be read as GGUF ({error}); download it again"
                      ) from error
    for key, place in self._places.items():
      if place.start + place.size > len(self._data):
        raise DataError(f"{self.path}: '{key}' ends at byte {place.start + place.size} but the "
                        f"file has {len(self._data)}; it is truncated, download it again")
    self.shapes = {key: place.shape for key, place in self._places.items()}
    self.dtypes = {key: place.kind.dtype for key, place in self._places.items()}

  def __getitem__(self, key: str) -> np.ndarray:
    place = self._places[key]
    data = np.array(self._data[place.start : place.start + place.size])
    return place.kind.decode(data.reshape(-1, place.kind.size)).reshape(place.shape)

  def __enter__(self) -> "Reader":
    return self

  def __exit__(self, *error) -> None:
    self.close()

  def close(self) -> None:
    """Lets go of the file."""
    self._data = np.zeros(0, np.uint8)


class _Parser:
  """Reads the part of a file that is not data."""

  def __init__(self, data: np.ndarray, path: Path):
    self._data, self._path, self._at = data, path, 0

  def parse(self) -> tuple[dict[str, Any], dict[str, Place]]:
    """Metadata, and where every tensor is."""
    magic, version = self._take(4), self._number("<I")
    if magic != b"GGUF" or version not in (2, 3):
      raise ValueError(f"it begins with {magic!r} and version {version}; GGUF 2 and 3 are known")
    count, fields = self._number("<Q"), {}
    for _ in range(self._number("<Q")):
      name = self._string()
      fields[name] = self._value(self._number("<I"))
    rows = [self._row() for _ in range(count)]
    alignment = fields.get("general.alignment", 32)
    start = -(-self._at // alignment) * alignment
    return fields, {name: place._replace(start=start + place.start) for name, place in rows}

  def _row(self) -> tuple[str, Place]:
    name = self._string()
    shape = tuple(self._number("<Q") for _ in range(self._number("<I")))[::-1]
    number, offset = self._number("<I"), self._number("<Q")
    if number not in KINDS:
      raise DataError(f"{self._path}: '{name}' has type {number}; known: "
                      f"{', '.join(kind.name for kind in KINDS.values())}; take another file of "
                      "the model")
    kind = KINDS[number]
    return name, Place(shape, kind, offset, math.prod(shape) // kind.values * kind.size)

  def _value(self, kind: int) -> Any:
    if kind == STRING:
      return self._string()
    if kind == ARRAY:
      inner = self._number("<I")
      return [self._value(inner) for _ in range(self._number("<Q"))]
    return self._number(SCALARS[kind])

  def _string(self) -> str:
    return self._take(self._number("<Q")).decode()

  def _number(self, form: str) -> Any:
    return struct.unpack(form, self._take(struct.calcsize(form)))[0]

  def _take(self, size: int) -> bytes:
    if self._at + size > len(self._data):
      raise ValueError("it ends in the middle of its description")
    self._at += size
    return self._data[self._at - size : self._at].tobytes()
