"""Attention under an IntervalMask, by the first implementation that can do it exactly.

Implementations are tried in the order of `ORDER`. Each one says in a sentence why it declines, or
computes the mask exactly: no mask is ever dropped or approximated.
"""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType, ModuleType

from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.typing import Array
from vlm_jax.ops.attention import check, cudnn, dense, pallas_tpu, splash, tokamax, xla
from vlm_jax.ops.attention.bias import Bias, DistanceBias
from vlm_jax.ops.attention.blocks import block_sizes
from vlm_jax.ops.attention.merge import merge
from vlm_jax.ops.attention.plan import AttentionPlan, make_plan
from vlm_jax.ops.attention.request import Request, capability, platform
from vlm_jax.ops.attention.sharding import on_mesh

__all__ = ["ORDER", "AttentionPlan", "Bias", "DistanceBias", "Request", "attention", "block_sizes",
           "check", "choose", "make_plan", "merge", "platform"]

ORDER: Mapping[str, ModuleType] = MappingProxyType({
  "pallas_tpu": pallas_tpu, "splash": splash, "tokamax": tokamax, "cudnn": cudnn, "xla": xla,
  "dense": dense})


def choose(request: Request, implementation: str = "auto") -> tuple[str, dict[str, str]]:
  """Which implementation runs, and why the ones before it do not.

  Args:
    request: the call.
    implementation: "auto", or the only one to consider.

  Returns:
    The name and the refusals, {name: reason}.

  Raises:
    UsageError: the named implementation is unknown or declines.
  """
  if implementation != "auto" and implementation not in ORDER:
    raise UsageError(f"config.attention.implementation is '{implementation}'; "
                     f"{nearest(implementation, ['auto', *ORDER])}")
  names = list(ORDER) if implementation == "auto" else [implementation]
  if implementation == "auto" and not all(
      isinstance(size, int) for size in (*request.q_shape, *request.k_shape)):
    names = ["dense"]  # of any number of rows (`jax.export`): the others plan with numbers
  request = dataclasses.replace(request, asked=implementation != "auto")
  refusals: dict[str, str] = {}
  for name in names:
    reason = ORDER[name].declines(request)
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
  bias: Bias | None = None,
  k_bias: Array | None = None,
  return_lse: bool = False,
  scale: float | None = None,
  soft_cap: float | None = None,
  implementation: str = "auto",
) -> Array | tuple[Array, Array]:
  """softmax(cap(scale * q k^T) + bias + k_bias under the mask) v, cap(x) = c tanh(x / c).

  A query that sees no key returns 0, has gradient 0 and an lse of -inf. Logits, softmax and sums
  are f32. Under `jax.set_mesh`, rows and heads stay on their devices.

  Args:
    q: f[B,T,H,C].
    k, v: f[B,S,G,C] with H a multiple of G: query head h reads group h // (H // G).
    mask: fields [B,T] and [B,S].
    plan: `make_plan` of this mask, shared by all layers; blocked implementations need it.
    bias: f[1 or B,H,T,S], a `DistanceBias` or None; what it says about pairs outside the mask is
      not read.
    k_bias: f[B,S] or None, of a key for all queries and heads.
    return_lse: also return the log-sum-exp of the visible logits, by which `merge` puts attention
      over disjoint sets of keys together.
    scale: None is C ** -0.5.
    soft_cap: c of the cap (Gemma 2, arXiv:2408.00118, section 2), None: no cap.
    implementation: "auto" or a name of `ORDER`.

  Returns:
    f[B,T,H,C] in q's dtype, and with `return_lse` f32[B,T,H]; gradients flow through both.

  Raises:
    ValueError: shapes or dtypes that do not fit, naming argument and expectation.
    UsageError: the named implementation is unknown or declines.
  """
  check.shapes(q, k, v, mask, plan, bias, k_bias)
  check.data(mask, k.shape[1], plan)
  scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
  run = functools.partial(_run, scale=scale, soft_cap=soft_cap, needs_lse=return_lse,
                          implementation=implementation)
  out, lse = on_mesh(run, q, k, v, mask, plan, bias, k_bias)
  return (out, lse) if return_lse else out


def _run(q, k, v, mask, plan, bias, k_bias, *, scale, soft_cap, needs_lse, implementation):
  request = Request(
    q_shape=q.shape, k_shape=k.shape, dtype=q.dtype, plan=plan, has_bias=bias is not None,
    has_k_bias=k_bias is not None, soft_cap=soft_cap,
    has_classes=mask.q_class is not None and mask.k_class is not None,
    has_k_index=mask.k_index is not None, needs_lse=needs_lse,
    platform=platform(), capability=capability(),
  )
  name, _ = choose(request, implementation)
  return ORDER[name].attend(q, k, v, mask, plan, scale=scale, soft_cap=soft_cap, bias=bias,
                            k_bias=k_bias)
