"""Concatenates r x r neighbours of the grid to one wide feature, then the projector: K = P / r^2.

Nothing is averaged away: the first layer reads all r^2 D features of a window, row by row (the
"pixel shuffle" of SmolVLM, arXiv:2504.05299, and the patch merger of Qwen2-VL, arXiv:2409.12191).
"""

import flax.linen as nn
from ml_collections import ConfigDict

from vlm_jax.connectors import mlp
from vlm_jax.connectors.pool import slots, split
from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array

__all__ = ["KEYS", "Model", "slots"]

KEYS = tuple((f"mlp/{ours}", theirs, op) for ours, theirs, op in mlp.KEYS)


class Model(nn.Module):
  """f[B,N,P,D_in] to f[B,N,K,width]."""

  config: ConfigDict
  width: int
  precision: Precision

  @nn.compact
  def __call__(self, features: Array, grid: tuple[int, int]) -> Array:
    """See the class."""
    x = split(self.config, features, grid)
    x = x.reshape(*x.shape[:3], -1)
    return mlp.Model(self.config, self.width, self.precision, name="mlp")(x, grid)
