"""Attention on a TPU by kernels of our own (Pallas, Mosaic), forward and backward, for every mask.

Compiled for v5e, v5p and v6e, never run on a chip; what is computed is proven in interpret mode.

The grid walks the plan's active blocks only (pallas_tpu_layout); the mask is computed in the kernel
from two or three int32 per token, and only in partial blocks. The heads of a group share its keys
and values, nothing is repeated.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.core.mask import NEVER, IntervalMask
from vlm_jax.core.typing import Array
from vlm_jax.ops.attention.pallas_tpu_backward import backward_kv, backward_q
from vlm_jax.ops.attention.pallas_tpu_forward import LOG2E, Call, Operands, forward
from vlm_jax.ops.attention.pallas_tpu_layout import (
  LANES,
  SMEM_BYTES,
  SPARE,
  VMEM_BYTES,
  Pairs,
  block_sizes,
  smem_bytes,
  vmem_bytes,
)
from vlm_jax.ops.attention.plan import AttentionPlan
from vlm_jax.ops.attention.request import Request

__all__ = ["attend", "block_sizes", "declines", "smem_bytes", "vmem_bytes"]

# Instead of -inf for queries that see nothing: their weights, exp2(MASKED - this), are exactly 0.
ABOVE_ALL = 2.0**126


def declines(request: Request) -> str | None:
  """Why this call, of one device's rows, cannot run here; or None."""
  if request.platform != "tpu":
    return f"it runs on a TPU, and this is '{request.platform}'"
  if request.has_bias:
    return "it cannot add a bias of T x S to the logits; a key bias it can"
  plan = request.plan
  if plan is None:
    return "it needs an AttentionPlan and none was made"
  if plan.block_q % LANES or plan.block_k % LANES:
    return (f"it needs blocks that are multiples of {LANES} and the plan has {plan.block_q} x "
            f"{plan.block_k}: make it with pallas_tpu.block_sizes")
  dtype = jnp.dtype(request.dtype)
  if dtype not in (jnp.float32, jnp.bfloat16):
    return f"it computes in float32 and bfloat16, not in {dtype.name}"
  batch, length, _, width = request.q_shape
  blocks_q, blocks_k = -(-length // plan.block_q), -(-request.k_shape[1] // plan.block_k)
  if plan.kinds.shape != (batch, blocks_q, blocks_k):
    return (f"the plan is of {plan.kinds.shape} blocks, and these arrays have "
            f"{(batch, blocks_q, blocks_k)}")
  if width > 256:
    return f"heads of width {width} are wider than 256"
  needed = smem_bytes(batch, blocks_q, blocks_k)
  if needed > SPARE * SMEM_BYTES or not Pairs(blocks_q, blocks_k).fits(batch):
    return (f"{batch} rows of {blocks_q} x {blocks_k} blocks take {needed} bytes of scalar memory, "
            f"more than {int(SPARE * SMEM_BYTES)}: use fewer rows a device or larger blocks")
  needed = vmem_bytes(plan.block_q, plan.block_k, width, dtype)
  if needed > SPARE * VMEM_BYTES:
    return (f"blocks of {plan.block_q} x {plan.block_k} take {needed} bytes of vector memory, more "
            f"than {int(SPARE * VMEM_BYTES)}: make the plan with pallas_tpu.block_sizes")
  return None


def attend(
  q: Array,
  k: Array,
  v: Array,
  mask: IntervalMask,
  plan: AttentionPlan,
  *,
  scale: float,
  soft_cap: float | None = None,
  bias: None = None,
  k_bias: Array | None = None,
  interpret=False,
) -> tuple[Array, Array]:
  """softmax(soft_cap * tanh(scale * q k^T / soft_cap) + k_bias under the mask) v, and its lse.

  Args:
    q: f[B,T,H,C], f32 or bf16.
    k, v: f[B,S,G,C] with H a multiple of G.
    mask: fields [B,T] and [B,S].
    plan: `make_plan` of this mask; its blocks are multiples of 128, see `block_sizes`.
    scale: of the logits.
    soft_cap: None leaves the logits as they are.
    bias: None; `declines` refuses others.
    k_bias: f[B,S] or None, added to the logits of a key.
    interpret: True or `pltpu.InterpretParams` runs the kernels without a TPU, for tests.

  Returns:
    out f[B,T,H,C] in q's dtype and lse f32[B,T,H], the natural log-sum-exp of the logits that a
    query sees. A query that sees nothing has out 0, lse -inf and gradients 0. Gradients flow
    through both, to q, k, v and k_bias, and are bitwise repeatable.
  """
  assert bias is None, "see declines"
  call = _call(q, k, plan, scale, soft_cap, interpret)
  return _attend(q, k, v, k_bias, mask, plan, call)


def _call(q, k, plan, scale, soft_cap, interpret) -> Call:
  # The compiler schedules around a kernel by its cost, a constant. A plan made in the same program
  # has no counts yet; all its blocks are an upper bound then, and too long only means that more is
  # scheduled to overlap the kernel than it can hide. A known count is rounded up to a power of two:
  # outside `jax.jit` every other cost is another compilation.
  active = plan.kinds.size
  if not isinstance(plan.kinds, jax.core.Tracer) and plan.kinds.is_fully_addressable:
    active = min(active, 2 ** int(np.count_nonzero(np.asarray(plan.kinds))).bit_length())
  up = lambda n, block: -(-n // block) * block
  return Call(
    batch=q.shape[0],
    heads=q.shape[2],
    groups=k.shape[2],
    length=up(q.shape[1], plan.block_q),
    num_keys=up(k.shape[1], plan.block_k),
    # Lanes are not shared by rows: in memory a head of 72 is as wide as one of 128.
    width=up(q.shape[3], LANES),
    block_q=plan.block_q,
    block_k=plan.block_k,
    scale=scale,
    soft_cap=soft_cap,
    active=active,
    interpret=interpret,
  )


def _heads_first(x: Array, length: int, width: int) -> Array:
  """f[B,n,H,c] to f[B,H,length,width], padded with zeros."""
  x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, width - x.shape[3])))
  return x.transpose(0, 2, 1, 3)


def _heads_last(x: Array, shape: tuple[int, ...]) -> Array:
  """The inverse of `_heads_first`, cut to `shape` [B,n,H,c]."""
  return x.transpose(0, 2, 1, 3)[:, : shape[1], :, : shape[3]]


def _in_runs(x: Array, active: Array, block: int, otherwise=0) -> Array:
  """f[B,H,n,...] with `otherwise` in the blocks (bool[B,n / block]) that no kernel step wrote."""
  written = jnp.repeat(active, block, axis=1)[:, None]
  return jnp.where(written.reshape(written.shape + (1,) * (x.ndim - 3)), x, otherwise)


def _operands(call: Call, q, k, v, k_bias, mask: IntervalMask) -> Operands:
  more_q, more_k = call.length - q.shape[1], call.num_keys - k.shape[1]
  row = lambda x, more, value: None if x is None else jnp.pad(
    x, ((0, 0), (0, more)), constant_values=value)[:, None]
  # Without k_index padded keys count on from S, and nobody may see that far.
  hi = mask.hi if mask.k_index is not None else jnp.minimum(mask.hi, k.shape[1])
  classes = mask.q_class is not None and mask.k_class is not None
  fields = [mask.lo, hi] + ([mask.q_class] if classes else [])
  fold = lambda x: (x.astype(jnp.float32) * call.fold).astype(x.dtype)
  return Operands(
    q=_heads_first(fold(q), call.length, call.width),
    k=_heads_first(k, call.num_keys, call.width),
    v=_heads_first(v, call.num_keys, call.width),
    q_fields=jnp.concatenate([row(x, more_q, 0) for x in fields], axis=1),
    k_index=row(mask.k_index, more_k, NEVER),
    k_class=row(mask.k_class, more_k, 0) if classes else None,
    k_bias=row(None if k_bias is None else k_bias.astype(jnp.float32) * LOG2E, more_k, 0.0),
  )


def _forward(q, k, v, k_bias, mask, plan, call: Call):
  """The padded output f[B,H,T,C] and base-2 log-sum-exp f32[B,H,1,T], every value defined."""
  out, lse = forward(call, _operands(call, q, k, v, k_bias, mask), plan.kinds)
  active = plan.k_count > 0
  lse = _in_runs(lse[:, :, 0], active, call.block_q, -jnp.inf)[:, :, None]
  return _in_runs(out, active, call.block_q), lse


def _results(out, lse, shape):
  natural = (lse / LOG2E).swapaxes(2, 3)  # f32[B,H,T,1]
  return _heads_last(out, shape), _heads_last(natural, (*shape[:3], 1))[..., 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, k_bias, mask: IntervalMask, plan: AttentionPlan, call: Call):
  return _results(*_forward(q, k, v, k_bias, mask, plan, call), q.shape)


def _attend_forward(q, k, v, k_bias, mask, plan, call):
  out, lse = _forward(q, k, v, k_bias, mask, plan, call)
  return _results(out, lse, q.shape), (q, k, v, k_bias, mask, plan, out, lse)


def _attend_backward(call, residuals, gradients):
  q, k, v, k_bias, mask, plan, out, lse = residuals
  above, above_lse = gradients
  operands = _operands(call, q, k, v, k_bias, mask)
  above = _heads_first(above.astype(q.dtype), call.length, call.width)
  above_lse = _heads_first(above_lse[..., None], call.length, 1).swapaxes(2, 3)
  delta = (above.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)[:, :, None] - above_lse
  seen = lse > -jnp.inf
  # A query without keys may come with an undefined gradient of its lse; it has no influence.
  lse, delta = jnp.where(seen, lse, ABOVE_ALL), jnp.where(seen, delta, 0.0)
  dq = backward_q(call, operands, above, lse, delta, plan.kinds)
  dk, dv, dbias = backward_kv(call, operands, above, lse, delta, plan.kinds)
  met = plan.q_count > 0
  if k_bias is not None:
    dbias = _in_runs(dbias.sum(-1), met, call.block_k).sum(1)
    dbias = dbias[:, : k_bias.shape[1]].astype(k_bias.dtype)
  dq = _heads_last(_in_runs(dq, plan.k_count > 0, call.block_q), q.shape)
  dk, dv = (_heads_last(_in_runs(x, met, call.block_k), k.shape) for x in (dk, dv))
  return dq, dk, dv, dbias, None, None


_attend.defvjp(_attend_forward, _attend_backward)
