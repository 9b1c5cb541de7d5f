"""What `attention` refuses, in one sentence each: at trace time, or with the data in debug mode."""

import jax.numpy as jnp
from jax.experimental import checkify

from vlm_jax.core.mask import NEVER, IntervalMask
from vlm_jax.core.typing import Array
from vlm_jax.ops.attention.bias import Bias, DistanceBias
from vlm_jax.ops.attention.plan import AttentionPlan

FIELDS = ("lo", "hi", "q_class", "k_class", "k_index")


def shapes(q: Array, k: Array, v: Array, mask: IntervalMask, plan: AttentionPlan | None = None,
           bias: Bias | None = None, k_bias: Array | None = None) -> None:
  """Checks what is known while tracing.

  Raises:
    ValueError: a shape or dtype that does not fit, naming argument and expectation.
  """
  if q.ndim != 4 or k.ndim != 4:
    raise ValueError(f"attention: q is [B,T,H,C] and k [B,S,G,C], got {q.shape} and {k.shape}")
  if k.shape != v.shape:
    raise ValueError(f"attention: k and v must have one shape, got {k.shape} and {v.shape}")
  if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
    raise ValueError("attention: q [B,T,H,C] and k [B,S,G,C] need equal B and C and H a multiple "
                     f"of G, got {q.shape} and {k.shape}")
  if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
    raise ValueError("attention: q, k and v must have one floating dtype, got "
                     f"{q.dtype}, {k.dtype} and {v.dtype}")
  batch, length, heads, _ = q.shape
  keys = k.shape[1]
  for name in FIELDS:
    field = getattr(mask, name)
    if field is None:
      continue
    expected = (batch, keys if name.startswith("k") else length)
    if field.shape != expected:
      raise ValueError(f"attention: mask.{name} must be {expected}, got {field.shape}")
    if field.dtype != jnp.int32:
      raise ValueError(f"attention: mask.{name} must be int32, got {field.dtype}")
  if plan is not None:
    blocks = (batch, -(-length // plan.block_q), -(-keys // plan.block_k))
    if plan.kinds.shape != blocks:
      raise ValueError(f"attention: plan.kinds of {batch} rows, {length} queries and {keys} keys in "
                       f"blocks of {plan.block_q} x {plan.block_k} must be {blocks}, got "
                       f"{plan.kinds.shape}; the plan is of another mask")
  if k_bias is not None and k_bias.shape != (batch, keys):
    raise ValueError(f"attention: k_bias [B,S] must be {(batch, keys)}, got {k_bias.shape}")
  _bias(bias, batch, length, heads, keys)


def _bias(bias: Bias | None, batch: int, length: int, heads: int, keys: int) -> None:
  if isinstance(bias, DistanceBias):
    if bias.table.ndim != 2 or bias.table.shape[0] != heads:
      raise ValueError(f"attention: bias.table [H,N] must have {heads} rows, got "
                       f"{bias.table.shape}")
    for name, size in (("q_position", length), ("k_position", keys)):
      got = getattr(bias, name).shape
      if got != (batch, size):
        raise ValueError(f"attention: bias.{name} must be {(batch, size)}, got {got}")
  elif bias is not None:
    whole = (batch, heads, length, keys)
    if bias.shape not in (whole, (1, *whole[1:])):
      raise ValueError(f"attention: bias [1 or B,H,T,S] must be {whole} or {(1, *whole[1:])}, got "
                       f"{bias.shape}")


def data(mask: IntervalMask, keys: int, plan: AttentionPlan | None = None) -> None:
  """Checks what only the data shows; for debugging, under `checkify.checkify`.

      checked = checkify.checkify(lambda mask, plan: check.data(mask, keys, plan))
      error, _ = jax.jit(checked)(mask, plan)
      error.throw()

  Args:
    mask: fields i32[B,T] and i32[B,S].
    keys: S.
    plan: of this mask, or None.
  """
  seen = mask.lo < mask.hi
  least, most = 0, keys
  if mask.k_index is not None:
    real = mask.k_index != NEVER
    checkify.check((mask.k_index >= 0).all(), "attention: mask.k_index must not be negative "
                   "(core.mask.NEVER makes a key that nobody sees)")
    # Dropped and cached keys leave gaps: an interval may go past the last one that is there.
    most = NEVER
    checkify.check(real.any() | ~seen.any(), "attention: mask.k_index has no key, and queries see "
                   "some: the mask is of another batch")
  inside = ~seen | ((mask.lo >= least) & (mask.hi <= most))
  query = jnp.argmin(inside.reshape(-1))
  checkify.check(inside.all(), "attention: mask.lo and mask.hi must lie in [0, {most}], query {query} "
                 "(counted over all rows) sees [{lo}, {hi})", most=jnp.int32(most), query=query,
                 lo=mask.lo.reshape(-1)[query], hi=mask.hi.reshape(-1)[query])
  if mask.q_class is not None:
    checkify.check((mask.q_class >= -1).all(), "attention: mask.q_class must be a class, 0 (sees "
                   "all) or -1 (sees class 0 only), got {least}", least=mask.q_class.min())
  if mask.k_class is not None:
    checkify.check((mask.k_class >= 0).all(), "attention: mask.k_class must not be negative, got "
                   "{least}", least=mask.k_class.min())
