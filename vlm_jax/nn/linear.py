"""Linear layers whose kernels are [in, out], either side of which may be several axes."""

import math

import flax.linen as nn
from jax.nn import initializers

from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array


def parameter(module: nn.Module, name: str, init, shape, axes: tuple[str, ...], dtype) -> Array:
  """Makes a parameter with the logical names of its axes (`core.mesh.RULES`)."""
  return module.param(name, nn.with_logical_partitioning(init, axes), shape, dtype)


class Linear(nn.Module):
  """x f[..., *ins] times kernel [*ins, *outs], plus bias [*outs].

  Attributes:
    outs: sizes of the output axes.
    axes: logical names of the kernel's axes, as many as ins and outs together.
    bias: whether there is a bias.
    precision: dtype of parameters and of the product.
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
    y = (flat @ kernel.reshape(math.prod(ins), -1)).reshape(*outer, *self.outs)
    if self.bias:
      # A bias over the model width is small: replicated rather than gathered in every layer.
      axes = tuple("norm" if name == "embed" else name for name in self.axes[count:])
      bias = parameter(self, "bias", initializers.zeros, self.outs, axes, self.precision.param)
      y = y + bias.astype(self.precision.compute)
    return y
