"""The backward TPU kernels: one writes the gradient of q, one those of k, v and the key bias.

Each output block is written by one run of consecutive steps, so nothing is added atomically and
equal inputs give equal gradients (arXiv:2307.08691, algorithm 2, with the loop over queries split
off). The dq kernel walks the pairs of the forward pass; the dkv kernel walks them by key block, all
heads of a group inside, and holds its blocks transposed, keys in rows: so what belongs to a query
is a row of lanes there and sums over queries are matrix products.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vlm_jax.core.typing import Array
from vlm_jax.ops.attention.pallas_tpu_forward import (
  MASKED,
  NN,
  NT,
  Call,
  Operands,
  cap,
  columns,
  each_chunk,
  forward_specs,
  lane_sums,
  logits_in_rows,
  matmul,
  of_its_kind,
  query_columns,
  spread,
  visible,
)
from vlm_jax.ops.attention.pallas_tpu_layout import (
  ENDS,
  LANES,
  STARTS,
  VMEM_BYTES,
)


def _logit_gradient(weights: Array, inner: Array, delta: Array, bent: Array | None) -> Array:
  """Of the natural logits before the soft cap. inner: gradient of the weights."""
  gradient = weights * (inner - delta)
  return gradient if bent is None else gradient * (1.0 - bent * bent)


def _dq_kernel(entries, operands: Operands, above, lse, delta, dq, acc, q_columns, lse_columns,
               delta_columns, *, call: Call):
  entry = entries[pl.program_id(1)]

  @pl.when((entry & STARTS) != 0)
  def start():
    acc[...] = jnp.zeros_like(acc)
    query_columns(operands.q_fields, q_columns)
    lse_columns[...] = columns(lse[...])
    delta_columns[...] = columns(delta[...])

  def step(masked: bool):
    @each_chunk(call.block_q)
    def chunk(queries):
      logits, bent = logits_in_rows(call, operands, q_columns, queries, entry, masked)
      weights = jnp.exp2(logits - spread(lse_columns[queries], call.block_k))
      inner = matmul(above[queries], operands.v[...], NT)
      delta = spread(delta_columns[queries], call.block_k)
      gradient = _logit_gradient(weights, inner, delta, bent)
      acc[queries] += matmul(gradient.astype(operands.k.dtype), operands.k[...], NN)

  of_its_kind(entry, step)

  @pl.when((entry & ENDS) != 0)
  def end():
    dq[...] = (acc[...] * call.scale).astype(dq.dtype)


def _dkv_kernel(entries, operands: Operands, above, lse, delta, dk, dv, dbias, acc_k, acc_v,
                acc_bias, bias, k_index, k_class, *, call: Call):
  entry = entries[pl.program_id(1)]
  head = pl.program_id(2)

  @pl.when(((entry & STARTS) != 0) & (head == 0))
  def start():
    acc_k[...] = jnp.zeros_like(acc_k)
    acc_v[...] = jnp.zeros_like(acc_v)
    for rows, turned in ((operands.k_bias, bias), (operands.k_index, k_index),
                         (operands.k_class, k_class)):
      if rows is not None:
        turned[...] = columns(rows[...])
    if operands.k_bias is not None:
      acc_bias[...] = jnp.zeros_like(acc_bias)

  def seen_in_columns(keys: pl.Slice) -> Array:
    """bool[chunk,bq]: by which queries of the block a chunk of keys is seen."""
    fields = [operands.q_fields[pl.ds(n, 1), :] for n in range(operands.q_fields.shape[0])]
    if k_index is None:
      first = call.by_key.run(entry) * call.block_k + keys.start
      index = first + lax.broadcasted_iota(jnp.int32, (keys.size, call.block_q), 0)
    else:
      index = spread(k_index[keys], call.block_q)
    lo, hi, q_class = (*fields, None)[:3]
    own = None if k_class is None else spread(k_class[keys], call.block_q)
    return visible(lo, hi, index, q_class, own)

  def step(masked: bool):
    @each_chunk(call.block_k)
    def chunk(keys):
      logits, bent = cap(matmul(operands.k[keys], operands.q[...], NT), call.soft_cap)
      if operands.k_bias is not None:
        logits += spread(bias[keys], call.block_q)
      if masked:
        logits = jnp.where(seen_in_columns(keys), logits, MASKED)
      weights = jnp.exp2(logits - lse[...])
      acc_v[keys] += matmul(weights.astype(above.dtype), above[...], NN)
      inner = matmul(operands.v[keys], above[...], NT)
      if operands.k_bias is not None:
        acc_bias[keys] += lane_sums(_logit_gradient(weights, inner, delta[...], None))
      gradient = _logit_gradient(weights, inner, delta[...], bent)
      acc_k[keys] += matmul(gradient.astype(operands.q.dtype), operands.q[...], NN)

  of_its_kind(entry, step)

  @pl.when(((entry & ENDS) != 0) & (head == call.heads // call.groups - 1))
  def end():
    # q came in times `fold`.
    dk[...] = (acc_k[...] * (call.scale / call.fold)).astype(dk.dtype)
    dv[...] = acc_v[...].astype(dv.dtype)
    if operands.k_bias is not None:
      dbias[...] = acc_bias[...]


def _cost(call: Call, itemsize: int, products: int, by_key: bool) -> pl.CostEstimate:
  pairs = call.active * call.block_q * call.block_k * call.heads
  written = call.groups * call.num_keys * 4 if by_key else call.heads * call.length * 3
  met = 2 * call.active * call.heads * (call.block_q if by_key else call.block_k)
  return pl.CostEstimate(
    flops=2 * products * pairs * call.width,
    transcendentals=pairs,
    bytes_accessed=itemsize * call.width * (call.batch * written + met),
  )


def backward_q(call: Call, operands: Operands, above, lse, delta, kinds: Array) -> Array:
  """The gradient of q f[B,H,T,C]; undefined in query blocks without an active pair.

  Args:
    above: gradient of the output f[B,H,T,C].
    lse: base-2 log-sum-exp f32[B,H,1,T], huge where a query sees nothing.
    delta: f32[B,H,1,T], of each query sum(above * out), less the gradient of its natural lse.
    kinds: i8[B,Q,K], of the plan.
  """
  pairs = call.by_query
  entries, steps = pairs.compact(kinds)
  specs = forward_specs(call, operands)
  row = pl.BlockSpec(
    (None, None, 1, call.block_q),
    lambda head, step, entries: (pairs.row(entries[step]), head, 0, pairs.run(entries[step])))
  return pl.pallas_call(
    functools.partial(_dq_kernel, call=call),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(call.heads, steps),
      in_specs=[specs, specs.q, row, row],
      out_specs=specs.q,
      scratch_shapes=[
        pltpu.VMEM((call.block_q, call.width), jnp.float32),
        pltpu.VMEM((operands.q_fields.shape[1], call.block_q, LANES), jnp.int32),
        pltpu.VMEM((call.block_q, LANES), jnp.float32),
        pltpu.VMEM((call.block_q, LANES), jnp.float32),
      ],
    ),
    out_shape=jax.ShapeDtypeStruct(operands.q.shape, operands.q.dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES),
    cost_estimate=_cost(call, operands.q.dtype.itemsize, 3, by_key=False),
    interpret=call.interpret,
    name="interval_attention_dq",
  )(entries, operands, above, lse, delta)


def _backward_specs(call: Call, operands: Operands) -> tuple[Operands, pl.BlockSpec]:
  """BlockSpecs on a grid (G, pairs, H / G) with `Call.by_key`, and that of lse and delta."""
  pairs, repeats = call.by_key, np.int32(call.heads // call.groups)

  def query(group, step, head, entries):
    entry = entries[step]
    return pairs.row(entry), group * repeats + head, pairs.member(entry), 0

  def key(group, step, head, entries):
    return pairs.row(entries[step]), group, pairs.run(entries[step]), 0

  def lanes(group, step, head, entries):
    entry = entries[step]
    return pairs.row(entry), group * repeats + head, 0, pairs.member(entry)

  q_field = lambda group, step, head, entries: (
    pairs.row(entries[step]), 0, pairs.member(entries[step]))
  k_field = lambda group, step, head, entries: (
    pairs.row(entries[step]), 0, pairs.run(entries[step]))
  maybe = lambda field: None if field is None else pl.BlockSpec((None, 1, call.block_k), k_field)
  specs = Operands(
    q=pl.BlockSpec((None, None, call.block_q, call.width), query),
    k=pl.BlockSpec((None, None, call.block_k, call.width), key),
    v=pl.BlockSpec((None, None, call.block_k, call.width), key),
    q_fields=pl.BlockSpec((None, operands.q_fields.shape[1], call.block_q), q_field),
    k_index=maybe(operands.k_index),
    k_class=maybe(operands.k_class),
    k_bias=maybe(operands.k_bias),
  )
  return specs, pl.BlockSpec((None, None, 1, call.block_q), lanes)


def backward_kv(call: Call, operands: Operands, above, lse, delta, kinds: Array):
  """The gradients of k, v f[B,G,S,C] and of the key bias f32[B,G,S,LANES], summed over the last.

  All are undefined in key blocks without an active pair; the last is None without a key bias. See
  `backward_q` for the arguments.
  """
  entries, steps = call.by_key.compact(kinds.swapaxes(1, 2))
  specs, row = _backward_specs(call, operands)
  biased = operands.k_bias is not None
  lanes = pltpu.VMEM((call.block_k, LANES), jnp.float32)
  column = pltpu.VMEM((call.block_k, LANES), jnp.int32)
  gradient = jax.ShapeDtypeStruct(operands.k.shape, operands.k.dtype)
  dbias = jax.ShapeDtypeStruct((*operands.k.shape[:3], LANES), jnp.float32) if biased else None
  bias_spec = pl.BlockSpec((None, None, call.block_k, LANES), specs.k.index_map) if biased else None
  return pl.pallas_call(
    functools.partial(_dkv_kernel, call=call),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(call.groups, steps, call.heads // call.groups),
      in_specs=[specs, specs.q, row, row],
      out_specs=(specs.k, specs.k, bias_spec),
      scratch_shapes=[
        pltpu.VMEM((call.block_k, call.width), jnp.float32),
        pltpu.VMEM((call.block_k, call.width), jnp.float32),
        lanes if biased else None,
        lanes if biased else None,
        column if operands.k_index is not None else None,
        column if operands.k_class is not None else None,
      ],
    ),
    out_shape=(gradient, gradient, dbias),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES),
    cost_estimate=_cost(call, operands.q.dtype.itemsize, 4, by_key=True),
    interpret=call.interpret,
    name="interval_attention_dkv",
  )(entries, operands, above, lse, delta)
