"""Gradient accumulation of losses that compare documents of the whole batch (arXiv:2101.06983).

Such a loss is not the sum of its parts. But what the model computes for a row depends on that row
alone, so the gradient has two factors: that of the loss by the outputs, which needs all of them at
once and no activation, and that of the outputs by the parameters, which goes row by row:

    1. run every micro-batch, keep the outputs                 (embeddings: E numbers a document)
    2. the loss of all outputs, and its gradient by them       (nothing but embeddings is there)
    3. run every micro-batch again, pull that gradient back    (activations of one micro-batch)

Value and gradient are those of one big batch; the price is a second forward pass.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.core.typing import Array, Params


def cached(
  forward: Callable[[Params, Any], Any],
  loss: Callable[[Any], tuple[Array, Any]],
  params: Params,
  micros: Any,
  parts: int,
  join: Callable[[Array], Array],
  split: Callable[[Array], Array],
) -> tuple[Any, Params]:
  """Gradient of a loss of the whole batch, one micro-batch's activations at a time.

  Args:
    forward: (params, micro-batch) -> output; arrays of the output with axes have rows first, and
      scalars are the same for every micro-batch.
    loss: output of the whole batch -> (total, what else is wanted).
    params: to differentiate by.
    micros: pytree [parts, ...] of micro-batches.
    parts: their number.
    join: [parts, rows, ...] to [parts * rows, ...].
    split: the way back.

  Returns:
    What else was wanted, and the gradient.
  """
  def run(_, micro):
    return None, forward(params, micro)

  outputs = jax.lax.scan(run, None, micros)[1]
  whole = jax.tree.map(lambda leaf: leaf[0] if leaf.ndim == 1 else join(leaf), outputs)
  (_, wanted), gradients = jax.value_and_grad(loss, has_aux=True)(whole)
  # A scalar is in every micro-batch's output: each pulls back its share.
  shares = jax.tree.map(
    lambda leaf: jnp.broadcast_to(leaf / parts, (parts,)) if leaf.ndim == 0 else split(leaf),
    gradients)

  def pull(total, item):
    micro, share = item
    _, back = jax.vjp(lambda params: forward(params, micro), params)
    return jax.tree.map(jnp.add, total, back(share)[0]), None

  return wanted, jax.lax.scan(pull, jax.tree.map(jnp.zeros_like, params), (micros, shares))[0]
