"""Convolutions and pooling over images f[B,Height,Width,C], padded as torch does (both sides)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array
from vlm_jax.nn.linear import parameter


class Conv(nn.Module):
  """A convolution without bias, `size` x `size`, (size - 1) / 2 pixels of zeros on every side.

  XLA's own "SAME" pads even inputs of a strided convolution on one side only: another function.

  Attributes:
    width: output channels.
    size: odd kernel size.
    stride: in both directions.
    precision: dtypes.
  """

  width: int
  size: int
  stride: int
  precision: Precision

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """f[B,Height,Width,C] to f[B,ceil(Height/stride),ceil(Width/stride),width]."""
    kernel = parameter(
      self, "kernel", initializers.he_normal(), (self.size, self.size, x.shape[-1], self.width),
      (None, None, "embed", None), self.precision.param,
    )
    pad = (self.size // 2, self.size // 2)
    dtype = self.precision.compute
    return jax.lax.conv_general_dilated(
      x.astype(dtype), kernel.astype(dtype), (self.stride, self.stride), (pad, pad),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def max_pool(x: Array, size: int, stride: int) -> Array:
  """f[B,Height,Width,C] to f[B,ceil(Height/stride),ceil(Width/stride),C], `size` odd."""
  pad = (size // 2, size // 2)
  return jax.lax.reduce_window(
    x, -jnp.inf, jax.lax.max, (1, size, size, 1), (1, stride, stride, 1),
    ((0, 0), pad, pad, (0, 0)),
  )
