"""Attention with the whole T x S matrix: the oracle, and fastest for short rows and decoding."""

import jax
import jax.numpy as jnp

from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.typing import Array
from vlm_jax.ops.attention import bias as biases
from vlm_jax.ops.attention.request import Request

# Finite, so that a row without any key stays finite before it is zeroed.
MASKED = -2.3819763e38


def declines(request: Request) -> str | None:
  """Never: dense computes every mask."""
  del request


def weights(q: Array, k: Array, mask: IntervalMask, scale: float | None = None,
            soft_cap: float | None = None) -> Array:
  """The softmax f32[B,H,T,S] of q f[B,T,H,C] and k f[B,S,G,C]; 0 outside the mask."""
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  return _softmax(_logits(q, k, scale, soft_cap, None, None), mask, k.shape[1])[0]


def _logits(q, k, scale, soft_cap, bias, k_bias) -> Array:
  """f32[B,H,T,S]."""
  batch, length, heads, width = q.shape
  groups = k.shape[2]
  q = q.reshape(batch, length, groups, heads // groups, width)
  logits = jnp.einsum("btgrc,bsgc->bgrts", q * scale, k, preferred_element_type=jnp.float32)
  logits = logits.reshape(batch, heads, length, k.shape[1])
  if soft_cap is not None:
    logits = soft_cap * jnp.tanh(logits / soft_cap)
  if bias is not None:
    logits += biases.dense(bias)
  if k_bias is not None:
    logits += k_bias.astype(jnp.float32)[:, None, None]
  return logits


def _softmax(logits: Array, mask: IntervalMask, keys: int) -> tuple[Array, Array]:
  """Weights like the logits f32[B,H,T,S], and lse f32[B,H,T]."""
  seen = mask.dense(keys)[:, None]
  logits = jnp.where(seen, logits, MASKED)
  top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
  # A row that sees no key (padding) has MASKED everywhere: its weights are 0 by definition.
  shares = jnp.where(seen, jnp.exp(logits - top), 0.0)
  total = shares.sum(-1, keepdims=True)
  some = total > 0
  total = jnp.where(some, total, 1.0)
  return shares / total, jnp.where(some, top + jnp.log(total), -jnp.inf)[..., 0]


def attend(
  q: Array, k: Array, v: Array, mask: IntervalMask, plan, *, scale: float,
  soft_cap: float | None = None, bias: biases.Bias | None = None, k_bias: Array | None = None,
) -> tuple[Array, Array]:
  """See `attention`; returns out and lse. Holds f32[B,H,T,S]."""
  del plan
  batch, length, heads, width = q.shape
  groups = k.shape[2]
  shares, lse = _softmax(_logits(q, k, scale, soft_cap, bias, k_bias), mask, k.shape[1])
  shares = shares.astype(v.dtype).reshape(batch, groups, heads // groups, length, -1)
  out = jnp.einsum("bgrts,bsgc->btgrc", shares, v)
  return out.reshape(batch, length, heads, width).astype(q.dtype), lse.swapaxes(1, 2)
