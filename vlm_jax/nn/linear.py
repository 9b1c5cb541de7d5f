"""Linear layers whose kernels are [in, out], either side of which may be several axes."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

from vlm_jax.core import adapters
from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array

DROPOUT = "dropout"  # the generator of randomness that a training step gives its layers


def parameter(module: nn.Module, name: str, init, shape, axes: tuple[str, ...], dtype) -> Array:
  """Makes a parameter with the logical names of its axes (`core.mesh.RULES`)."""
  return module.param(name, nn.with_logical_partitioning(init, axes), shape, dtype)


class Linear(nn.Module):
  """x f[..., *ins] times kernel [*ins, *outs], plus bias [*outs], plus its adapter's part if any.

  Attributes:
    outs: sizes of the output axes.
    axes: logical names of the kernel's axes, as many as ins and outs together.
    bias: whether there is a bias.
    precision: dtype of parameters and of the product, and which layers have an adapter.
    initial: what the kernel starts as, "random" (by its fan-in) or "zeros".
  """

  outs: tuple[int, ...]
  axes: tuple[str, ...]
  bias: bool
  precision: Precision
  initial: str = "random"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """f[..., *ins] to f[..., *outs] in the compute dtype."""
    count = len(self.axes) - len(self.outs)
    ins = x.shape[x.ndim - count :]
    # Fan-in is all input axes together, also for the [H, C, D] kernel behind attention.
    init = initializers.zeros if self.initial == "zeros" else initializers.variance_scaling(
      1.0, "fan_in", "truncated_normal", range(count), range(count, len(self.axes))
    )
    kernel = parameter(
      self, "kernel", init, (*ins, *self.outs), self.axes, self.precision.param
    ).astype(self.precision.compute)
    # One plain matrix product: with batch axes kept apart, XLA on CPUs writes transposed copies of
    # whole activations for the kernel's gradient.
    outer = x.shape[: x.ndim - count]
    flat = x.astype(self.precision.compute).reshape(-1, math.prod(ins))
    y = flat @ kernel.reshape(math.prod(ins), -1)
    # In decoding a layer runs outside its stack and has another path; then its leaves tell.
    if self.has_variable("params", adapters.A) or (
        self.is_initializing() and self.precision.adapters.at("/".join(self.path))):
      y = y + self._adapt(flat, ins)
    y = y.reshape(*outer, *self.outs)
    if self.bias:
      # A bias over the model width is small: replicated rather than gathered in every layer.
      axes = tuple("norm" if name == "embed" else name for name in self.axes[count:])
      bias = parameter(self, "bias", initializers.zeros, self.outs, axes, self.precision.param)
      y = y + bias.astype(self.precision.compute)
    return y

  def _adapt(self, flat: Array, ins: tuple[int, ...]) -> Array:
    """(alpha / rank) x A B, f[N, prod(outs)]; A uniform in +-fan_in^-1/2, B zero at first."""
    lora, count = self.precision.adapters, len(ins)
    init = initializers.variance_scaling(1 / 3, "fan_in", "uniform", range(count), (count,))
    make = lambda name, init, shape, axes: parameter(
      self, name, init, shape, axes, self.precision.param).astype(flat.dtype)
    a = make(adapters.A, init, (*ins, lora.rank), (*self.axes[:count], None))
    b = make(adapters.B, initializers.zeros, (lora.rank, *self.outs), (None, *self.axes[count:]))
    if lora.dropout and self.has_rng(DROPOUT):
      keep = jax.random.bernoulli(self.make_rng(DROPOUT), 1 - lora.dropout, flat.shape)
      flat = jnp.where(keep, flat / (1 - lora.dropout), 0)
    return lora.scale * (flat @ a.reshape(-1, lora.rank) @ b.reshape(lora.rank, -1))
