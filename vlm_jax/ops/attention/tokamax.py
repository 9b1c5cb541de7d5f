"""tokamax's attention for NVIDIA GPUs (Pallas, Mosaic), with an interval for each query.

Never run on a GPU; what is computed around the kernel is proven with tokamax's plain XLA
implementation, which takes the same arguments.

Its mask has a first and a last key for each query, so no T x S array is made. The forward kernel
walks from the first key that a block of queries sees to the last; the backward kernels meet all
blocks. The package is optional and needs Python 3.12; its public function has no such mask, so the
operator is called beneath it.
"""

import importlib.util

import jax.numpy as jnp

from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.typing import Array
from vlm_jax.ops.attention.request import Request

WIDEST = 256


def declines(request: Request) -> str | None:
  """Why this call cannot run here, or None."""
  dtype, width = jnp.dtype(request.dtype), request.q_shape[3]
  for refused, reason in (
    (request.platform != "gpu", f"it runs on a GPU, and this is '{request.platform}'"),
    (not 9 <= (request.capability or 0) < 11,
     "its backward pass needs an NVIDIA GPU of compute capability 9 or 10 (Hopper, Blackwell)"),
    (dtype not in (jnp.bfloat16, jnp.float16),
     f"it computes in bfloat16 and float16, not in {dtype.name}"),
    (width > WIDEST, f"heads of width {width} are wider than {WIDEST}"),
    (request.has_classes, "its mask has an interval for a query and no classes"),
    (request.has_k_index, "it counts keys where they stand: no k_index"),
    (request.has_bias or request.has_k_bias,
     "the gradient of a bias would be of H x T x S numbers"),
    (request.needs_lse, "its log-sum-exp has no gradient"),
    (importlib.util.find_spec("tokamax") is None,
     "it is not installed: pip install 'vlm-jax[tokamax]', on Python 3.12 or later"),
  ):
    if refused:
      return reason
  return None


def attend(
  q: Array, k: Array, v: Array, mask: IntervalMask, plan, *, scale: float,
  soft_cap: float | None = None, bias: None = None, k_bias: None = None,
  operator: str = "mosaic_gpu",
) -> tuple[Array, None]:
  """See `attention`; returns out, and None for the lse that `declines` refuses.

  `operator` is the name of one of tokamax's: "xla" runs without a GPU, for tests.
  """
  assert bias is None and k_bias is None, "see declines"
  del plan
  from tokamax._src.ops.attention.api import IMPLEMENTATIONS
  from tokamax._src.ops.attention.base import Mask

  keys = k.shape[1]
  lo, hi = (jnp.clip(x, 0, keys) for x in (mask.lo, mask.hi))
  seen = lo < hi
  # Padding must not widen what a block of queries walks along: its interval ends before it starts.
  first, last = jnp.where(seen, lo, keys)[:, None], jnp.where(seen, hi, 0)[:, None]
  out = IMPLEMENTATIONS[operator](q, k, v, mask=Mask(k_start=first, k_end=last),
                                  logits_scale=scale, logits_soft_cap=soft_cap)
  return jnp.where(seen[..., None, None], out, 0), None
