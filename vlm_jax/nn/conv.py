"""Convolutions and pooling over images f[B,Height,Width,C], padded as torch does or TensorFlow."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array
from vlm_jax.nn.linear import parameter

# Zeros around the input. They differ where a stride meets an even side: TensorFlow's "SAME" (which
# is XLA's) then has one pixel more at the right and lower edge than at the left and upper.
PADDINGS = ("torch", "tensorflow")


class Conv(nn.Module):
  """A convolution without bias, `size` x `size`, with as many outputs as strides fit the input.

  Attributes:
    width: output channels.
    size: odd kernel size.
    stride: in both directions.
    precision: dtypes.
    groups: of channels that do not see each other; as many as channels: depthwise.
    padding: a name of `PADDINGS`; "torch" has (size - 1) / 2 zeros on every side.
  """

  width: int
  size: int
  stride: int
  precision: Precision
  groups: int = 1
  padding: str = "torch"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """f[B,Height,Width,C] to f[B,ceil(Height/stride),ceil(Width/stride),width].

    Raises:
      UsageError: no such padding.
    """
    if self.padding not in PADDINGS:
      raise UsageError(f"config.tower.padding is '{self.padding}'; "
                       f"{nearest(self.padding, PADDINGS)}")
    shape = (self.size, self.size, x.shape[-1] // self.groups, self.width)
    kernel = parameter(self, "kernel", initializers.he_normal(), shape,
                       (None, None, "embed" if self.groups == 1 else None, None),
                       self.precision.param)
    x, kernel = x.astype(self.precision.compute), kernel.astype(self.precision.compute)
    pad = (self.size // 2, self.size // 2)
    how = dict(stride=self.stride, pad="SAME" if self.padding == "tensorflow" else (pad, pad))
    if self.groups == x.shape[-1] == self.width:
      return jax.lax.platform_dependent(
        x, kernel, cpu=functools.partial(shifted, **how),
        default=functools.partial(convolved, **how))
    return convolved(x, kernel, **how, groups=self.groups)


def convolved(x: Array, kernel: Array, *, stride: int, pad: Any, groups: int | None = None
              ) -> Array:
  """The convolution of XLA, f[B,Height,Width,C] and f[k,k,C/groups,O]; groups None: C."""
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), pad, dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups or x.shape[-1])


def shifted(x: Array, kernel: Array, *, stride: int, pad: Any) -> Array:
  """The depthwise convolution as a sum of k^2 shifted images, of which XLA makes a faster
  program for a CPU than of its convolution."""
  size, sides = kernel.shape[0], x.shape[1:3]
  if isinstance(pad, str):
    pad = jax.lax.padtype_to_pads(sides, (size, size), (stride, stride), pad)
  x = jnp.pad(x, ((0, 0), *pad, (0, 0)))
  ends = [(x.shape[axis] - size) // stride * stride + 1 for axis in (1, 2)]
  return sum(x[:, i : i + ends[0] : stride, j : j + ends[1] : stride] * kernel[i, j, 0]
             for i in range(size) for j in range(size))


def max_pool(x: Array, size: int, stride: int) -> Array:
  """f[B,Height,Width,C] to f[B,ceil(Height/stride),ceil(Width/stride),C], `size` odd."""
  pad = (size // 2, size // 2)
  return jax.lax.reduce_window(
    x, -jnp.inf, jax.lax.max, (1, size, size, 1), (1, stride, stride, 1),
    ((0, 0), pad, pad, (0, 0)),
  )
