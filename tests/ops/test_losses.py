"""The chunked cross-entropy against the full logits, and its exact zeros."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.ops import losses


def problem(seed=0):
  rng = np.random.default_rng(seed)
  hidden = jnp.asarray(rng.normal(size=(2, 13, 8)), jnp.float32)
  head = jnp.asarray(rng.normal(size=(8, 31)), jnp.float32)
  targets = jnp.asarray(rng.integers(0, 31, (2, 13)), jnp.int32)
  weights = jnp.asarray(rng.random((2, 13)) * (rng.random((2, 13)) < 0.6), jnp.float32)
  sources = jnp.asarray(rng.integers(0, 3, (2, 13)), jnp.int32)
  return hidden, head, targets, weights, sources


def full(hidden, head, targets, weights, sources):
  log_p = jax.nn.log_softmax(jnp.einsum("btd,dv->btv", hidden, head))
  loss = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0] * weights
  return jnp.stack([jnp.where(sources == s, loss, 0).sum() for s in range(3)])


@pytest.mark.parametrize("chunk", (4, 5, 26, 100))
def test_chunked_equals_full(chunk):
  args = problem()
  mix = jnp.asarray([1.0, -2.0, 0.5])
  ours = lambda h, w: losses.cross_entropy_sums(h, w, *args[2:], 3, chunk) @ mix
  theirs = lambda h, w: full(h, w, *args[2:]) @ mix
  got, want = (jax.value_and_grad(f, (0, 1))(*args[:2]) for f in (ours, theirs))
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  for a, b in zip(got[1], want[1], strict=True):
    assert float(jnp.abs(b).max()) > 0.1
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_comparison_notices_shifted_targets():
  hidden, head, targets, weights, sources = problem()
  got = losses.cross_entropy_sums(hidden, head, jnp.roll(targets, 1, 1), weights, sources, 3)
  assert float(jnp.abs(got - full(hidden, head, targets, weights, sources)).max()) > 1e-3


def test_slots_without_weight_have_no_gradient_and_no_say():
  hidden, head, targets, weights, sources = problem()
  total = lambda h, t: losses.cross_entropy_sums(h, head, t, weights, sources, 3).sum()
  grad = jax.grad(total)(hidden, targets)
  silent = np.asarray(weights) == 0
  assert silent.any() and not np.asarray(grad)[silent].any()
  assert np.abs(np.asarray(grad)[~silent]).min(-1).max() > 0
  other = jnp.where(weights == 0, (targets + 1) % 31, targets)
  assert total(hidden, targets) == total(hidden, other)


def test_weights_per_source():
  _, _, _, weights, sources = problem()
  sums = losses.source_sums(weights, sources, 3)
  for source in range(3):
    np.testing.assert_allclose(
      sums[source], np.asarray(weights)[np.asarray(sources) == source].sum(), rtol=1e-6
    )
