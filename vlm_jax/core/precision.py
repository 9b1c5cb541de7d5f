"""Which dtype holds parameters and which computes; softmax, norm statistics and losses stay f32."""

import dataclasses

import jax.numpy as jnp
from ml_collections import ConfigDict

from vlm_jax.core.errors import UsageError

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Precision:
  """Attributes: param (storage of parameters and optimiser), compute (matmuls, activations)."""

  param: jnp.dtype = jnp.float32
  compute: jnp.dtype = jnp.float32


def precision(config: ConfigDict) -> Precision:
  """Reads `config.precision` {param, compute}; an unknown dtype name is a UsageError."""
  for name in ("param", "compute"):
    if config.precision[name] not in DTYPES:
      raise UsageError(f"config.precision.{name} is '{config.precision[name]}'; "
                       f"use one of {', '.join(DTYPES)}")
  return Precision(DTYPES[config.precision.param], DTYPES[config.precision.compute])
