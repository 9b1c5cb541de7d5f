import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.ops.gather import invert, take_rows


def drawn(seed: int = 0):
  """A table [3,7,5] and indices [3,11] that use no row twice; some rows and slots are unused."""
  rng = np.random.default_rng(seed)
  index = np.full((3, 11), -1, np.int32)
  for row, count in enumerate((7, 4, 0)):
    slots = rng.permutation(11)[:count]
    index[row, slots] = rng.permutation(7)[:count]
  return rng.normal(size=(3, 7, 5)).astype(np.float32), index


def plain(table, index):
  rows = jnp.take_along_axis(table, jnp.maximum(index, 0)[..., None], axis=1)
  return rows * (index >= 0)[..., None]


def test_is_a_gather_forward_and_backward():
  table, index = drawn()
  weight = np.random.default_rng(1).normal(size=(3, 11, 5)).astype(np.float32)
  np.testing.assert_array_equal(take_rows(table, index), plain(table, index))
  grad = lambda take: jax.grad(lambda table: jnp.sum(take(table, index) * weight))(table)
  np.testing.assert_array_equal(grad(take_rows), grad(plain))
  # Twin: rows used twice, which the contract of take_rows rules out, do break its gradient.
  index = np.zeros_like(index)
  assert np.abs(np.asarray(grad(take_rows) - grad(plain))).max() > 0.1


def test_backward_has_no_scatter_of_rows():
  table, index = drawn()
  text = jax.jit(jax.grad(lambda table: jnp.sum(take_rows(table, index) ** 2))).lower(table)
  scatters = [line for line in text.as_text().splitlines() if "stablehlo.scatter" in line]
  assert not any("f32" in line for line in scatters)
  plain_text = jax.jit(jax.grad(lambda table: jnp.sum(plain(table, index) ** 2))).lower(table)
  assert "stablehlo.scatter" in plain_text.as_text()


def test_invert():
  np.testing.assert_array_equal(
    invert(jnp.array([[2, -1, 0], [-1, -1, -1]]), 4), [[2, -1, 0, -1], [-1, -1, -1, -1]]
  )
