"""Attention under an IntervalMask, by the first implementation that can do it exactly.

Implementations are tried in the order of `ORDER`. Each one says in a sentence why it declines, or
computes the mask exactly: no mask is ever dropped or approximated.
"""

from collections.abc import Mapping
from types import MappingProxyType, ModuleType

from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.typing import Array
from vlm_jax.ops.attention import dense, xla
from vlm_jax.ops.attention.plan import AttentionPlan, make_plan

__all__ = ["ORDER", "AttentionPlan", "attention", "choose", "make_plan"]

ORDER: Mapping[str, ModuleType] = MappingProxyType({"xla": xla, "dense": dense})
BIASED = ("dense",)  # those that can add a bias to the logits


def choose(
  q_shape: tuple[int, ...],
  k_shape: tuple[int, ...],
  plan: AttentionPlan | None,
  implementation: str = "auto",
  biased: bool = False,
) -> tuple[str, dict[str, str]]:
  """Which implementation runs, and why the ones before it do not.

  Args:
    q_shape: (B, T, H, C).
    k_shape: (B, S, G, C).
    plan: the plan at hand, or None.
    implementation: "auto", or the only one to consider.
    biased: whether a bias is added to the logits.

  Returns:
    The name and the refusals, {name: reason}.

  Raises:
    UsageError: the named implementation is unknown or declines.
  """
  if implementation != "auto" and implementation not in ORDER:
    raise UsageError(f"config.attention.implementation is '{implementation}'; "
                     f"{nearest(implementation, ['auto', *ORDER])}")
  names = list(ORDER) if implementation == "auto" else [implementation]
  refusals: dict[str, str] = {}
  for name in names:
    # Asked for by name, an implementation only declines what it cannot do, not what it is slow at.
    reason = ORDER[name].declines(q_shape, k_shape, plan, asked=implementation != "auto")
    if biased and name not in BIASED:
      reason = f"it cannot add a bias to the logits; {', '.join(BIASED)} can"
    if reason is None:
      return name, refusals
    refusals[name] = reason
  reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
  raise UsageError(f"config.attention.implementation '{implementation}' declines: {reasons}")


def attention(
  q: Array,
  k: Array,
  v: Array,
  mask: IntervalMask,
  *,
  plan: AttentionPlan | None = None,
  scale: float | None = None,
  bias: Array | None = None,
  implementation: str = "auto",
) -> Array:
  """softmax(scale * q k^T + bias under the mask) v; a query without keys returns 0, gradient 0.

  Args:
    q: f[B,T,H,C].
    k, v: f[B,S,G,C] with H a multiple of G: query head h reads group h // (H // G).
    mask: fields [B,T] and [B,S].
    plan: `make_plan` of this mask, shared by all layers; blocked implementations need it.
    scale: None is C ** -0.5.
    bias: f[B,H,T,S] or None; what it says about pairs outside the mask is not read.
    implementation: "auto" or a name of `ORDER`.

  Returns:
    f[B,T,H,C] in q's dtype; logits and softmax are f32.

  Raises:
    ValueError: shapes that do not fit, naming argument and expectation.
    UsageError: the named implementation is unknown or declines.
  """
  _check(q, k, v, mask, bias)
  name, _ = choose(q.shape, k.shape, plan, implementation, bias is not None)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  extra = {} if bias is None else {"bias": bias}
  return ORDER[name].attend(q, k, v, mask, plan, scale, **extra)


def _check(q: Array, k: Array, v: Array, mask: IntervalMask, bias: Array | None) -> None:
  if q.ndim != 4 or k.ndim != 4:
    raise ValueError(f"attention: q is [B,T,H,C] and k [B,S,G,C], got {q.shape} and {k.shape}")
  if k.shape != v.shape:
    raise ValueError(f"attention: k and v must have one shape, got {k.shape} and {v.shape}")
  if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
    raise ValueError("attention: q [B,T,H,C] and k [B,S,G,C] need equal B and C and H a multiple "
                     f"of G, got {q.shape} and {k.shape}")
  whole = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
  if bias is not None and bias.shape != whole:
    raise ValueError(f"attention: bias [B,H,T,S] must be {whole}, got {bias.shape}")
  for name in ("lo", "hi", "q_class", "k_class", "k_index"):
    field = getattr(mask, name)
    expected = (q.shape[0], k.shape[1] if name.startswith("k") else q.shape[1])
    if field is not None and field.shape != expected:
      raise ValueError(f"attention: mask.{name} must be {expected}, got {field.shape}")
