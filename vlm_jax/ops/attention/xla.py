"""Blocked attention in plain XLA: online softmax over the active blocks of the plan, both ways.

Memory is O(T * C); work is proportional to the active blocks. Data-dependent trip counts make it a
good choice on CPUs and a fallback elsewhere. Algorithm: FlashAttention-2 (arXiv:2307.08691),
algorithms 1 and 2, over a compacted list of blocks.

Inside, rows are grouped by key/value group: [B, blocks, G, (H/G) * block, C], so a block of queries
of all heads of a group meets its keys in one matrix product and keys are never repeated.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.typing import Array
from vlm_jax.ops.attention.plan import FULL, AttentionPlan, pad_mask

MASKED = -1e30


def declines(q_shape, k_shape, plan: AttentionPlan | None, asked: bool) -> str | None:
  """Needs a plan of this mask; leaves short rows, where nothing can be skipped, to dense."""
  if plan is None:
    return "it needs an AttentionPlan and none was made"
  if plan.kinds.shape[1] != -(-q_shape[1] // plan.block_q):
    return "the plan is of another number of queries"
  if not asked and (q_shape[1] <= plan.block_q or k_shape[1] <= plan.block_k):
    return (f"{q_shape[1]} x {k_shape[1]} is one block of {plan.block_q} x {plan.block_k} wide or "
            "high: there is nothing to skip")
  return None


def attend(q: Array, k: Array, v: Array, mask: IntervalMask, plan: AttentionPlan, scale) -> Array:
  """See `attention`."""
  mask = pad_mask(mask, k.shape[1], plan.block_q, plan.block_k)
  groups = k.shape[2]
  out = _attend(
    _split_queries(q, plan.block_q, groups),
    _split_keys(k, plan.block_k),
    _split_keys(v, plan.block_k),
    mask,
    plan,
    scale,
  )
  return _join_queries(out, q.shape).astype(q.dtype)


def _split_queries(x: Array, block: int, groups: int) -> Array:
  """f[B,T,H,C] to f[B,blocks,G,(H/G)*block,C], T padded."""
  batch, length, heads, width = x.shape
  x = jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
  x = x.reshape(batch, -1, block, groups, heads // groups, width)
  return x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, x.shape[1], groups, -1, width)


def _join_queries(x: Array, shape: tuple[int, ...]) -> Array:
  """The inverse of `_split_queries`, cut to `shape` [B,T,H,C]."""
  batch, length, heads, width = shape
  blocks, groups = x.shape[1:3]
  x = x.reshape(batch, blocks, groups, heads // groups, -1, width)
  return x.transpose(0, 1, 4, 2, 3, 5).reshape(batch, -1, heads, width)[:, :length]


def _split_keys(x: Array, block: int) -> Array:
  """f[B,S,G,C] to f[B,blocks,G,block,C], S padded."""
  batch, length, groups, width = x.shape
  x = jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
  return x.reshape(batch, -1, block, groups, width).transpose(0, 1, 3, 2, 4)


def _block_logits(q, k, mask: IntervalMask, plan: AttentionPlan, row, i, j, scale) -> Array:
  """f32[G, R*block_q, block_k]: scaled logits of query block i and key block j, masked."""
  logits = jnp.einsum("gqc,gsc->gqs", q, k, preferred_element_type=jnp.float32) * scale

  def masked(logits):
    query = lambda field: lax.dynamic_slice(field, (row, i * plan.block_q), (1, plan.block_q))
    key = lambda field: lax.dynamic_slice(field, (row, j * plan.block_k), (1, plan.block_k))
    seen = IntervalMask(query(mask.lo), query(mask.hi), query(mask.q_class), key(mask.k_class),
                        key(mask.k_index)).dense()[0]
    repeats = logits.shape[1] // plan.block_q
    return jnp.where(jnp.tile(seen, (repeats, 1)), logits, MASKED)

  return lax.cond(plan.kinds[row, i, j] == FULL, lambda logits: logits, masked, logits)


def _forward(q, k, v, mask: IntervalMask, plan: AttentionPlan, scale) -> tuple[Array, Array]:
  """The output f32 like q, and the log-sum-exp f32[B,blocks,G,R*block_q] (+inf for empty rows)."""
  batch, blocks, groups, rows, width = q.shape

  def query_block(index):
    row, i = index // blocks, index % blocks
    block = q[row, i]

    def key_block(step, carry):
      acc, top, total = carry
      j = plan.k_blocks[row, i, step]
      logits = _block_logits(block, k[row, j], mask, plan, row, i, j, scale)
      new_top = jnp.maximum(top, logits.max(-1))
      shrink = jnp.exp(top - new_top)
      # While a row has seen no key its maximum is MASKED, and exp(MASKED - MASKED) is not a weight.
      weights = jnp.exp(logits - new_top[..., None]) * (new_top > MASKED / 2)[..., None]
      add = jnp.einsum("gqs,gsc->gqc", weights.astype(v.dtype), v[row, j],
                       preferred_element_type=jnp.float32)
      return acc * shrink[..., None] + add, new_top, total * shrink + weights.sum(-1)

    start = (
      jnp.zeros((groups, rows, width), jnp.float32),
      jnp.full((groups, rows), MASKED, jnp.float32),
      jnp.zeros((groups, rows), jnp.float32),
    )
    acc, top, total = lax.fori_loop(0, plan.k_count[row, i], key_block, start)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    return acc / total[..., None], jnp.where(seen, top + jnp.log(total), jnp.inf)

  out, lse = lax.map(query_block, jnp.arange(batch * blocks))
  return out.reshape(q.shape), lse.reshape(q.shape[:-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, mask: IntervalMask, plan: AttentionPlan, scale: float) -> Array:
  return _forward(q, k, v, mask, plan, scale)[0]


def _attend_forward(q, k, v, mask, plan, scale):
  out, lse = _forward(q, k, v, mask, plan, scale)
  return out, (q, k, v, mask, plan, out, lse)


def _attend_backward(scale, residuals, grad):
  """One pass over key blocks; the gradient of q is accumulated in the carry (deterministic)."""
  q, k, v, mask, plan, out, lse = residuals
  batch, blocks_k = k.shape[:2]
  delta = (out * grad).sum(-1)

  def key_block(grad_q, index):
    row, j = index // blocks_k, index % blocks_k
    key, value = k[row, j], v[row, j]

    def query_block(step, carry):
      grad_q, grad_k, grad_v = carry
      i = plan.q_blocks[row, j, step]
      query, above = q[row, i], grad[row, i]
      logits = _block_logits(query, key, mask, plan, row, i, j, scale)
      weights = jnp.exp(logits - lse[row, i][..., None])
      grad_v += jnp.einsum("gqs,gqc->gsc", weights, above)
      inner = jnp.einsum("gqc,gsc->gqs", above, value, preferred_element_type=jnp.float32)
      grad_logits = weights * (inner - delta[row, i][..., None]) * scale
      grad_k += jnp.einsum("gqs,gqc->gsc", grad_logits, query)
      grad_q = grad_q.at[row, i].add(jnp.einsum("gqs,gsc->gqc", grad_logits, key))
      return grad_q, grad_k, grad_v

    zero = jnp.zeros(key.shape, jnp.float32)
    grad_q, grad_k, grad_v = lax.fori_loop(
      0, plan.q_count[row, j], query_block, (grad_q, zero, zero)
    )
    return grad_q, (grad_k, grad_v)

  grad_q, (grad_k, grad_v) = lax.scan(
    key_block, jnp.zeros(q.shape, jnp.float32), jnp.arange(batch * blocks_k)
  )
  return (
    grad_q.astype(q.dtype),
    grad_k.reshape(k.shape).astype(k.dtype),
    grad_v.reshape(v.shape).astype(v.dtype),
    None,
    None,
  )


_attend.defvjp(_attend_forward, _attend_backward)
