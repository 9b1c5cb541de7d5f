"""Averages r x r neighbours of the feature grid, then the two-layer projector: K = P / r^2."""

import flax.linen as nn
import numpy as np
from ml_collections import ConfigDict

from vlm_jax.connectors import mlp
from vlm_jax.core.errors import UsageError
from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array

KEYS = tuple((f"mlp/{ours}", theirs, op) for ours, theirs, op in mlp.KEYS)


def slots(config: ConfigDict, frames: int, height: int, width: int) -> np.ndarray:
  """i32[k]: every window is one slot, frame by frame, row by row.

  Raises:
    UsageError: the factor does not divide the grid.
  """
  rows, columns = windows(config, (height, width))
  return np.arange(frames * rows * columns, dtype=np.int32)


def windows(config: ConfigDict, grid: tuple[int, int]) -> tuple[int, int]:
  """Rows and columns of windows in the grid; a factor that does not divide it is a UsageError."""
  factor = config.factor
  if factor < 1 or grid[0] % factor or grid[1] % factor:
    raise UsageError(f"config.connector.factor is {factor} but the tower's grid is {grid[0]} x "
                     f"{grid[1]}; choose a factor that divides both")
  return grid[0] // factor, grid[1] // factor


def split(config: ConfigDict, features: Array, grid: tuple[int, int]) -> Array:
  """f[B,N,P,D] to f[B,N,K,r*r,D]: the features of every window, row by row."""
  rows, columns = windows(config, grid)
  batch, images, _, width = features.shape
  r = config.factor
  x = features.reshape(batch, images, rows, r, columns, r, width)
  return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(batch, images, rows * columns, r * r, width)


class Model(nn.Module):
  """f[B,N,P,D_in] to f[B,N,K,width]."""

  config: ConfigDict
  width: int
  precision: Precision

  @nn.compact
  def __call__(self, features: Array, grid: tuple[int, int]) -> Array:
    """See the class."""
    x = split(self.config, features, grid).mean(axis=3)
    return mlp.Model(self.config, self.width, self.precision, name="mlp")(x, grid)
