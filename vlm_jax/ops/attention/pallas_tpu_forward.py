"""The forward TPU kernel: online softmax over the active pairs (arXiv:2307.08691, algorithm 1).

Exponents are base 2: scale * log2(e) is folded into q before the kernel, so a logit costs no
multiplication. A step takes `chunk` queries at a time against the whole key block, so that the
vector unit works on one chunk while the matrix unit works on the next.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vlm_jax.core.typing import Array
from vlm_jax.ops.attention.pallas_tpu_layout import (
  ENDS,
  LANES,
  STARTS,
  VMEM_BYTES,
  WHOLE,
  Pairs,
  chunk_of,
)

MASKED = -2.0**126  # finite: a query that has seen nothing yet must not subtract infinities
LOG2E = 1.4426950408889634
NT = (((1,), (1,)), ((), ()))  # a b^T
NN = (((1,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Call:
  """What is static about a call; sizes are padded.

  Attributes:
    batch, heads, groups, length, num_keys, width: B, H, G, T, S, C.
    block_q, block_k: of the plan.
    scale: of the logits.
    soft_cap: logits become soft_cap * tanh(logits / soft_cap); None: they do not.
    active: active blocks of the plan, or all where their number is only known on the device.
    interpret: False, True, or the parameters of the TPU interpreter.
  """

  batch: int
  heads: int
  groups: int
  length: int
  num_keys: int
  width: int
  block_q: int
  block_k: int
  scale: float
  soft_cap: float | None
  active: int
  interpret: object

  @property
  def blocks_q(self) -> int:
    return self.length // self.block_q

  @property
  def blocks_k(self) -> int:
    return self.num_keys // self.block_k

  @property
  def by_query(self) -> Pairs:
    return Pairs(self.blocks_q, self.blocks_k)

  @property
  def by_key(self) -> Pairs:
    return Pairs(self.blocks_k, self.blocks_q)

  @property
  def fold(self) -> float:
    """What q is multiplied with before the kernels."""
    return self.scale * LOG2E if self.soft_cap is None else self.scale / self.soft_cap


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
  """Padded arrays; None is static, the kernel then has no code for it.

  Attributes:
    q: f[B,H,T,C], times `Call.fold`.
    k, v: f[B,G,S,C].
    q_fields: i32[B,2 or 3,T]: lo, hi and, with classes, q_class.
    k_index, k_class: i32[B,1,S] or None.
    k_bias: f32[B,1,S], times log2(e), or None.
  """

  q: Array
  k: Array
  v: Array
  q_fields: Array
  k_index: Array | None
  k_class: Array | None
  k_bias: Array | None


def matmul(a: Array, b: Array, dims) -> Array:
  """a times b in f32; f32 inputs are not rounded to bf16."""
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def cap(logits: Array, soft_cap: float | None) -> tuple[Array, Array | None]:
  """The base-2 logits, and the tanh that the backward pass needs."""
  if soft_cap is None:
    return logits, None
  bent = jnp.tanh(logits)
  return bent * (soft_cap * LOG2E), bent


def visible(lo, hi, index, q_class, k_class) -> Array:
  """The rule of `IntervalMask`; arguments broadcast to one shape, classes may be None."""
  seen = (lo <= index) & (index < hi)
  if k_class is not None:
    # min(|a|, |b|) == 0 says "one of them is class 0" with one comparison for each pair.
    either = jnp.minimum(jnp.abs(q_class), jnp.abs(k_class)) == 0
    seen &= (q_class == k_class) | either
  return seen


def columns(row: Array) -> Array:
  """[1,n] in lanes to [n,LANES], each value in all lanes of its row."""
  return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def spread(x: Array, lanes: int) -> Array:
  """[n,LANES] of equal lanes to [n,lanes]."""
  return jnp.tile(x, (1, -(-lanes // LANES)))[:, :lanes]


def each_chunk(block: int):
  """Decorator: calls a function with the slice of each chunk of a block, unrolled."""
  size = chunk_of(block)

  def unroll(body):
    for start in range(0, block, size):
      body(pl.ds(start, size))

  return unroll


def forward_specs(call: Call, operands: Operands) -> Operands:
  """BlockSpecs of the operands on a grid (H, pairs) with `Call.by_query`."""
  pairs, repeats = call.by_query, np.int32(call.heads // call.groups)

  def query(head, step, entries):
    return pairs.row(entries[step]), head, pairs.run(entries[step]), 0

  def key(head, step, entries):
    return pairs.row(entries[step]), lax.div(head, repeats), pairs.member(entries[step]), 0

  q_field = lambda head, step, entries: (pairs.row(entries[step]), 0, pairs.run(entries[step]))
  k_field = lambda head, step, entries: (pairs.row(entries[step]), 0, pairs.member(entries[step]))
  maybe = lambda field, spec: None if field is None else spec
  k_row = pl.BlockSpec((None, 1, call.block_k), k_field)
  return Operands(
    q=pl.BlockSpec((None, None, call.block_q, call.width), query),
    k=pl.BlockSpec((None, None, call.block_k, call.width), key),
    v=pl.BlockSpec((None, None, call.block_k, call.width), key),
    q_fields=pl.BlockSpec((None, operands.q_fields.shape[1], call.block_q), q_field),
    k_index=maybe(operands.k_index, k_row),
    k_class=maybe(operands.k_class, k_row),
    k_bias=maybe(operands.k_bias, k_row),
  )


def query_columns(q_fields, scratch) -> None:
  """Writes lo, hi (and q_class) of a new run's queries to scratch i32[2 or 3,bq,LANES]."""
  for field in range(q_fields.shape[0]):
    scratch[field] = columns(q_fields[pl.ds(field, 1), :])


def seen_in_rows(operands: Operands, q_columns, queries: pl.Slice, key_start: Array) -> Array:
  """bool[chunk,bk]: what a chunk of queries of this block sees of the key block."""
  width = operands.k.shape[0]
  fields = [spread(q_columns[field, queries], width) for field in range(q_columns.shape[0])]
  if operands.k_index is None:
    index = key_start + lax.broadcasted_iota(jnp.int32, (1, width), 1)
  else:
    index = operands.k_index[...]
  q_class, k_class = (fields[2], operands.k_class[...]) if len(fields) == 3 else (None, None)
  return visible(fields[0], fields[1], index, q_class, k_class)


def logits_in_rows(call: Call, operands: Operands, q_columns, queries: pl.Slice, entry: Array,
                   masked: bool) -> tuple[Array, Array | None]:
  """Base-2 logits f32[chunk,bk] of a chunk of queries, MASKED where unseen, and `cap`'s tanh."""
  logits, bent = cap(matmul(operands.q[queries], operands.k[...], NT), call.soft_cap)
  if operands.k_bias is not None:
    logits += operands.k_bias[...]
  if masked:
    key_start = call.by_query.member(entry) * call.block_k
    seen = seen_in_rows(operands, q_columns, queries, key_start)
    logits = jnp.where(seen, logits, MASKED)
  return logits, bent


def of_its_kind(entry: Array, step: Callable[[bool], None]) -> None:
  """Runs step(masked) for a pair of blocks: without the mask where every query sees every key."""
  pl.when((entry & WHOLE) != 0)(lambda: step(False))
  pl.when((entry & WHOLE) == 0)(lambda: step(True))


def _kernel(entries, operands: Operands, out, lse, top, total, acc, q_columns, *, call: Call):
  entry = entries[pl.program_id(1)]

  @pl.when((entry & STARTS) != 0)
  def start():
    top[...] = jnp.full_like(top, MASKED)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)
    query_columns(operands.q_fields, q_columns)

  def step(masked: bool):
    @each_chunk(call.block_q)
    def chunk(queries):
      logits, _ = logits_in_rows(call, operands, q_columns, queries, entry, masked)
      before = top[queries]
      after = jnp.maximum(before, logits.max(1, keepdims=True))
      # A query that has seen nothing so far gets weights 1 here; the first key it does see, if any,
      # shrinks them to exactly 0, and if none comes `end` drops them.
      weights = jnp.exp2(logits - spread(after, call.block_k))
      shrink = jnp.exp2(before - after)
      # Sums stay spread over the lanes until the end of the run.
      total[queries] = shrink * total[queries] + lane_sums(weights)
      top[queries] = after
      add = matmul(weights.astype(operands.v.dtype), operands.v[...], NN)
      acc[queries] = spread(shrink, call.width) * acc[queries] + add

  of_its_kind(entry, step)

  @pl.when((entry & ENDS) != 0)
  def end():
    share = total[...].sum(1, keepdims=True)
    seen = top[...] > MASKED / 2
    out[...] = (acc[...] * spread(jnp.where(seen, 1 / share, 0.0), call.width)).astype(out.dtype)
    lse[...] = jnp.where(seen, top[...] + jnp.log2(share), -jnp.inf).T[:1]


def lane_sums(x: Array) -> Array:
  """f32[n,m * LANES] to f32[n,LANES], without crossing lanes."""
  return sum(x[:, start:start + LANES] for start in range(LANES, x.shape[1], LANES)) + x[:, :LANES]


def forward(call: Call, operands: Operands, kinds: Array) -> tuple[Array, Array]:
  """The output f[B,H,T,C] and the base-2 log-sum-exp f32[B,H,1,T].

  Both are undefined in query blocks without an active pair; -inf in lse where a query of another
  block sees nothing.
  """
  pairs = call.by_query
  entries, steps = pairs.compact(kinds)
  q_row = lambda head, step, entries: (
    pairs.row(entries[step]), head, 0, pairs.run(entries[step]))
  specs = forward_specs(call, operands)
  pairs_seen = call.active * call.block_q * call.block_k * call.heads
  return pl.pallas_call(
    functools.partial(_kernel, call=call),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(call.heads, steps),
      in_specs=[specs],
      out_specs=[specs.q, pl.BlockSpec((None, None, 1, call.block_q), q_row)],
      scratch_shapes=[
        pltpu.VMEM((call.block_q, LANES), jnp.float32),
        pltpu.VMEM((call.block_q, LANES), jnp.float32),
        pltpu.VMEM((call.block_q, call.width), jnp.float32),
        pltpu.VMEM((operands.q_fields.shape[1], call.block_q, LANES), jnp.int32),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct(operands.q.shape, operands.q.dtype),
      jax.ShapeDtypeStruct((call.batch, call.heads, 1, call.length), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES),
    cost_estimate=pl.CostEstimate(
      flops=4 * pairs_seen * call.width,
      transcendentals=pairs_seen,
      bytes_accessed=operands.q.dtype.itemsize * call.width * call.heads * (
        2 * call.batch * call.length + 2 * call.active * call.block_k),
    ),
    interpret=call.interpret,
    name="interval_attention_forward",
  )(entries, operands)
