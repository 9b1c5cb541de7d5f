"""Rotary position embedding (arXiv:2104.09864) in the half-split layout of Llama checkpoints."""

import jax.numpy as jnp

from vlm_jax.core.typing import Array

Rotation = tuple[Array, Array]  # cosine and sine of every angle, f32[B,T,C/2] each


def rotation(positions: Array, width: int, theta: float) -> Rotation:
  """Angles positions * theta ** (-2c / C), made once for all layers: cosines are dear.

  Args:
    positions: i32[B,T].
    width: C, even.
    theta: base of the wavelengths.
  """
  half = width // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions[..., None].astype(jnp.float32) * frequency
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, by: Rotation) -> Array:
  """Turns the pair (c, c + C/2) of every head by its angle.

  Args:
    x: f[B,T,H,C].
    by: the rotation of these slots.

  Returns:
    f[B,T,H,C] in x's dtype; the turn is f32.
  """
  cos, sin = (part[:, :, None] for part in by)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)
