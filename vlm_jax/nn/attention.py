"""Self-attention with grouped queries, rotary positions or none, and a cache of keys and values."""

import dataclasses

import flax.linen as nn
import jax

from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array
from vlm_jax.nn.linear import Linear
from vlm_jax.ops.attention import AttentionPlan, attention, make_plan
from vlm_jax.ops.rope import Rotation, rotate

Columns = tuple[Array, Array]  # keys and values of one layer, f[B,S,G,C] each


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """What all layers of a stack share; made once per batch, broadcast into the scan.

  Attributes:
    mask: who sees whom; key fields are [B,S] of the cache when there is one.
    plan: its block classification.
    rotation: of queries and keys by their positions, or None.
    length: i32[], columns of the cache written so far, or None without a cache.
  """

  mask: IntervalMask
  plan: AttentionPlan
  rotation: Rotation | None = None
  length: Array | None = None


def make_context(
  mask: IntervalMask,
  rotation: Rotation | None,
  blocks: tuple[int, int],
  columns: int | None = None,
  length: Array | None = None,
) -> Context:
  """Plans the mask once for all layers.

  Args:
    mask: query fields i32[B,T].
    rotation: see `ops.rope.rotation`, or None.
    blocks: block sizes of queries and keys.
    columns: S, the columns of the cache, None without one.
    length: i32[], columns written so far.

  Raises:
    ValueError: a cache with a mask that does not say which key is in which column.
  """
  keys = mask.num_queries if columns is None else columns
  if columns is not None and (mask.k_index is None or mask.k_index.shape[-1] != columns):
    got = None if mask.k_index is None else mask.k_index.shape
    raise ValueError(f"with a cache of {columns} columns mask.k_index must be i32[B,{columns}] "
                     f"(core.mask.NEVER in columns nobody sees), got {got}")
  plan = make_plan(mask, keys, block_q=blocks[0], block_k=blocks[1])
  return Context(mask, plan, rotation, length)


class Attention(nn.Module):
  """softmax(q k^T) v between learned projections.

  Attributes:
    heads, groups: H query heads share G key/value groups, H a multiple of G.
    head_dim: C.
    bias: whether the four projections have biases.
    implementation: see `ops.attention`.
    precision: dtypes.
  """

  heads: int
  groups: int
  head_dim: int
  bias: bool
  implementation: str
  precision: Precision

  @nn.compact
  def __call__(
    self, x: Array, columns: Columns | None, context: Context
  ) -> tuple[Array, Columns | None]:
    """f[B,T,D] and this layer's cached columns (or None) to f[B,T,D] and the columns after it."""
    project = lambda size, axis, name: Linear(
      (size, self.head_dim), ("embed", axis, "head"), self.bias, self.precision, name=name
    )
    q = project(self.heads, "heads", "query")(x)
    k = project(self.groups, "kv_heads", "key")(x)
    v = project(self.groups, "kv_heads", "value")(x)
    if context.rotation is not None:
      q, k = (rotate(y, context.rotation) for y in (q, k))
    if columns is not None:
      start = (0, context.length, 0, 0)
      k, v = (
        jax.lax.dynamic_update_slice(old, new.astype(old.dtype), start)
        for old, new in zip(columns, (k, v), strict=True)
      )
      columns = (k, v)
    y = attention(q, k, v, context.mask, plan=context.plan, implementation=self.implementation)
    out = Linear(x.shape[-1:], ("heads", "head", "embed"), self.bias, self.precision, name="out")
    return out(y), columns
