"""One linear layer from the tower's width to the language model's (LLaVA, arXiv:2304.08485)."""

import flax.linen as nn
import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array
from vlm_jax.nn.linear import Linear

KEYS = (
  ("linear/kernel", "weight", "in"),
  ("linear/bias", "bias", "copy"),
)


def slots(config: ConfigDict, frames: int, height: int, width: int) -> np.ndarray:
  """i32[k]: every patch is one slot, frame by frame, row by row."""
  del config
  return np.arange(frames * height * width, dtype=np.int32)


class Model(nn.Module):
  """f[B,N,P,D_in] to f[B,N,P,width]."""

  config: ConfigDict
  width: int
  precision: Precision

  @nn.compact
  def __call__(self, features: Array, grid: tuple[int, int]) -> Array:
    """See the class."""
    del grid
    # Named "mlp", not "embed" twice: one array cannot be split over one mesh axis two times.
    axes = ("embed", "mlp")
    return Linear((self.width,), axes, self.config.bias, self.precision, name="linear")(features)
