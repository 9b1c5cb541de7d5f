"""Gradient accumulation of losses that compare documents of the whole batch (arXiv:2101.06983).

Such a loss is not the sum of its parts. But what the model computes for a row depends on that row
alone, so the gradient has two factors: that of the loss by the outputs, which needs all of them at
once and no activation, and that of the outputs by the parameters, which goes row by row:

    1. run every micro-batch, keep the embeddings              (E numbers a document)
    2. the loss of all of them, and its gradient by them       (nothing but embeddings is there)
    3. run every micro-batch again, pull that gradient back    (activations of one micro-batch)

Value and gradient are those of one big batch; the price is a second forward pass. Losses that are
sums over rows, of strategies that also speak, are added up in the third step.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.core.typing import Array, Params


def cached(
  forward: Callable[[Params, Any], tuple[Any, Array, Any]],
  loss: Callable[[Any], tuple[Array, Any]],
  params: Params,
  micros: Any,
  parts: int,
  join: Callable[[Array], Array],
  split: Callable[[Array], Array],
) -> tuple[Any, Params]:
  """Gradient of a loss of the whole batch, one micro-batch's activations at a time.

  Args:
    forward: (params, micro-batch) -> (embeddings, total of the losses that are sums over rows, what
      else is wanted of them); arrays of the embeddings with axes have rows first, and scalars are
      the same for every micro-batch.
    loss: embeddings of the whole batch -> (total, what else is wanted).
    params: to differentiate by.
    micros: pytree [parts, ...] of micro-batches.
    parts: their number.
    join: [parts, rows, ...] to [parts * rows, ...].
    split: the way back.

  Returns:
    What else was wanted of both, that of micro-batches added up, and the gradient.
  """
  def run(_, micro):
    return None, forward(params, micro)[0]

  outputs = jax.lax.scan(run, None, micros)[1]
  whole = jax.tree.map(lambda leaf: leaf[0] if leaf.ndim == 1 else join(leaf), outputs)
  (_, wanted), gradients = jax.value_and_grad(loss, has_aux=True)(whole)
  # A scalar is in every micro-batch's output: each pulls back its share.
  shares = jax.tree.map(
    lambda leaf: jnp.broadcast_to(leaf / parts, (parts,)) if leaf.ndim == 0 else split(leaf),
    gradients)

  def pull(carry, item):
    micro, share = item

    def both(params):
      embeddings, total, also = forward(params, micro)
      return (embeddings, total), also

    (_, total), back, also = jax.vjp(both, params, has_aux=True)
    gradient = back((share, jnp.ones_like(total)))[0]
    return jax.tree.map(jnp.add, carry, (also, gradient)), None

  first = jax.tree.map(lambda leaf: leaf[0], micros)
  zeros = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)
  start = jax.tree.map(zeros, (jax.eval_shape(forward, params, first)[2], params))
  (also, gradient), _ = jax.lax.scan(pull, start, (micros, shares))
  return (wanted, also), gradient
