"""JAX's own splash attention kernel for TPUs, with an interval for each query.

Compiled for v5e, v5p and v6e, never run on a chip; what is computed is proven in interpret mode.

The stock kernel evaluates a mask function of the key's index and one int32 of the query; here that
int32 is lo << 16 | hi. Its block mask comes from the plan, so no T x S array is made. It loops over
the rows of the batch and steps over empty blocks, which pallas_tpu does not: it is kept as the
second opinion on the same chip, made by other hands.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as stock
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.typing import Array
from vlm_jax.ops.attention.plan import EMPTY, AttentionPlan
from vlm_jax.ops.attention.request import Request

LANES = 128
MASKED = -1e30
LONGEST = 2**15 - 1  # lo in 15 bits, so that the packed integer stays positive


def declines(request: Request) -> str | None:
  """Why this call cannot run here, or None."""
  plan = request.plan
  for refused, reason in (
    (request.platform != "tpu", f"it runs on a TPU, and this is '{request.platform}'"),
    (plan is None, "it needs an AttentionPlan and none was made"),
    (request.has_classes, "it has one int32 for a query, which the interval fills: no classes"),
    (request.has_k_index, "it counts keys where they stand: no k_index"),
    (request.has_bias or request.has_k_bias, "it cannot add a bias to the logits"),
    (request.k_shape[1] > LONGEST, f"it packs lo and hi in 16 bits: at most {LONGEST} keys"),
  ):
    if refused:
      return reason
  if plan.block_q % LANES or plan.block_k % LANES:
    return f"it needs blocks that are multiples of {LANES}, not {plan.block_q} x {plan.block_k}"
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
  k_bias: None = None,
  interpret: bool = False,
) -> tuple[Array, Array]:
  """Softmax attention under an interval mask, and its log-sum-exp.

  Args:
    q: f[B,T,H,C].
    k, v: f[B,S,G,C] with H a multiple of G and S below 2 ** 15.
    mask: lo and hi [B,T]; no classes, no k_index.
    plan: `make_plan` of this mask.
    scale, soft_cap: logits are soft_cap * tanh(scale * q k^T / soft_cap).
    bias, k_bias: None; `declines` refuses others.
    interpret: True runs without a TPU, for tests.

  Returns:
    out f[B,T,H,C] in q's dtype and lse f32[B,T,H]; 0 and -inf where a query sees nothing.
    Gradients flow through both.
  """
  assert bias is None and k_bias is None, "see declines"
  length, num_keys = q.shape[1], k.shape[1]
  more_q, more_k = -length % plan.block_q, -num_keys % plan.block_k
  first = lambda x, more: jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))).swapaxes(1, 2)
  lo, hi = (jnp.clip(x, 0, num_keys) for x in (mask.lo, mask.hi))
  code = jnp.pad((lo << 16) | hi, ((0, 0), (0, more_q)))  # 0: lo = hi = 0 sees nothing
  q = first((q.astype(jnp.float32) * scale).astype(q.dtype), more_q)
  options = (plan.block_q, plan.block_k, soft_cap, interpret)
  out, lse = _attend(q, first(k, more_k), first(v, more_k), code, plan.kinds, options)
  return out.swapaxes(1, 2)[:, :length], lse.swapaxes(1, 2)[:, :length]


def _interval(code: Array, index: Array) -> Array:
  return ((code >> 16) <= index) & (index < (code & 0xFFFF))


def _info(kinds: Array, code: Array, axis: int) -> info.MaskInfo:
  """The stock kernel's description of one row's mask; axis 1 walks along keys, 0 along queries."""
  kinds = kinds.astype(jnp.int32)[None]  # its 0, 1, 2 are our EMPTY, PARTIAL, FULL
  index = lax.broadcasted_iota(jnp.int32, kinds.shape, 1 + axis)
  return info.MaskInfo(jnp.where(kinds != EMPTY, index, 0), None, kinds, None, code, None)


def _forward(q, k, v, code, kinds, options):
  block_q, block_k, soft_cap, interpret = options
  sizes = stock.BlockSizes(block_q=block_q, block_kv=block_k, block_kv_compute=block_k)

  def row(args):
    q, k, v, code, kinds = args
    out, (lse,) = stock._splash_attention_forward(
      _info(kinds, code, 1), q, k, v, None, None, mask_value=MASKED, is_mqa=False,
      block_sizes=sizes, residual_checkpoint_name=None, save_residuals=True,
      mask_function=_interval, attn_logits_soft_cap=soft_cap, interpret=interpret)
    return out, lse

  out, lse = lax.map(row, (q, k, v, code, kinds))
  seen = lse > MASKED / 2
  return jnp.where(seen[..., None], out, 0), jnp.where(seen, lse, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, code, kinds, options):
  """q f[B,H,T,C], k and v f[B,G,S,C], code i32[B,T], kinds of the plan; out and lse f32[B,H,T]."""
  return _forward(q, k, v, code, kinds, options)


def _attend_forward(q, k, v, code, kinds, options):
  out, lse = _forward(q, k, v, code, kinds, options)
  return (out, lse), (q, k, v, code, kinds, out, lse)


def _attend_backward(options, residuals, gradients):
  """The stock backward kernels; called one by one, they take the gradient of lse with delta."""
  block_q, block_k, soft_cap, interpret = options
  q, k, v, code, kinds, out, lse = residuals
  above, above_lse = gradients
  seen = lse > -jnp.inf
  delta = (out.astype(jnp.float32) * above.astype(jnp.float32)).sum(-1) - above_lse
  delta, lse = jnp.where(seen, delta, 0.0), jnp.where(seen, lse, -MASKED)
  layout = stock.QKVLayout.HEAD_DIM_MINOR
  common = dict(
    bq=block_q, bkv=block_k, is_mqa=False, mask_value=MASKED, attn_logits_soft_cap=soft_cap,
    q_layout=layout, k_layout=layout, v_layout=layout, mask_function=_interval,
    interpret=interpret)

  def row(args):
    q, k, v, code, kinds, above, lse, delta = args
    arrays = (q, k, v, None, None, lse, above, delta)
    _, dk, dv = stock._splash_attention_bwd_dkv(
      *arrays, mask_info=_info(kinds, code, 0), bkv_compute=block_k, use_fused_bwd_kernel=False,
      **common)
    dq = stock._splash_attention_bwd_dq(*arrays, mask_info=_info(kinds, code, 1), **common)
    return dq, dk, dv

  dq, dk, dv = lax.map(row, (q, k, v, code, kinds, above.astype(q.dtype), lse, delta))
  return dq, dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)
