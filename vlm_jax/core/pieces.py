"""Arrays that are larger than the memory there is for them: read in pieces along the first axis."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

BYTES = 2**27  # of a piece; a single row may be more


@dataclasses.dataclass(frozen=True)
class Pieces:
  """An array of which nothing is in memory until a piece is asked for.

  Attributes:
    shape, dtype: of the whole array.
    read: (start, stop) to these rows of it, [stop - start, ...]; a scalar is its only row.
    rows: of a piece, a multiple of what `read` can read at once.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[int, int], np.ndarray]
  rows: int

  @property
  def size(self) -> int:
    """Its number of elements."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Its size in memory."""
    return self.size * self.dtype.itemsize

  @property
  def last(self) -> int:
    """Its number of rows."""
    return self.shape[0] if self.shape else 1

  def __iter__(self) -> Iterator[np.ndarray]:
    """Its pieces in order, one at a time."""
    for start in range(0, self.last, self.rows):
      yield self.read(start, min(start + self.rows, self.last))

  def whole(self) -> np.ndarray:
    """The array itself."""
    if not self.shape:
      return self.read(0, 1)
    array, start = np.empty(self.shape, self.dtype), 0
    for piece in self:
      array[start : start + len(piece)] = piece
      start += len(piece)
    return array


def rows(shape: tuple[int, ...], dtype: np.dtype, least: int = 1) -> int:
  """How many rows of an array are about `BYTES`, a multiple of `least`."""
  row = math.prod(shape[1:]) * np.dtype(dtype).itemsize
  count = max(1, BYTES // max(row, 1)) // least * least
  return max(least, min(count, shape[0] if shape else 1))


def of(array: Any) -> Pieces:
  """The pieces of an array in memory, on the host or on one device."""
  if isinstance(array, Pieces):
    return array
  shape, dtype = tuple(array.shape), np.dtype(array.dtype)
  read = lambda start, stop: np.asarray(array)[start:stop] if shape else np.asarray(array)
  return Pieces(shape, dtype, read, rows(shape, dtype))
