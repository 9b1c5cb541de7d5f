"""Linear, activation, Linear: the two-layer projector of LLaVA-1.5 (arXiv:2310.03744, 3.2)."""

import flax.linen as nn
from ml_collections import ConfigDict

from vlm_jax.connectors.linear import slots
from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array
from vlm_jax.nn.linear import Linear
from vlm_jax.nn.mlp import activation

__all__ = ["KEYS", "Model", "slots"]

KEYS = (
  ("up/kernel", "linear_1.weight", "in"),
  ("up/bias", "linear_1.bias", "copy"),
  ("down/kernel", "linear_2.weight", "in"),
  ("down/bias", "linear_2.bias", "copy"),
)


class Model(nn.Module):
  """f[B,N,P,D_in] to f[B,N,P,width]; the hidden layer is `config.hidden` wide, 0: `width`."""

  config: ConfigDict
  width: int
  precision: Precision

  @nn.compact
  def __call__(self, features: Array, grid: tuple[int, int]) -> Array:
    """See the class."""
    del grid
    config = self.config
    linear = lambda size, axes, name: Linear((size,), axes, config.bias, self.precision, name=name)
    x = linear(config.hidden or self.width, ("embed", "mlp"), "up")(features)
    return linear(self.width, ("mlp", "embed"), "down")(activation(config.activation)(x))
