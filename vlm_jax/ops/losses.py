"""Next-token losses that compute logits at predicted slots only and never hold B x T x V of them.

In most batches few slots are predicted (images, prompts and padding are not): those go to the front
of their rows, and a loop as long as the fullest row needs takes them through the vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from vlm_jax.core.typing import Array
from vlm_jax.ops.gather import invert, take_rows

CHUNK = 2048  # slots whose logits are held at a time


def token_log_likelihoods(
  hidden: Array, head: Array, targets: Array, wanted: Array, chunk: int = CHUNK
) -> Array:
  """log p(target) of the wanted slots, exactly 0 elsewhere.

  Args:
    hidden: f[B,T,D].
    head: f[D,V].
    targets: i32[B,T].
    wanted: bool[B,T]; other slots cost nothing, and get gradient 0.
    chunk: slots whose f32 logits are held at a time; the backward pass recomputes them.

  Returns:
    f32[B,T].
  """
  batch, length, _ = hidden.shape
  size = max(1, min(length, chunk // batch))  # of one row: sharded rows stay on their devices
  wanted = wanted.astype(jnp.int32)
  place = jnp.where(wanted > 0, wanted.cumsum(axis=1) - 1, -1)
  order = invert(place, length + -length % size)
  compact = take_rows(hidden, order)
  chosen = take_rows(targets[..., None], order)[..., 0]
  chunks = -(-wanted.sum(axis=1).max() // size)
  values = _log_likelihoods(compact, head.astype(hidden.dtype), chosen, chunks, size)
  return take_rows(values[..., None], place)[..., 0]


def _cut(x: Array, number: Array, size: int) -> Array:
  """Chunk `number` of x [B,T,...] along T."""
  return lax.dynamic_slice_in_dim(x, number * size, size, axis=1)


def _put(x: Array, part: Array, number: Array, size: int) -> Array:
  """x with chunk `number` replaced."""
  return lax.dynamic_update_slice_in_dim(x, part, number * size, axis=1)


def _logits(hidden: Array, head: Array) -> Array:
  return jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)


def _is_target(logits: Array, targets: Array) -> Array:
  """bool[B,T,V]; compared rather than gathered, so a sharded vocabulary stays sharded."""
  return lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _log_likelihoods(hidden, head, targets, chunks, size):
  return _forward(hidden, head, targets, chunks, size)[0]


def _forward(hidden, head, targets, chunks, size):
  """log p(target) of the first `chunks` chunks, 0 behind them; what the backward pass needs."""

  def step(number, carry):
    values, norms = carry
    logits = _logits(_cut(hidden, number, size), head)
    norm = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.where(_is_target(logits, _cut(targets, number, size)), logits, 0).sum(-1)
    return _put(values, picked - norm, number, size), _put(norms, norm, number, size)

  zeros = jnp.zeros(targets.shape, jnp.float32)
  values, norms = lax.fori_loop(0, chunks, step, (zeros, zeros))
  return values, (hidden, head, targets, chunks, norms)


def _backward(size, residuals, grad):
  hidden, head, targets, chunks, norms = residuals

  def step(number, carry):
    grad_hidden, grad_head = carry
    part = _cut(hidden, number, size)
    logits = _logits(part, head)
    p = jnp.exp(logits - _cut(norms, number, size)[..., None])
    grad_logits = (_is_target(logits, _cut(targets, number, size)) - p)
    grad_logits = (grad_logits * _cut(grad, number, size)[..., None]).astype(head.dtype)
    grad_part = jnp.einsum("btv,dv->btd", grad_logits, head).astype(hidden.dtype)
    grad_head += jnp.einsum("btd,btv->dv", part, grad_logits, preferred_element_type=jnp.float32)
    return _put(grad_hidden, grad_part, number, size), grad_head

  start = (jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32))
  grad_hidden, grad_head = lax.fori_loop(0, chunks, step, start)
  return grad_hidden, grad_head.astype(head.dtype), None, None


_log_likelihoods.defvjp(_forward, _backward)


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
    weights: f32[B,T]; 0 leaves a slot out, exactly: it costs nothing and its gradient is 0.
    num_sources: how many sources the mix has.
    chunk: see `token_log_likelihoods`.
  """
  losses = -token_log_likelihoods(hidden, head, targets, weights > 0, chunk)
  return source_sums(losses * weights, source_ids, num_sources)
