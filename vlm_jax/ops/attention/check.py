"""What `attention` refuses, in one sentence each: at trace time, or with the data in debug mode."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax.numpy as jnp
from jax.experimental import checkify

from vlm_jax.core.mask import NEVER, IntervalMask
from vlm_jax.core.typing import Array
from vlm_jax.ops.attention.bias import Bias, DistanceBias
from vlm_jax.ops.attention.plan import AttentionPlan, make_plan

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
    if field.ndim == 3 and name.endswith("class"):
      raise ValueError(f"attention: mask.{name} has {field.shape[2]} classes for each token; the "
                       "rule has one, so attend to disjoint keys under one mask each and `merge` "
                       "the parts")
    if field.shape != expected:
      raise ValueError(f"attention: mask.{name} must be {expected}, got {field.shape}")
    if field.dtype != jnp.int32:
      raise ValueError(f"attention: mask.{name} must be int32, got {field.dtype}")
  if plan is not None:
    blocks = (batch, -(-length // plan.block_q), -(-keys // plan.block_k))
    if plan.kinds.shape != blocks:
      raise ValueError(f"attention: plan.kinds of {batch} rows, {length} queries and {keys} keys "
                       f"in blocks of {plan.block_q} x {plan.block_k} must be {blocks}, got "
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


_DEBUG = contextvars.ContextVar("debug", default=False)


@contextlib.contextmanager
def debug() -> Iterator[None]:
  """While it lasts, what is traced through `attention` also checks its data, see `data`.

  with check.debug():
    error, out = jax.jit(checkify.checkify(step))(batch)
  error.throw()
  """
  token = _DEBUG.set(True)
  try:
    yield
  finally:
    _DEBUG.reset(token)


def data(mask: IntervalMask, keys: int, plan: AttentionPlan | None = None) -> None:
  """In debug mode, checks what only the data shows, by checkify.

  An interval outside the keys, a class that is none, a plan of another mask: sentences like those
  of `shapes`, thrown by `checkify`'s error.

  Args:
    mask: fields i32[B,T] and i32[B,S].
    keys: S.
    plan: said to be of this mask, or None.
  """
  if not _DEBUG.get():
    return
  # With an index of their own, keys may have gaps where some were dropped or are not cached yet.
  most = keys if mask.k_index is None else int(NEVER)
  inside = (mask.lo >= mask.hi) | ((mask.lo >= 0) & (mask.hi <= most))
  query = jnp.argmin(inside.reshape(-1))
  checkify.check(inside.all(), f"attention: mask.lo and mask.hi must lie in [0, {most}], query "
                 "{query} (counted over all rows) sees [{lo}, {hi})", query=query,
                 lo=mask.lo.reshape(-1)[query], hi=mask.hi.reshape(-1)[query])
  for name, least in (("q_class", -1), ("k_class", 0), ("k_index", 0)):
    field = getattr(mask, name)
    if field is not None:
      checkify.check((field >= least).all(), f"attention: mask.{name} must be {least} or more, got "
                     "{got}", got=field.min())
  if plan is not None:
    kinds = make_plan(mask, keys, block_q=plan.block_q, block_k=plan.block_k).kinds
    checkify.check((kinds == plan.kinds).all(), "attention: the plan is of another mask, "
                   "{count} of its blocks differ", count=(kinds != plan.kinds).sum())
