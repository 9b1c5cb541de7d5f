"""Normalisation; statistics are f32 whatever the compute dtype is."""

import functools
import math
from types import MappingProxyType

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.fusion import FROZEN
from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array
from vlm_jax.nn.linear import parameter


class RMSNorm(nn.Module):
  """x / rms(x) * scale (arXiv:1910.07467); cast to the compute dtype before the scale, as Llama.

  Attributes:
    eps: added to the mean square.
    precision: dtypes.
    scaled: how many trailing axes have a scale an entry; 2: every head f[...,H,C] has its own.
  """

  eps: float
  precision: Precision
  scaled: int = 1

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """f[..., D] to f[..., D] in the compute dtype."""
    shape, axes = x.shape[-self.scaled :], ("norm",) * self.scaled
    scale = parameter(self, "scale", initializers.ones, shape, axes, self.precision.param)
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
    return x.astype(self.precision.compute) * scale.astype(self.precision.compute)


class OffsetRMSNorm(nn.Module):
  """x / rms(x) * (1 + scale), all in f32, then the compute dtype: Gemma (arXiv:2403.08295).

  Attributes:
    eps, precision: as `RMSNorm`.
  """

  eps: float
  precision: Precision

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """f[..., D] to f[..., D] in the compute dtype."""
    scale = parameter(self, "scale", initializers.zeros, x.shape[-1:], ("norm",),
                      self.precision.param)
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
    return (x * (1 + scale.astype(jnp.float32))).astype(self.precision.compute)


class LayerNorm(nn.Module):
  """(x - mean) / std * scale + bias (arXiv:1607.06450), all in f32, then the compute dtype.

  Attributes:
    eps, precision, scaled: as `RMSNorm`; mean and variance are of the last axis always.
  """

  eps: float
  precision: Precision
  scaled: int = 1

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """f[..., D] to f[..., D] in the compute dtype."""
    shape, dtype = x.shape[-self.scaled :], self.precision.param
    axes = ("norm",) * self.scaled
    scale = parameter(self, "scale", initializers.ones, shape, axes, dtype)
    bias = parameter(self, "bias", initializers.zeros, shape, axes, dtype)
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
    x = x * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return x.astype(self.precision.compute)


NORMS = MappingProxyType({"layer": LayerNorm, "rms": RMSNorm})


def norm(kind: str, eps: float, precision: Precision, name: str) -> nn.Module:
  """The norm of a kind, f[..., D] to f[..., D] in the compute dtype; an unknown one: UsageError."""
  if kind not in NORMS:
    raise UsageError(f"config: norm is '{kind}'; {nearest(kind, NORMS)}")
  return NORMS[kind](eps, precision, name=name)


# QK-norm (arXiv:2302.05442, section 2): queries and keys f[B,T,H,C] are normalised over C, before
# they are rotated, which bounds the logits whatever the projections grow to.
QK_NORMS = MappingProxyType({
  "rms": RMSNorm,  # one scale for all heads: Qwen3
  "rms_offset": OffsetRMSNorm,  # the same, of scale 1 + s: Gemma 3
  "layer": LayerNorm,  # one scale and bias for all heads: Persimmon (Fuyu)
  "layer_per_head": functools.partial(LayerNorm, scaled=2),  # of every head its own: Chameleon
})


def qk_norm(kind: str, eps: float, precision: Precision, name: str) -> nn.Module:
  """The norm of queries or of keys, f[B,T,H,C] to the same in the compute dtype.

  Args:
    kind: a name of `QK_NORMS`.
    eps, precision: of the norm.
    name: of the module.

  Raises:
    UsageError: an unknown kind.
  """
  if kind not in QK_NORMS:
    raise UsageError(f"config: qk_norm is '{kind}'; {nearest(kind, QK_NORMS)}")
  return QK_NORMS[kind](eps=eps, precision=precision, name=name)


class GroupNorm(nn.Module):
  """LayerNorm over image and group of channels (arXiv:1803.08494): 32 groups, or fewer if narrow.

  Says nothing about other images of the batch, as a batch norm in training would.
  """

  eps: float
  precision: Precision

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """f[B,Height,Width,C] to the same in the compute dtype."""
    shape, dtype = x.shape[-1:], self.precision.param
    scale = parameter(self, "scale", initializers.ones, shape, ("norm",), dtype)
    bias = parameter(self, "bias", initializers.zeros, shape, ("norm",), dtype)
    groups = math.gcd(32, x.shape[-1])
    y = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, -1)
    y = y - jnp.mean(y, axis=(1, 2, 4), keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=(1, 2, 4), keepdims=True) + self.eps)
    y = y.reshape(x.shape) * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return y.astype(self.precision.compute)


class FrozenNorm(nn.Module):
  """An imported batch norm with its running statistics: an affine map that no stage trains.

  The names of its leaves say so, and no gradient reaches them.
  """

  eps: float
  precision: Precision

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """f[..., C] to f[..., C] in the compute dtype."""
    frozen = lambda name, init: jax.lax.stop_gradient(parameter(
      self, FROZEN + name, init, x.shape[-1:], ("norm",), self.precision.param
    ).astype(jnp.float32))
    scale, bias = frozen("scale", initializers.ones), frozen("bias", initializers.zeros)
    mean, variance = frozen("mean", initializers.zeros), frozen("variance", initializers.ones)
    scale = scale * jax.lax.rsqrt(variance + self.eps)
    return (x.astype(jnp.float32) * scale + (bias - mean * scale)).astype(self.precision.compute)
