"""Learned queries read all features of an image, K of them (CoCa, arXiv:2205.01917, 3.2)."""

import flax.linen as nn
import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core.errors import UsageError
from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array
from vlm_jax.nn import pool


def slots(config: ConfigDict, frames: int, height: int, width: int) -> np.ndarray:
  """i32[k]: every query is one slot, in their order, frame by frame."""
  del height, width
  return np.arange(frames * config.latents, dtype=np.int32)


def uses(config: ConfigDict, path: str, features: int) -> int:
  """To how many places of one image a parameter is applied."""
  return pool.uses(path, config.latents, features)


class Model(nn.Module):
  """f[B,N,P,D_in] to f[B,N,K,width]; P may be of any size."""

  config: ConfigDict
  width: int
  precision: Precision

  @nn.compact
  def __call__(self, features: Array, grid: tuple[int, int]) -> Array:
    """See the class; heads that do not divide `width` are a UsageError."""
    del grid
    config = self.config
    if self.width % config.heads:
      raise UsageError(f"config.connector.heads is {config.heads}, which must divide {self.width}, "
                       "the language model's width")
    return pool.AttentionPool(config.latents, self.width, config.heads, config.norm_eps,
                              self.precision, name="pool")(features)
