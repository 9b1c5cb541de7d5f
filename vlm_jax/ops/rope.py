"""Rotary position embedding (arXiv:2104.09864) in the half-split layout of Llama checkpoints."""

import jax.numpy as jnp

from vlm_jax.core.typing import Array


def rope(x: Array, positions: Array, theta: float) -> Array:
  """Rotates the pair (c, c + C/2) of every head by positions * theta ** (-2c / C).

  Args:
    x: f[B,T,H,C], C even.
    positions: i32[B,T].
    theta: base of the wavelengths.

  Returns:
    f[B,T,H,C] in x's dtype; angles and rotation are f32.
  """
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions[..., None, None].astype(jnp.float32) * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
  rotated = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
