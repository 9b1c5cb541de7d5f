"""Which dtype holds parameters and which computes; softmax, norm statistics and losses stay f32.

Every layer that makes a parameter is given this, so what is said of single parameters elsewhere in
the config rides along: the adapters.
"""

import dataclasses

import jax.numpy as jnp
from ml_collections import ConfigDict

from vlm_jax.core.adapters import Adapters, adapters
from vlm_jax.core.errors import UsageError

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Precision:
  """How layers make and use parameters.

  Attributes:
    param: dtype of parameters and optimiser.
    compute: dtype of matrix products and activations.
    adapters: which linear layers have one.
  """

  param: jnp.dtype = jnp.float32
  compute: jnp.dtype = jnp.float32
  adapters: Adapters = Adapters()


def precision(config: ConfigDict) -> Precision:
  """Reads `config.precision` {param, compute} and `config.lora`.

  Raises:
    UsageError: an unknown dtype name, or adapters that cannot be.
  """
  for name in ("param", "compute"):
    if config.precision[name] not in DTYPES:
      raise UsageError(f"config.precision.{name} is '{config.precision[name]}'; "
                       f"use one of {', '.join(DTYPES)}")
  return Precision(DTYPES[config.precision.param], DTYPES[config.precision.compute],
                   adapters(config))
