"""Which blocks of the T x S matrix hold a visible pair, from O(T * S / block) comparisons.

The plan is built on the device once per batch and mask and shared by all layers. It never calls a
block with a visible pair empty, and is exact for masks without classes.
"""

import dataclasses

import jax
import jax.numpy as jnp

from vlm_jax.core.mask import NEVER, IntervalMask
from vlm_jax.core.typing import Array

EMPTY, PARTIAL, FULL = 0, 1, 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionPlan:
  """Block classification, compacted both ways. Q, K: numbers of query and key blocks.

  Attributes:
    kinds: i8[B,Q,K], EMPTY, PARTIAL or FULL.
    k_count, k_blocks: i32[B,Q], i32[B,Q,K]: the active key blocks of a query block, first.
    q_count, q_blocks: i32[B,K], i32[B,K,Q]: the active query blocks of a key block, first.
    block_q, block_k: block sizes; T and S are padded up to multiples.
  """

  kinds: Array
  k_count: Array
  k_blocks: Array
  q_count: Array
  q_blocks: Array
  block_q: int = dataclasses.field(metadata=dict(static=True))
  block_k: int = dataclasses.field(metadata=dict(static=True))

  def active_pairs(self) -> Array:
    """f32[B], query-key pairs in active blocks: what a blocked kernel computes."""
    return self.k_count.sum(-1).astype(jnp.float32) * (self.block_q * self.block_k)

  def active_flops(self, heads: int, width: int) -> Array:
    """f32[B], FLOPs of the forward pass over active blocks, H heads of width C; 2.5 times that
    for the gradients. The share of `4 * H * C * mask.dense().sum()` in it was not wasted."""
    return 4.0 * heads * width * self.active_pairs()


def pad_mask(mask: IntervalMask, num_keys: int, block_q: int, block_k: int) -> IntervalMask:
  """The mask with T and S padded to multiples of the blocks: new queries see nothing, new keys are
  seen by nobody. Every field is filled in (None becomes its meaning)."""
  batch, length = mask.lo.shape
  more_q, more_k = -length % block_q, -num_keys % block_k
  zeros_q = jnp.zeros((batch, length), jnp.int32)
  zeros_k = jnp.zeros((batch, num_keys), jnp.int32)
  index = jnp.broadcast_to(jnp.arange(num_keys, dtype=jnp.int32), (batch, num_keys))
  pad = lambda field, default, more, value: jnp.pad(
    default if field is None else field, ((0, 0), (0, more)), constant_values=value
  )
  return IntervalMask(
    lo=pad(mask.lo, None, more_q, 0),
    hi=pad(mask.hi, None, more_q, 0),
    q_class=pad(mask.q_class, zeros_q, more_q, 0),
    k_class=pad(mask.k_class, zeros_k, more_k, 0),
    k_index=pad(mask.k_index, index, more_k, NEVER),
  )


def make_plan(mask: IntervalMask, num_keys: int, *, block_q: int, block_k: int) -> AttentionPlan:
  """Classifies the blocks of a mask.

  Args:
    mask: fields [B,T] and [B,S].
    num_keys: S.
    block_q, block_k: block sizes, see `block_sizes`.

  Returns:
    The plan; O(B * T * S / block_k) comparisons, no [T,S] array.
  """
  m = pad_mask(mask, num_keys, block_q, block_k)
  batch, length = m.lo.shape
  blocks_q, blocks_k = length // block_q, m.k_index.shape[1] // block_k
  index = m.k_index.reshape(batch, 1, blocks_k, block_k)
  first, last = index.min(-1), index.max(-1)
  key = m.k_class.reshape(batch, 1, blocks_k, block_k)
  class_min, class_max = key.min(-1), key.max(-1)
  class_min_positive = jnp.where(key > 0, key, jnp.iinfo(jnp.int32).max).min(-1)

  lo, hi, query = m.lo[..., None], m.hi[..., None], m.q_class[..., None]
  some = (lo <= last) & (hi > first) & (lo < hi)
  # All keys of the block carry a class, and none can be the query's: the interval does not matter.
  never = (query != 0) & (class_min > 0) & ((query < class_min) | (query > class_max))
  every = (lo <= first) & (hi > last)
  one_class = (class_min_positive == query) & (class_max == query)
  every &= (query == 0) | (class_max == 0) | one_class
  active = (some & ~never).reshape(batch, blocks_q, block_q, blocks_k).any(2)
  full = every.reshape(batch, blocks_q, block_q, blocks_k).all(2)

  k_count, k_blocks = _compact(active)
  q_count, q_blocks = _compact(active.swapaxes(1, 2))
  kinds = active.astype(jnp.int8) + (active & full).astype(jnp.int8)
  return AttentionPlan(kinds, k_count, k_blocks, q_count, q_blocks, block_q, block_k)


def _compact(active: Array) -> tuple[Array, Array]:
  """bool[B,n,m] to the count i32[B,n] and the indices i32[B,n,m], active ones first in order."""
  order = jnp.argsort(~active, axis=-1, stable=True).astype(jnp.int32)
  return active.sum(-1, dtype=jnp.int32), order
