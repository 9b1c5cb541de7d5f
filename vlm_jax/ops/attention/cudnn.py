"""cuDNN's attention on an NVIDIA GPU, with the whole mask.

Lowered for CUDA, never run on a GPU; what is computed around the kernel is proven with the plain
XLA implementation of the same function, `jax.nn.dot_product_attention`.

What cuDNN says without a T x S array (causal, windows of one size, lengths, packed segments) must
be known while tracing or is not this mask: intervals are data. The whole mask says every mask
exactly; it becomes a bias of 0 and a number whose exponential is exactly 0.
"""

import jax
import jax.numpy as jnp

from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.typing import Array
from vlm_jax.ops.attention.request import Request

MASK_BYTES = 2**30  # of a bias of T x S; its gradient, which cuDNN always writes, takes the same
FEW = 128  # queries
WIDEST = 128
ALIGNED = 8  # what cuDNN wants widths to be a multiple of


def declines(request: Request) -> str | None:
  """Why this call, of one device's rows, cannot run here; or None."""
  batch, length, _, width = request.q_shape
  dtype = jnp.dtype(request.dtype)
  needed = batch * length * request.k_shape[1] * 2
  for refused, reason in (
    (request.platform != "gpu", f"it runs on a GPU, and this is '{request.platform}'"),
    ((request.capability or 0) < 8,
     "it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or later"),
    (dtype not in (jnp.bfloat16, jnp.float16),
     f"it computes in bfloat16 and float16, not in {dtype.name}"),
    (width > WIDEST, f"heads of width {width} are wider than {WIDEST}"),
    (request.has_bias or request.has_k_bias, f"it would round the bias to {dtype.name}"),
    (request.soft_cap is not None, "it cannot cap the logits"),
    (request.needs_lse, "its log-sum-exp has no gradient"),
    (needed > MASK_BYTES, f"the mask of {batch} x {length} x {request.k_shape[1]} pairs takes "
     f"{needed} bytes, more than {MASK_BYTES}: use fewer rows a device"),
    (not request.asked and length < FEW, f"{length} queries are few: dense computes them as well"),
  ):
    if refused:
      return reason
  return None


def attend(
  q: Array, k: Array, v: Array, mask: IntervalMask, plan, *, scale: float, soft_cap: None = None,
  bias: None = None, k_bias: None = None, implementation: str = "cudnn",
) -> tuple[Array, None]:
  """See `attention`; returns out, and None for the lse that `declines` refuses.

  `implementation` is that of `jax.nn.dot_product_attention`: "xla" runs without a GPU, for tests.
  """
  assert soft_cap is None and bias is None and k_bias is None, "see declines"
  del plan
  seen = mask.dense(k.shape[1])
  # Training with a bias wants even lengths.
  more_q, more_k, wider = q.shape[1] % 2, k.shape[1] % 2, -q.shape[3] % ALIGNED
  pad = lambda x, more: jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, wider)))
  out = jax.nn.dot_product_attention(
    pad(q, more_q), pad(k, more_k), pad(v, more_k), scale=scale, implementation=implementation,
    mask=jnp.pad(seen, ((0, 0), (0, more_q), (0, more_k)))[:, None])
  out = out[:, : q.shape[1], :, : q.shape[3]]
  # Where a query sees no key, all keys got one weight; the gradient that comes back is 0 then.
  return jnp.where(seen.any(-1)[..., None, None], out, 0), None
