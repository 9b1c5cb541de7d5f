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


def test_one_row_may_be_all_wanted_and_another_not_at_all():
  hidden, head, targets, weights, sources = problem()
  weights = weights.at[0].set(1.0).at[1].set(0.0)
  for chunk in (2, 6, 100):
    got = losses.cross_entropy_sums(hidden, head, targets, weights, sources, 3, chunk)
    np.testing.assert_allclose(got, full(hidden, head, targets, weights, sources), rtol=1e-5)
  nothing = losses.cross_entropy_sums(hidden, head, targets, weights * 0, sources, 3)
  np.testing.assert_array_equal(nothing, 0)


def test_what_an_unwanted_slot_holds_never_matters():
  hidden, head, targets, _, _ = problem()
  wanted = jnp.zeros((2, 13), bool).at[:, 9:11].set(True)
  hidden = jnp.where(wanted[..., None], hidden, jnp.nan)

  def total(hidden, head):
    return losses.token_log_likelihoods(hidden, head, targets, wanted, 4).sum()

  value, grads = jax.value_and_grad(total, (0, 1))(hidden, head)
  assert np.isfinite(value) and all(np.isfinite(grad).all() for grad in grads)
