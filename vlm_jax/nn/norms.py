"""Normalisation over the last axis; statistics are f32 whatever the compute dtype is."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers

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
