"""The two feed-forward blocks, and activations by the names that configs use."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array
from vlm_jax.nn.linear import Linear

# The kinds of gelu differ by up to 2e-2, and every published model means exactly one of them.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "silu": jax.nn.silu,
  "relu": jax.nn.relu,
  "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # arXiv:2109.08668
}
FEED_FORWARDS = ("plain", "gated")


def activation(name: str) -> Callable[[Array], Array]:
  """The function called `name`; an unknown name is a UsageError."""
  if name not in ACTIVATIONS:
    raise UsageError(f"config: no activation '{name}'; {nearest(name, ACTIVATIONS)}")
  return ACTIVATIONS[name]


class MLP(nn.Module):
  """Linear, activation, Linear: D to F to D."""

  width: int
  hidden: int
  activation: str
  bias: bool
  precision: Precision

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """f[..., D_in] to f[..., width]."""
    x = Linear((self.hidden,), ("embed", "mlp"), self.bias, self.precision, name="up")(x)
    x = activation(self.activation)(x)
    return Linear((self.width,), ("mlp", "embed"), self.bias, self.precision, name="down")(x)


class GatedMLP(nn.Module):
  """(activation(x gate) * (x up)) down, without biases; SwiGLU with silu (arXiv:2002.05202)."""

  width: int
  hidden: int
  activation: str
  precision: Precision

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """f[..., D] to f[..., width]."""
    linear = lambda size, axes, name: Linear((size,), axes, False, self.precision, name=name)
    gate = activation(self.activation)(linear(self.hidden, ("embed", "mlp"), "gate")(x))
    up = linear(self.hidden, ("embed", "mlp"), "up")(x)
    return linear(self.width, ("mlp", "embed"), "down")(gate * up)


def feed_forward(kind: str, width: int, hidden: int, activation: str, bias: bool,
                 precision: Precision, name: str) -> nn.Module:
  """The block f[..., D] to f[..., width] of a kind.

  Args:
    kind: "plain", an MLP, or "gated", a GatedMLP.
    width, hidden, activation, precision, name: of the block.
    bias: of a plain one.

  Raises:
    UsageError: an unknown kind.
  """
  if kind not in FEED_FORWARDS:
    raise UsageError(f"config: feed_forward is '{kind}'; {nearest(kind, FEED_FORWARDS)}")
  if kind == "gated":
    return GatedMLP(width, hidden, activation, precision, name=name)
  return MLP(width, hidden, activation, bias, precision, name=name)
