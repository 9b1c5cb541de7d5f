"""Self- and cross-attention with grouped queries, rotary positions or none, and cached keys."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array
from vlm_jax.nn.linear import Linear
from vlm_jax.nn.norms import qk_norm
from vlm_jax.ops.attention import AttentionPlan, Bias, attention, block_sizes, make_plan, platform
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
    bias: of the logits by relative position, see `ops.attention`, or None.
  """

  mask: IntervalMask
  plan: AttentionPlan
  rotation: Rotation | None = None
  length: Array | None = None
  bias: Bias | None = None


def make_context(
  mask: IntervalMask,
  rotation: Rotation | None,
  blocks: tuple[int, int],
  columns: int | None = None,
  length: Array | None = None,
  *,
  keys: int | None = None,
  bias: Bias | None = None,
  sharing: int = 1,
  width: int = 128,
  dtype: jnp.dtype = jnp.bfloat16,
) -> Context:
  """Plans the mask once for all layers.

  Args:
    mask: query fields i32[B,T].
    rotation: see `ops.rope.rotation`, or None.
    blocks: block sizes of queries and keys; 0: what suits their number and the platform.
    columns: S, the columns of the cache, None without one.
    length: i32[], columns written so far.
    keys: S of another stream that is read (cross-attention), None for the queries' own.
    bias: see `Context`.
    sharing, width, dtype: query heads of a group H // G, C, and the dtype that is computed in; of
      use where the block sizes are 0.

  Raises:
    ValueError: a cache with a mask that does not say which key is in which column.
  """
  if keys is None:
    keys = mask.num_queries if columns is None else columns
  if columns is not None and (mask.k_index is None or mask.k_index.shape[-1] != columns):
    got = None if mask.k_index is None else mask.k_index.shape
    raise ValueError(f"with a cache of {columns} columns mask.k_index must be i32[B,{columns}] "
                     f"(core.mask.NEVER in columns nobody sees), got {got}")
  suited = block_sizes(mask.num_queries, keys, platform(), sharing=sharing, width=width,
                       dtype=dtype)
  block_q, block_k = (given or own for given, own in zip(blocks, suited, strict=True))
  plan = make_plan(mask, keys, block_q=block_q, block_k=block_k)
  return Context(mask, plan, rotation, length, bias)


class Projections(nn.Module):
  """What both kinds of attention have: four projections, and the product between them.

  Attributes:
    heads, groups: H query heads share G key/value groups, H a multiple of G.
    head_dim: C.
    bias: whether queries, keys and values have biases.
    implementation: see `ops.attention`.
    precision: dtypes.
    qk_norm: how queries and keys are normalised before they turn, a name of `norms.QK_NORMS`; None:
      not at all.
    qk_norm_eps: of that norm.
    out_bias: whether the last projection has a bias, None: as the other three.
    scale, soft_cap: of the logits, see `ops.attention`.
  """

  heads: int
  groups: int
  head_dim: int
  bias: bool
  implementation: str
  precision: Precision
  qk_norm: str | None = None
  qk_norm_eps: float = 1e-6
  out_bias: bool | None = None
  scale: float | None = None
  soft_cap: float | None = None

  def _query(self, x: Array) -> Array:
    return self._normed(self._project(x, self.heads, "heads", "query"), "query_norm")

  def _keys_and_values(self, x: Array) -> Columns:
    project = lambda name: self._project(x, self.groups, "kv_heads", name)
    return self._normed(project("key"), "key_norm"), project("value")

  def _normed(self, x: Array, name: str) -> Array:
    if self.qk_norm is None:
      return x
    return qk_norm(self.qk_norm, self.qk_norm_eps, self.precision, name)(x)

  def _project(self, x: Array, size: int, axis: str, name: str) -> Array:
    shape, axes = (size, self.head_dim), ("embed", axis, "head")
    return Linear(shape, axes, self.bias, self.precision, name=name)(x)

  def _attend(self, q: Array, k: Array, v: Array, context: Context, width: int) -> Array:
    y = attention(q, k, v, context.mask, plan=context.plan, bias=context.bias,
                  scale=self.scale, soft_cap=self.soft_cap, implementation=self.implementation)
    axes, biased = ("heads", "head", "embed"), self.bias if self.out_bias is None else self.out_bias
    return Linear((width,), axes, biased, self.precision, name="out")(y)


class Attention(Projections):
  """softmax(q k^T + bias) v of a stream with itself; attributes as `Projections`."""

  @nn.compact
  def __call__(
    self, x: Array, columns: Columns | None, context: Context
  ) -> tuple[Array, Columns | None]:
    """f[B,T,D] and this layer's cached columns (or None) to f[B,T,D] and the columns after it."""
    q = self._query(x)
    k, v = self._keys_and_values(x)
    if context.rotation is not None:
      q, k = (rotate(y, context.rotation) for y in (q, k))
    if columns is not None:
      start = (0, context.length, 0, 0)
      k, v = (
        jax.lax.dynamic_update_slice(old, new.astype(old.dtype), start)
        for old, new in zip(columns, (k, v), strict=True)
      )
      columns = (k, v)
    return self._attend(q, k, v, context, x.shape[-1]), columns


class CrossAttention(Projections):
  """softmax(q k^T) v of a stream with the slots of another one; attributes as `Projections`.

  The other stream does not grow, so its keys and values are made once and kept.
  """

  @nn.compact
  def __call__(
    self, x: Array, memory: Array | None, columns: Columns | None, context: Context
  ) -> tuple[Array, Columns]:
    """Reads another stream.

    Args:
      x: f[B,T,D].
      memory: f[B,S,D'], the other stream; None: `columns` has its keys and values.
      columns: what an earlier call returned.
      context: the mask of T queries and S keys.

    Returns:
      f[B,T,D], and the keys and values f[B,S,G,C].
    """
    if memory is not None:
      columns = self._keys_and_values(memory)
    return self._attend(self._query(x), *columns, context, x.shape[-1]), columns
