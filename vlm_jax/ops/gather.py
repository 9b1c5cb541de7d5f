"""Gathering rows of a table when no row is read twice: the backward pass is a gather as well."""

import jax
import jax.numpy as jnp

from vlm_jax.core.typing import Array


@jax.custom_vjp
def take_rows(table: Array, index: Array) -> Array:
  """Row-local gather: out[b, t] = table[b, index[b, t]], zeros where the index is -1.

  The transpose of a general gather is a scatter-add, slow where it is serial (CPUs) or atomic
  (GPUs). Here every row is read at most once, so its gradient is one row of the output's gradient.

  Args:
    table: f[B,R,D].
    index: i32[B,T] in -1..R-1, no row of the table twice in one b (its gradient would be wrong).

  Returns:
    f[B,T,D].
  """
  return _take(table, index)


def invert(index: Array, size: int) -> Array:
  """i32[B,size] with out[b, index[b, t]] = t, -1 for rows that no t reads; scalars only."""
  slots = jnp.arange(index.shape[1], dtype=jnp.int32)
  # Out of bounds is dropped; a negative index would count from the end.
  place = lambda row: jnp.full(size, -1, jnp.int32).at[row].set(slots, mode="drop")
  return jax.vmap(place)(jnp.where(index < 0, size, index))


def _take(table: Array, index: Array) -> Array:
  rows = jnp.take_along_axis(table, jnp.maximum(index, 0)[..., None], axis=1)
  return jnp.where((index >= 0)[..., None], rows, jnp.zeros((), table.dtype))


def _forward(table, index):
  return _take(table, index), (index, table.shape[1])


def _backward(residuals, grad):
  index, size = residuals
  return _take(grad, invert(index, size)), None


take_rows.defvjp(_forward, _backward)
