"""One linear layer from the tower's width to the language model's (LLaVA, arXiv:2304.08485).

It may start at zero (`config.initial`), so that images are silent at first and the language model
begins as it was (PaliGemma, arXiv:2407.07726, section 3.1).
"""

import flax.linen as nn
import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array
from vlm_jax.nn.linear import Linear

INITIAL = ("random", "zeros")
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
    """See the class; an unknown `config.initial` is a UsageError."""
    del grid
    config = self.config
    if config.initial not in INITIAL:
      raise UsageError(f"config.connector.initial is '{config.initial}'; "
                       f"{nearest(config.initial, INITIAL)}")
    # Named "mlp", not "embed" twice: one array cannot be split over one mesh axis two times.
    return Linear((self.width,), ("embed", "mlp"), config.bias, self.precision, config.initial,
                  name="linear")(features)
