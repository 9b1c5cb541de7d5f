"""Attention weights of every layer, read out of a forward pass without changing it.

Blocked kernels never hold the weights. Queries and keys are taken where the layers make them, and
their dense softmax is handed to the host, layer by layer, out of the scan.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vlm_jax.nn.attention import Attention
from vlm_jax.ops.attention import dense
from vlm_jax.ops.rope import rotate


def record(run: Callable[..., Any], *arguments: Any, under: str) -> list[np.ndarray]:
  """Compiles and runs a forward pass, and keeps the weights of its self-attention.

  Args:
    run: applies a module to `arguments`, without rematerialisation.
    arguments: pytrees of arrays.
    under: the submodule of interest, the first name of its parameters' paths, e.g. "llm".

  Returns:
    f32[B,H,T,S] of every layer, in the order they are computed; a query without keys has zeros.
  """
  found: list[np.ndarray] = []
  made: list[dict[str, jax.Array]] = []  # of the attention that is being computed

  def intercept(call, args, kwargs, method):
    module = method.module
    if method.method_name != "__call__":
      return call(*args, **kwargs)
    part = (module.name or "").removesuffix("_norm")  # a norm of queries or keys comes after them
    if made and part in ("query", "key"):
      made[-1][part] = out = call(*args, **kwargs)
      return out
    if not isinstance(module, Attention) or module.path[0] != under:
      return call(*args, **kwargs)
    made.append({})
    out = call(*args, **kwargs)
    projected, context = made.pop(), args[2]
    q, k = projected["query"], projected["key"]
    if context.rotation is not None:
      q, k = (rotate(x, context.rotation) for x in (q, k))
    weights = dense.weights(q, k, context.mask, module.scale, module.soft_cap)
    jax.debug.callback(lambda values: found.append(np.asarray(values)), weights, ordered=True)
    return out

  with nn.intercept_methods(intercept):
    # A function of its own: one that was traced before would not be traced again.
    jax.block_until_ready(jax.jit(lambda *values: run(*values))(*arguments))
  jax.effects_barrier()
  return found
