"""What an implementation is asked to do, and where: all of it is known at trace time."""

import dataclasses

import jax
import jax.numpy as jnp

from vlm_jax.ops.attention.plan import AttentionPlan


@dataclasses.dataclass(frozen=True)
class Request:
  """One call of `attention`.

  Attributes:
    q_shape: (B, T, H, C).
    k_shape: (B, S, G, C).
    dtype: of q, k and v.
    plan: the plan at hand (or its shapes), or None.
    has_bias: whether a bias of T x S is added to the logits, as an array or by distance.
    has_k_bias: whether a bias of S is.
    soft_cap: of the logits, or None.
    has_classes: whether queries and keys have classes.
    has_k_index: whether keys are in another order than their index.
    needs_lse: whether the log-sum-exp is returned too.
    platform: "cpu", "gpu" or "tpu".
    capability: of the GPU, see `capability`.
    asked: the implementation was named: it declines what it cannot do, not what it is slow at.
  """

  q_shape: tuple[int, ...]
  k_shape: tuple[int, ...]
  dtype: jnp.dtype = jnp.dtype("float32")
  plan: AttentionPlan | None = None
  has_bias: bool = False
  has_k_bias: bool = False
  soft_cap: float | None = None
  has_classes: bool = False
  has_k_index: bool = False
  needs_lse: bool = False
  platform: str = dataclasses.field(default_factory=lambda: platform())
  capability: float | None = dataclasses.field(default_factory=lambda: capability())
  asked: bool = False


def platform() -> str:
  """The platform that is compiled for: of the mesh in `jax.set_mesh`, else of the first device."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def capability() -> float | None:
  """The compute capability of this process's GPU: 8.0 is Ampere, 9.0 Hopper, 10.0 Blackwell.

  None where there is no NVIDIA GPU, also when one is compiled for from afar.
  """
  try:
    return float(jax.devices()[0].compute_capability)
  except (AttributeError, ValueError):  # not a GPU, or one that counts in names
    return None
