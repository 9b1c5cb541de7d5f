"""vlm_jax: every published way of joining image tokens and text tokens, in one readable loop."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
  """`vlm_jax.load` and `vlm_jax.Bundle`, with JAX behind them, when they are first asked for."""
  if name not in ("Bundle", "load"):
    raise AttributeError(f"module 'vlm_jax' has no attribute '{name}'")
  from vlm_jax import bundle

  return getattr(bundle, name)
