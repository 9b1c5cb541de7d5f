"""Next-token losses that never hold B x T x V, and their weights, per data source."""

import jax
import jax.numpy as jnp

from vlm_jax.core.typing import Array

CHUNK = 2048  # slots whose logits are held at a time


def token_log_likelihoods(hidden: Array, head: Array, targets: Array, chunk: int = CHUNK) -> Array:
  """log p(target) of every slot.

  Args:
    hidden: f[B,T,D].
    head: f[D,V].
    targets: i32[B,T].
    chunk: slots whose f32 logits are held at a time; the backward pass recomputes them.

  Returns:
    f32[B,T].
  """
  batch, length, width = hidden.shape
  # Cut along T: a chunk holds slots of all rows, so rows on different devices stay there.
  size = max(1, min(length, chunk // batch))
  pad = -length % size
  cut = lambda x: jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)
  hidden = cut(jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))))
  targets = cut(jnp.pad(targets, ((0, 0), (0, pad))))
  head = head.astype(hidden.dtype)

  @jax.checkpoint
  def part(hidden, targets):
    logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)

  parts = jax.lax.map(lambda args: part(*args), (hidden, targets))
  return jnp.moveaxis(parts, 0, 1).reshape(batch, -1)[:, :length]


def source_sums(values: Array, source_ids: Array, num_sources: int) -> Array:
  """f32[sources], the sum of `values` f[B,T] over the slots of each source."""
  one_hot = jax.nn.one_hot(source_ids, num_sources, dtype=jnp.float32)
  return jnp.einsum("bt,bts->s", values.astype(jnp.float32), one_hot)


def cross_entropy_sums(
  hidden: Array,
  head: Array,
  targets: Array,
  weights: Array,
  source_ids: Array,
  num_sources: int,
  chunk: int = CHUNK,
) -> Array:
  """f32[sources], the weighted sum of -log p(target) over the slots of each source.

  Args:
    hidden: f[B,T,D].
    head: f[D,V].
    targets, source_ids: i32[B,T].
    weights: f32[B,T]; 0 leaves a slot out, exactly: its gradient is 0.
    num_sources: how many sources the mix has.
    chunk: see `token_log_likelihoods`.
  """
  losses = -token_log_likelihoods(hidden, head, targets, chunk)
  return source_sums(jnp.where(weights > 0, losses * weights, 0.0), source_ids, num_sources)
