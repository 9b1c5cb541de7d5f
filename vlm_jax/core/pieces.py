"""Arrays that are larger than the memory there is for them: read in pieces along the first axis."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

BYTES = 2**25  # of a piece; a single row may be more


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
  """The pieces of an array in memory, on the host or on devices of this process.

  Of an array on several devices none is gathered: JAX would keep what it gathers beside it.
  """
  if isinstance(array, Pieces):
    return array
  shape, dtype = tuple(array.shape), np.dtype(array.dtype)
  shards = array.addressable_shards if isinstance(array, jax.Array) else ()
  parts = [shard for shard in shards if shard.replica_id == 0]

  def read(start: int, stop: int) -> np.ndarray:
    if not shape or len(parts) < 2:
      whole = np.asarray(parts[0].data if parts else array)
      return whole[start:stop] if shape else whole
    found = np.empty((stop - start, *shape[1:]), dtype)
    for part in parts:
      first, last, _ = part.index[0].indices(shape[0])
      low, high = max(first, start), min(last, stop)
      if low < high:
        found[(slice(low - start, high - start), *part.index[1:])] = (
          np.asarray(part.data)[low - first : high - first])
    return found

  return Pieces(shape, dtype, read, rows(shape, dtype))
