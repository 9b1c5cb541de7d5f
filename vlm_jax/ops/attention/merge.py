"""Attention over disjoint sets of keys, put together exactly."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vlm_jax.core.typing import Array


def merge(parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
  """What attention over all keys returns, from what it returns for each part of them.

  Args:
    parts: (out f[B,T,H,C], lse f32[B,T,H]) of `attention(..., return_lse=True)`; no key is in two
      parts. A part in which a query sees nothing has lse -inf there.

  Returns:
    out and lse of the same shapes; 0 and -inf for a query that sees nothing in any part. Gradients
    flow through both.
  """
  outs, lses = zip(*parts, strict=True)
  lse = jnp.stack(lses)
  top = jax.lax.stop_gradient(lse.max(0))
  top = jnp.where(jnp.isneginf(top), 0.0, top)
  weights = jnp.exp(lse - top)
  total = weights.sum(0)
  seen = total > 0
  total = jnp.where(seen, total, 1.0)
  out = sum(weight[..., None] * part.astype(jnp.float32)
            for weight, part in zip(weights / total, outs, strict=True))
  return out.astype(outs[0].dtype), jnp.where(seen, top + jnp.log(total), -jnp.inf)
