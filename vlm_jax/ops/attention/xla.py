"""Blocked attention in plain XLA: online softmax over the active blocks of the plan, both ways.

Memory is O(T * C); work follows the active blocks. Data-dependent trip counts make it a
good choice on CPUs and a fallback elsewhere. Algorithm: FlashAttention-2 (arXiv:2307.08691),
algorithms 1 and 2, over a compacted list of blocks.

Inside, rows are grouped by key/value group: [blocks, B, G, (H/G) * block, C], so a block of queries
of all heads of a group meets its keys in one matrix product and keys are never repeated. A loop
step takes n query blocks of every row of the batch, neighbours, and for each of them its own next
active key block: [n, B, ...]; one that has none left computes a masked block until the others are
done. Rows stay side by side, so sharded rows stay on their devices; with few rows n is larger, and
a step has work for all cores.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.typing import Array
from vlm_jax.ops.attention.plan import EMPTY, FULL, AttentionPlan, pad_mask

MASKED = -1e30
LANES = 16  # blocks of all rows together that a loop step takes


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
  """f[B,T,H,C] to f[blocks,B,G,(H/G)*block,C], T padded."""
  batch, length, heads, width = x.shape
  x = jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
  x = x.reshape(batch, -1, block, groups, heads // groups, width)
  return x.transpose(1, 0, 3, 4, 2, 5).reshape(x.shape[1], batch, groups, -1, width)


def _join_queries(x: Array, shape: tuple[int, ...]) -> Array:
  """The inverse of `_split_queries`, cut to `shape` [B,T,H,C]."""
  batch, length, heads, width = shape
  blocks, groups = x.shape[0], x.shape[2]
  x = x.reshape(blocks, batch, groups, heads // groups, -1, width)
  return x.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, width)[:, :length]


def _split_keys(x: Array, block: int) -> Array:
  """f[B,S,G,C] to f[blocks,B,G,block,C], S padded."""
  batch, length, groups, width = x.shape
  x = jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
  return x.reshape(batch, -1, block, groups, width).transpose(1, 0, 3, 2, 4)


def _in_lanes(tree, batch: int):
  """Arrays [blocks,...] to [steps,n,...], padded: what is not there has no active block."""
  blocks = jax.tree.leaves(tree)[0].shape[0]
  n = max(1, min(blocks, LANES // batch))

  def cut(x):
    padded = jnp.pad(x, ((0, -blocks % n), *((0, 0),) * (x.ndim - 1)))
    return padded.reshape(-1, n, *x.shape[1:])

  return jax.tree.map(cut, tree)


def _from_lanes(tree, blocks: int):
  """The inverse of `_in_lanes`."""
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:blocks], tree)


def _pick(x: Array, index: Array) -> Array:
  """x[index[n,b], b] for every lane n and row b: x [blocks,B,...] to [n,B,...]."""
  one = lambda blocks, i: lax.dynamic_index_in_dim(blocks, i, 0, False)
  return jax.vmap(lambda row: jax.vmap(one, (1, 0))(x, row))(index)


def _blocks(mask: IntervalMask, plan: AttentionPlan) -> IntervalMask:
  """The fields of a padded mask cut into blocks: [blocks,B,block]."""
  cut = lambda field, block: field.reshape(field.shape[0], -1, block).swapaxes(0, 1)
  return IntervalMask(
    lo=cut(mask.lo, plan.block_q),
    hi=cut(mask.hi, plan.block_q),
    q_class=cut(mask.q_class, plan.block_q),
    k_class=cut(mask.k_class, plan.block_k),
    k_index=cut(mask.k_index, plan.block_k),
  )


def _pairs(query: IntervalMask, key: IntervalMask) -> IntervalMask:
  """The mask of one query block against one key block in every lane and row."""
  return IntervalMask(query.lo, query.hi, query.q_class, key.k_class, key.k_index)


def _logits(q, k, mask: IntervalMask, kind: Array, scale: float) -> Array:
  """f32[n,B,G,R*block_q,block_k], masked; kind i8[n,B] of each block, EMPTY: unseen."""
  logits = jnp.einsum("nbgqc,nbgsc->nbgqs", q, k, preferred_element_type=jnp.float32) * scale

  def masked(logits):
    seen = mask.dense() & (kind > EMPTY)[..., None, None]
    repeats = logits.shape[3] // seen.shape[2]
    return jnp.where(jnp.tile(seen, (1, 1, repeats, 1))[:, :, None], logits, MASKED)

  return lax.cond((kind == FULL).all(), lambda logits: logits, masked, logits)


def _next(kinds: Array, count: Array, order: Array, step: Array) -> tuple[Array, Array]:
  """The next block i32[n,B] of every lane and row and its kind, EMPTY where none is left.

  Args:
    kinds, order: [n,B,blocks], of the plan.
    count: i32[n,B].
    step: i32[].
  """
  block = order[..., step]
  kind = jnp.take_along_axis(kinds, block[..., None], axis=-1)[..., 0]
  return block, jnp.where(step < count, kind, EMPTY)


def _forward(q, k, v, mask: IntervalMask, plan: AttentionPlan, scale) -> tuple[Array, Array]:
  """The output f32 like q, and the log-sum-exp f32[blocks,B,G,R*block_q] (+inf for empty rows)."""
  fields = _blocks(mask, plan)
  keys = IntervalMask(fields.k_index, fields.k_index, None, fields.k_class, fields.k_index)

  def query_block(args):
    query, own, kinds, count, order = args

    def key_block(step, carry):
      acc, top, total = carry
      j, kind = _next(kinds, count, order, step)
      pick = functools.partial(_pick, index=j)
      logits = _logits(query, pick(k), _pairs(own, jax.tree.map(pick, keys)), kind, scale)
      new_top = jnp.maximum(top, logits.max(-1))
      shrink = jnp.exp(top - new_top)
      # While a row has seen no key its maximum is MASKED, and exp(MASKED - MASKED) is not a weight.
      weights = jnp.exp(logits - new_top[..., None]) * (new_top > MASKED / 2)[..., None]
      add = jnp.einsum("nbgqs,nbgsc->nbgqc", weights.astype(v.dtype), pick(v),
                       preferred_element_type=jnp.float32)
      return acc * shrink[..., None] + add, new_top, total * shrink + weights.sum(-1)

    start = (
      jnp.zeros(query.shape, jnp.float32),
      jnp.full(query.shape[:-1], MASKED, jnp.float32),
      jnp.zeros(query.shape[:-1], jnp.float32),
    )
    acc, top, total = lax.fori_loop(0, count.max(), key_block, start)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    return acc / total[..., None], jnp.where(seen, top + jnp.log(total), jnp.inf)

  queries = IntervalMask(fields.lo, fields.hi, fields.q_class)
  swap = lambda field: jnp.moveaxis(field, 1, 0)
  blocks = (q, queries, swap(plan.kinds), plan.k_count.T, swap(plan.k_blocks))
  return _from_lanes(lax.map(query_block, _in_lanes(blocks, q.shape[1])), len(q))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, mask: IntervalMask, plan: AttentionPlan, scale: float) -> Array:
  return _forward(q, k, v, mask, plan, scale)[0]


def _attend_forward(q, k, v, mask, plan, scale):
  out, lse = _forward(q, k, v, mask, plan, scale)
  return out, (q, k, v, mask, plan, out, lse)


def _attend_backward(scale, residuals, grad):
  """Two passes, over query blocks for q and over key blocks for k and v: nothing is scattered."""
  q, k, v, mask, plan, out, lse = residuals
  fields = _blocks(mask, plan)
  queries = IntervalMask(fields.lo, fields.hi, fields.q_class)
  keys = IntervalMask(fields.k_index, fields.k_index, None, fields.k_class, fields.k_index)
  delta = (out * grad).sum(-1)

  def weights_and_grad(query, key, value, above, lse, delta, pairs, kind):
    """softmax weights of a block and the gradient of its scaled logits, f32[n,B,G,R*bq,bk]."""
    weights = jnp.exp(_logits(query, key, pairs, kind, scale) - lse[..., None])
    inner = jnp.einsum("nbgqc,nbgsc->nbgqs", above, value, preferred_element_type=jnp.float32)
    return weights, weights * (inner - delta[..., None]) * scale

  def query_block(args):
    query, above, lse, delta, own, kinds, count, order = args

    def key_block(step, grad_q):
      j, kind = _next(kinds, count, order, step)
      pick = functools.partial(_pick, index=j)
      pairs, key = _pairs(own, jax.tree.map(pick, keys)), pick(k)
      _, grad_logits = weights_and_grad(query, key, pick(v), above, lse, delta, pairs, kind)
      return grad_q + jnp.einsum("nbgqs,nbgsc->nbgqc", grad_logits, key)

    return lax.fori_loop(0, count.max(), key_block, jnp.zeros(query.shape, jnp.float32))

  def key_block(args):
    key, value, own, kinds, count, order = args

    def query_block(step, carry):
      grad_k, grad_v = carry
      i, kind = _next(kinds, count, order, step)
      pick = functools.partial(_pick, index=i)
      query, above = pick(q), pick(grad)
      pairs = _pairs(jax.tree.map(pick, queries), own)
      weights, grad_logits = weights_and_grad(
        query, key, value, above, pick(lse), pick(delta), pairs, kind
      )
      grad_v += jnp.einsum("nbgqs,nbgqc->nbgsc", weights, above)
      return grad_k + jnp.einsum("nbgqs,nbgqc->nbgsc", grad_logits, query), grad_v

    zero = jnp.zeros(key.shape, jnp.float32)
    return lax.fori_loop(0, count.max(), query_block, (zero, zero))

  swap = lambda field: jnp.moveaxis(field, 1, 0)
  blocks = (q, grad, lse, delta, queries, swap(plan.kinds), plan.k_count.T, swap(plan.k_blocks))
  grad_q = _from_lanes(lax.map(query_block, _in_lanes(blocks, q.shape[1])), len(q))
  blocks = (k, v, keys, jnp.moveaxis(plan.kinds, 2, 0), plan.q_count.T, swap(plan.q_blocks))
  grad_k, grad_v = _from_lanes(lax.map(key_block, _in_lanes(blocks, q.shape[1])), len(k))
  return grad_q.astype(q.dtype), grad_k.astype(k.dtype), grad_v.astype(v.dtype), None, None


_attend.defvjp(_attend_forward, _attend_backward)
