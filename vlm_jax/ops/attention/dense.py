"""Attention with the whole T x S matrix: the oracle, and fastest for short rows and decoding."""

import jax
import jax.numpy as jnp

from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.typing import Array
from vlm_jax.ops.attention.plan import AttentionPlan

# Finite, so that a row without any key stays finite before it is zeroed.
MASKED = -2.3819763e38


def declines(q_shape, k_shape, plan: AttentionPlan | None, asked: bool) -> str | None:
  """Never: dense computes every mask."""
  del q_shape, k_shape, plan, asked


def weights(q: Array, k: Array, mask: IntervalMask, scale: float, bias: Array | None = None
            ) -> Array:
  """The softmax f32[B,H,T,S] of q f[B,T,H,C] and k f[B,S,G,C]; 0 outside the mask."""
  batch, length, heads, width = q.shape
  groups = k.shape[2]
  q = q.reshape(batch, length, groups, heads // groups, width)
  logits = jnp.einsum("btgrc,bsgc->bgrts", q * scale, k, preferred_element_type=jnp.float32)
  if bias is not None:
    logits += bias.astype(jnp.float32).reshape(logits.shape)
  seen = mask.dense(k.shape[1])[:, None, None]
  shares = jax.nn.softmax(jnp.where(seen, logits, MASKED), axis=-1)
  # A row that sees no key (padding) has uniform shares here; its output is 0 by definition.
  return jnp.where(seen, shares, 0.0).reshape(batch, heads, length, k.shape[1])


def attend(
  q: Array, k: Array, v: Array, mask: IntervalMask, plan, scale: float, bias: Array | None = None
) -> Array:
  """See `attention`. Holds f32[B,H,T,S]."""
  del plan
  batch, length, heads, width = q.shape
  groups = k.shape[2]
  shares = weights(q, k, mask, scale, bias).astype(v.dtype)
  shares = shares.reshape(batch, groups, heads // groups, length, -1)
  out = jnp.einsum("bgrts,bsgc->btgrc", shares, v)
  return out.reshape(batch, length, heads, width).astype(q.dtype)
