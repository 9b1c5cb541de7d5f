"""Blocked attention in plain XLA: online softmax over the keys that a block of queries sees.

Memory is O(T * C); work follows the plan. Trip counts depend on the data, which a CPU does not
mind; elsewhere this is the fallback. Algorithm: FlashAttention-2 (arXiv:2307.08691), algorithms 1
and 2, with one pass back: a block of queries adds to the gradients of the keys it meets.

A tile holds the queries of all heads of a group below each other, [G, (H/G) * block_q, C], so keys
are never repeated and a product has rows enough for all cores. Queries, outputs and gradients keep
their layout [B,T,H,C] in memory and are turned in the cache, a tile at a time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from vlm_jax.core.mask import NEVER, IntervalMask
from vlm_jax.core.typing import Array
from vlm_jax.ops.attention import bias as biases
from vlm_jax.ops.attention.plan import EMPTY, AttentionPlan
from vlm_jax.ops.attention.request import Request, platform

MASKED = -1e30  # finite: MASKED - MASKED must not be nan


def declines(request: Request) -> str | None:
  """Needs a plan of this mask; leaves short rows, where nothing can be skipped, to dense."""
  plan, (batch, length, *_), keys = request.plan, request.q_shape, request.k_shape[1]
  if plan is None:
    return "it needs an AttentionPlan and none was made"
  wanted = (batch, -(-length // plan.block_q), -(-keys // plan.block_k))
  if plan.kinds.shape != wanted:
    return f"the plan is of {plan.kinds.shape} blocks, and these arrays have {wanted}"
  if not request.asked and (length <= plan.block_q or keys <= plan.block_k):
    return (f"{length} x {keys} is one block of {plan.block_q} x {plan.block_k} wide or high: "
            "there is nothing to skip")
  return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Inputs:
  """What has gradients. Attributes: q f[B,T,H,C], k, v f[B,S,G,C], bias, k_bias or None."""

  q: Array
  k: Array
  v: Array
  bias: biases.Bias | None
  k_bias: Array | None


def attend(
  q: Array, k: Array, v: Array, mask: IntervalMask, plan: AttentionPlan, *, scale: float,
  soft_cap: float | None = None, bias: biases.Bias | None = None, k_bias: Array | None = None,
) -> tuple[Array, Array]:
  """See `attention`; returns out and lse."""
  return _attend(_Inputs(q, k, v, bias, k_bias), mask, plan, scale, soft_cap)


def _windows(mask: IntervalMask, plan: AttentionPlan, keys: int) -> tuple[Array, Array]:
  """Which keys a block of queries meets: `block_k` from each of i32[B*Q,K], the first i32[B*Q].

  These are the plan's active blocks. Keys in their own order need not be met at multiples of the
  block: from the first key that a block of queries sees, there are fewer windows to its last one.
  """
  active, size = plan.kinds != EMPTY, plan.block_k
  starts, count = plan.k_blocks * size, plan.k_count
  if mask.k_index is None:
    lo, hi = (_in_blocks(field, plan.block_q) for field in (mask.lo, mask.hi))
    lo, hi = jnp.maximum(lo, 0), jnp.minimum(hi, keys)
    first = jnp.where(lo < hi, lo, keys).min(-1, keepdims=True)
    last = jnp.where(lo < hi, hi, 0).max(-1, keepdims=True)
    blocks = active.shape[2]
    slid = first + size * jnp.arange(blocks, dtype=jnp.int32)
    block = jnp.minimum(slid // size, blocks - 1)
    either = active | jnp.pad(active, ((0, 0), (0, 0), (0, 1)))[..., 1:]
    alive = (slid < last) & jnp.take_along_axis(either, block, -1)
    order = jnp.argsort(~alive, axis=-1, stable=True)
    slid, fewer = jnp.take_along_axis(slid, order, -1), alive.sum(-1, dtype=jnp.int32)
    # Between two far ranges of keys, windows may touch more blocks than there are.
    better = fewer < count
    starts, count = jnp.where(better[..., None], slid, starts), jnp.where(better, fewer, count)
  return starts.reshape(-1, starts.shape[-1]), count.reshape(-1)


def _in_blocks(x: Array, block: int) -> Array:
  """[B,n,...] to [B,blocks,block,...], padded with zeros."""
  x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), *((0, 0),) * (x.ndim - 2)))
  return x.reshape(x.shape[0], -1, block, *x.shape[2:])


class _Walk:
  """What the forward and the backward pass share: tiles of the operands, and their logits."""

  def __init__(self, x: _Inputs, mask: IntervalMask, plan: AttentionPlan, scale, soft_cap):
    self.batch, self.length, self.heads, self.width = x.q.shape
    self.keys, self.groups = x.k.shape[1:3]
    self.plan, self.scale, self.soft_cap = plan, scale, soft_cap
    self.block = plan.block_q, plan.block_k
    self.blocks_q = plan.kinds.shape[1]
    # A CPU multiplies f32 faster than bf16.
    self.dtype = jnp.float32 if platform() == "cpu" else x.q.dtype
    self.starts, self.count = _windows(mask, plan, self.keys)
    # A window may stick out over the last key.
    longer = lambda field, value: None if field is None else jnp.pad(
      field, ((0, 0), (0, plan.block_k), *((0, 0),) * (field.ndim - 2)), constant_values=value)
    self.k, self.v = (longer(side.astype(self.dtype), 0).swapaxes(1, 2) for side in (x.k, x.v))
    self.k_class, self.k_index = longer(mask.k_class, 0), longer(mask.k_index, NEVER)
    self.k_bias = longer(x.k_bias, 0)
    self.bias = biases.pad(x.bias, -self.length % plan.block_q, plan.block_k)
    flat = lambda field: None if field is None else self.split(field)
    hi = mask.hi if mask.k_index is not None else jnp.minimum(mask.hi, self.keys)
    self.queries = IntervalMask(flat(mask.lo), flat(hi), flat(mask.q_class))

  def split(self, x: Array) -> Array:
    """[B,T,...] to one row a block of queries, [B*Q,block_q,...]."""
    x = _in_blocks(x, self.block[0])
    return x.reshape(-1, *x.shape[2:])

  def join(self, x: Array) -> Array:
    """The inverse of `split`."""
    return x.reshape(self.batch, -1, *x.shape[2:])[:, : self.length]

  def tile(self, x: Array) -> Array:
    """f[block_q,H,...] to f[G,(H/G)*block_q,...]."""
    size, heads, *rest = x.shape
    x = jnp.moveaxis(x.reshape(size, self.groups, heads // self.groups, *rest), 0, 2)
    return x.reshape(self.groups, -1, *rest)

  def untile(self, x: Array) -> Array:
    """The inverse of `tile`."""
    x = x.reshape(self.groups, self.heads // self.groups, self.block[0], *x.shape[2:])
    return jnp.moveaxis(x, 2, 0).reshape(self.block[0], self.heads, *x.shape[3:])

  def window(self, x: Array, row: Array, start: Array) -> Array:
    """The window [...,block_k] or [G,block_k,C] of a row of [B,...,S] or [B,G,S,C]."""
    axis = 1 if x.ndim == 2 else 2
    sizes = [1, *x.shape[1:]]
    sizes[axis] = self.block[1]
    corner = [row, *(0,) * (x.ndim - 1)]
    corner[axis] = start
    return lax.dynamic_slice(x, corner, sizes)[0]

  def where(self, number: Array, start: Array) -> biases.Tile:
    """The tile of block of queries `number` and the keys from `start`."""
    row, block = number // self.blocks_q, number % self.blocks_q
    return biases.Tile(row, block * self.block[0], start, self.block)

  def logits(self, q: Array, k: Array, own: IntervalMask, at: biases.Tile) -> tuple[Array, Array]:
    """The logits f32[G,M,block_k] of a tile, MASKED where unseen, and the slope of the soft-cap.

    Args:
      q, k: the tiles f[G,M,C] and f[G,block_k,C], M = (H/G) * block_q.
      own: the fields of the queries, i32[block_q].
      at: where the tile lies.
    """
    logits = self.scale * jnp.einsum("gmc,gsc->gms", q, k, preferred_element_type=jnp.float32)
    slope = None
    if self.soft_cap is not None:
      bent = jnp.tanh(logits / self.soft_cap)
      logits, slope = self.soft_cap * bent, 1 - bent * bent
    pick = lambda field: None if field is None else self.window(field, at.row, at.k_start)
    index = pick(self.k_index)
    if index is None:
      index = at.k_start + jnp.arange(self.block[1], dtype=jnp.int32)
    seen = IntervalMask(own.lo, own.hi, own.q_class, pick(self.k_class), index).dense()
    more = jnp.where(seen, 0.0, MASKED)
    if self.k_bias is not None:
      more += pick(self.k_bias).astype(jnp.float32)
    if self.bias is not None:
      bias = at.read(self.bias).reshape(self.groups, -1, *seen.shape)
      more += jnp.where(seen, bias, 0.0)  # outside the mask it may be anything, nan too
    logits = logits.reshape(self.groups, -1, *seen.shape) + more
    return logits.reshape(self.groups, -1, self.block[1]), slope


def _forward(x: _Inputs, mask, plan, scale, soft_cap) -> tuple[Array, Array]:
  """out f[B,T,H,C] and lse f32[B,T,H]."""
  walk = _Walk(x, mask, plan, scale, soft_cap)

  def block(args):
    number, q, own = args
    q = walk.tile(q.astype(walk.dtype))

    def window(step, carry):
      acc, top, total = carry
      at = walk.where(number, walk.starts[number, step])
      k, v = (walk.window(side, at.row, at.k_start) for side in (walk.k, walk.v))
      logits, _ = walk.logits(q, k, own, at)
      new_top = jnp.maximum(top, logits.max(-1))
      # While a query has seen no key, its weights are exp(MASKED), not exp(MASKED - MASKED).
      base = jnp.where(new_top > MASKED / 2, new_top, 0.0)
      shrink, weights = jnp.exp(top - base), jnp.exp(logits - base[..., None])
      add = jnp.einsum("gms,gsc->gmc", weights.astype(walk.dtype), v,
                       preferred_element_type=jnp.float32)
      return acc * shrink[..., None] + add, new_top, total * shrink + weights.sum(-1)

    none = jnp.zeros(q.shape[:2], jnp.float32)
    start = jnp.zeros(q.shape, jnp.float32), none + MASKED, none
    acc, top, total = lax.fori_loop(0, walk.count[number], window, start)
    total = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(top > MASKED / 2, top + jnp.log(total), -jnp.inf)
    return walk.untile((acc / total[..., None]).astype(x.q.dtype)), walk.untile(lse)

  out, lse = lax.map(block, (jnp.arange(len(walk.count)), walk.split(x.q), walk.queries))
  return walk.join(out), walk.join(lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(x: _Inputs, mask: IntervalMask, plan: AttentionPlan, scale, soft_cap):
  return _forward(x, mask, plan, scale, soft_cap)


def _attend_forward(x, mask, plan, scale, soft_cap):
  out, lse = _forward(x, mask, plan, scale, soft_cap)
  return (out, lse), (x, mask, plan, out, lse)


def _attend_backward(scale, soft_cap, residuals, grads):
  """Gradients of out and lse to those of the inputs; every sum has a fixed order."""
  x, mask, plan, out, lse = residuals
  walk = _Walk(x, mask, plan, scale, soft_cap)
  # A query without keys may come with an undefined gradient of its lse; it has no influence.
  grads = grads[0], jnp.where(jnp.isneginf(lse), 0.0, grads[1])
  lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
  spread = lambda tile: tile.reshape(walk.heads, *walk.block)

  def block(sums, args):
    number, q, above, out, lse, grad_lse, own = args
    inner = walk.tile((out.astype(jnp.float32) * above.astype(jnp.float32)).sum(-1) - grad_lse)
    q, above, lse = map(walk.tile, (q.astype(walk.dtype), above.astype(walk.dtype), lse))

    def window(step, carry):
      grad_q, sums = carry
      at = walk.where(number, walk.starts[number, step])
      k, v = (walk.window(side, at.row, at.k_start) for side in (walk.k, walk.v))
      logits, slope = walk.logits(q, k, own, at)
      weights = jnp.exp(logits - lse[..., None])
      grad = jnp.einsum("gmc,gsc->gms", above, v, preferred_element_type=jnp.float32)
      grad = weights * (grad - inner[..., None])
      sums["v"] = _add(sums["v"], at, above, weights.astype(walk.dtype))
      if x.bias is not None:
        sums["bias"] = at.add(sums["bias"], walk.bias, spread(grad))
      if x.k_bias is not None:
        corner, size = (at.row, at.k_start), (1, walk.block[1])
        old = lax.dynamic_slice(sums["k_bias"], corner, size)
        sums["k_bias"] = lax.dynamic_update_slice(sums["k_bias"], old + grad.sum((0, 1)), corner)
      grad = (grad if slope is None else grad * slope).astype(walk.dtype)
      sums["k"] = _add(sums["k"], at, q, grad)
      grad_q += jnp.einsum("gms,gsc->gmc", grad, k, preferred_element_type=jnp.float32)
      return grad_q, sums

    start = jnp.zeros(q.shape, jnp.float32), sums
    grad_q, sums = lax.fori_loop(0, walk.count[number], window, start)
    return sums, walk.untile((scale * grad_q).astype(x.q.dtype))

  # Those of keys and values lie [B,G,C,S]: a product that contracts the rows of both sides is
  # fastest with the narrow side first.
  zeros = jnp.zeros(walk.k.swapaxes(2, 3).shape, jnp.float32)
  sums = {"k": zeros, "v": zeros, "bias": biases.zeros(walk.bias),
          "k_bias": None if x.k_bias is None else jnp.zeros(walk.k_bias.shape, jnp.float32)}
  rows = map(walk.split, (x.q, grads[0], out, lse, grads[1]))
  sums, grad_q = lax.scan(block, sums, (jnp.arange(len(walk.count)), *rows, walk.queries))
  back = lambda total: total[..., : walk.keys].transpose(0, 3, 1, 2).astype(x.k.dtype)
  k_bias = None if x.k_bias is None else sums["k_bias"][:, : walk.keys].astype(x.k_bias.dtype)
  return _Inputs(walk.join(grad_q), back(scale * sums["k"]), back(sums["v"]),
                 biases.gradient(sums["bias"], x.bias), k_bias), None, None


def _add(total: Array, at: biases.Tile, rows: Array, weights: Array) -> Array:
  """Adds rows^T weights, f[G,M,C] and f[G,M,block_k], to f32[B,G,C,S] at a tile's keys."""
  add = jnp.einsum("gmc,gms->gcs", rows, weights, preferred_element_type=jnp.float32)
  corner = (at.row, 0, 0, at.k_start)
  old = lax.dynamic_slice(total, corner, (1, *add.shape))
  return lax.dynamic_update_slice(total, old + add[None], corner)


_attend.defvjp(_attend_forward, _attend_backward)
