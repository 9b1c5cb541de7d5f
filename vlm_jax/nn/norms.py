"""Normalisation; statistics are f32 whatever the compute dtype is."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

from vlm_jax.core.fusion import FROZEN
from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array
from vlm_jax.nn.linear import parameter


class RMSNorm(nn.Module):
  """x / rms(x) * scale (arXiv:1910.07467); cast to the compute dtype before the scale, as Llama."""

  eps: float
  precision: Precision

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """f[..., D] to f[..., D] in the compute dtype."""
    scale = parameter(
      self, "scale", initializers.ones, x.shape[-1:], ("norm",), self.precision.param
    )
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
    return x.astype(self.precision.compute) * scale.astype(self.precision.compute)


class LayerNorm(nn.Module):
  """(x - mean) / std * scale + bias (arXiv:1607.06450), all in f32, then the compute dtype."""

  eps: float
  precision: Precision

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """f[..., D] to f[..., D] in the compute dtype."""
    shape, dtype = x.shape[-1:], self.precision.param
    scale = parameter(self, "scale", initializers.ones, shape, ("norm",), dtype)
    bias = parameter(self, "bias", initializers.zeros, shape, ("norm",), dtype)
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
    x = x * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return x.astype(self.precision.compute)


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
