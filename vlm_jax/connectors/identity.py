"""The features as the tower says them: every one is a slot."""

import flax.linen as nn
from ml_collections import ConfigDict

from vlm_jax.connectors.linear import slots
from vlm_jax.core.errors import UsageError
from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array

__all__ = ["KEYS", "Model", "slots"]

KEYS = ()


class Model(nn.Module):
  """f[B,N,P,width] to the same."""

  config: ConfigDict
  width: int
  precision: Precision

  def __call__(self, features: Array, grid: tuple[int, int]) -> Array:
    """See the class; features of another width are a UsageError."""
    del grid
    if features.shape[-1] != self.width:
      raise UsageError(f"config.connector.name 'identity' returns features of the tower's width, "
                       f"{features.shape[-1]}, but {self.width} are wanted; set "
                       "config.connector.width, or choose another connector")
    return features.astype(self.precision.compute)
