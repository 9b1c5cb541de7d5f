"""The chunked losses against float64 logits written out, their exact zeros, and sharded heads."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import vocabulary_oracle as full
from vlm_jax.ops import losses

TOLERANCE = 2e-6  # of the largest value
OPTIONS = (
  {}, {"soft_cap": 3.0}, {"smoothing": 0.2}, {"soft_cap": 2.0, "smoothing": 0.1},
)
CHUNKS = ((4, 7), (5, 31), (26, 10), (100, 100))


def problem(seed=0):
  rng = np.random.default_rng(seed)
  hidden = jnp.asarray(rng.normal(size=(2, 13, 8)), jnp.float32)
  head = jnp.asarray(rng.normal(size=(8, 31)), jnp.float32)
  targets = jnp.asarray(rng.integers(0, 31, (2, 13)), jnp.int32)
  weights = jnp.asarray(rng.random((2, 13)) * (rng.random((2, 13)) < 0.6), jnp.float32)
  sources = jnp.asarray(rng.integers(0, 3, (2, 13)), jnp.int32)
  return hidden, head, targets, weights, sources


def ours(args, options, chunk, seed=1):
  """Both losses of every slot, and the gradients under a random cotangent of every slot."""
  hidden, head, targets, weights, _ = args
  above = full.cotangents(weights, seed)

  def total(hidden, head):
    found = losses.token_losses(hidden, head, targets, weights > 0, chunk=chunk, **options)
    return sum((a * b).sum() for a, b in zip(found, above, strict=True)), found

  grads, found = jax.jit(jax.grad(total, (0, 1), has_aux=True))(hidden, head)
  return *found, *grads


def theirs(args, options, seed=1):
  hidden, head, targets, weights, _ = args
  above = full.cotangents(weights, seed)
  return full.token_losses(hidden, head, targets, weights > 0, *above, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunk", CHUNKS, ids=str)
def test_chunked_equals_full(options, chunk):
  args = problem(len(options) + chunk[0])
  assert full.errors(ours(args, options, chunk), theirs(args, options)) < TOLERANCE


BROKEN = {
  "cap": ({"soft_cap": 3.0}, {}),
  "another cap": ({"soft_cap": 3.0}, {"soft_cap": 3.1}),
  "smoothing": ({"smoothing": 0.01}, {}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_oracle_notices_an_option_ignored(name):
  mine, other = BROKEN[name]
  args = problem()
  got, want = ours(args, mine, (5, 7)), theirs(args, other)
  assert full.error(got[0], want[0]) > 100 * TOLERANCE
  assert full.error(got[2], want[2]) > 100 * TOLERANCE
  assert full.error(got[3], want[3]) > 100 * TOLERANCE


def test_the_oracle_notices_shifted_targets_and_columns_counted_twice():
  hidden, head, targets, weights, sources = args = problem()
  shifted = (hidden, head, jnp.roll(targets, 1, 1), weights, sources)
  want = theirs(args, {})
  assert full.error(ours(shifted, {}, (5, 7))[0], want[0]) > 100 * TOLERANCE
  # What a last chunk of columns would add if those it shares with the one before counted again.
  twice = (hidden, jnp.concatenate([head, head[:, -4:]], 1), targets, weights, sources)
  assert full.error(ours(twice, {}, (5, 7))[1], want[1]) > 100 * TOLERANCE


def test_smoothing_and_cap_are_those_of_torch():
  import torch

  hidden, head, targets, weights, _ = problem()
  logits = torch.tensor(np.asarray(hidden, np.float64) @ np.asarray(head, np.float64))
  want = torch.nn.functional.cross_entropy(
    (torch.tanh(logits / 5) * 5).flatten(0, 1), torch.tensor(np.asarray(targets)).long().flatten(),
    label_smoothing=0.1, reduction="none",
  ).reshape(2, 13).numpy() * (np.asarray(weights) > 0)
  got = losses.token_losses(hidden, head, targets, weights > 0, soft_cap=5.0, smoothing=0.1)
  assert full.error(got.cross_entropy, want) < TOLERANCE


def test_a_constant_on_all_logits_changes_the_z_loss_only():
  hidden, head, targets, weights, _ = problem()
  wanted = weights > 0
  shift = jnp.concatenate([hidden, jnp.full((2, 13, 1), 2.0)], -1)
  before = losses.token_losses(hidden, head, targets, wanted)
  after = losses.token_losses(shift, jnp.concatenate([head, jnp.ones((1, 31))]), targets, wanted)
  np.testing.assert_allclose(after.cross_entropy, before.cross_entropy, atol=1e-5)
  log_z = jnp.log(jnp.exp(hidden @ head).sum(-1))
  np.testing.assert_allclose(after.z, jnp.where(wanted, (log_z + 2) ** 2, 0), rtol=1e-5)
  assert float(jnp.abs(after.z - before.z).max()) > 1


def test_bf16_products_keep_f32_sums():
  hidden, head, targets, weights, _ = problem()
  low = hidden.astype(jnp.bfloat16)
  total = lambda h, w: losses.token_losses(h, w, targets, weights > 0).cross_entropy.sum()
  value, (grad_hidden, grad_head) = jax.value_and_grad(total, (0, 1))(low, head)
  assert grad_hidden.dtype == jnp.bfloat16 and grad_head.dtype == jnp.float32
  rounded = head.astype(jnp.bfloat16).astype(jnp.float32)
  want = full.token_losses(low.astype(jnp.float32), rounded, targets, weights > 0,
                           weights > 0, weights * 0)
  assert abs(float(value) - want[0].sum()) < 1e-5 * want[0].sum()
  assert full.error(grad_hidden, want[2]) < 1e-2 and full.error(grad_head, want[3]) < 1e-2


def test_sums_are_those_of_each_source():
  hidden, head, targets, weights, sources = problem()
  cross_entropy, z, _, _ = theirs(problem(), {})
  got = losses.loss_sums(hidden, head, targets, weights, sources, 3)
  for source in range(3):
    mine = np.asarray(weights) * (np.asarray(sources) == source)
    np.testing.assert_allclose(got.cross_entropy[source], (cross_entropy * mine).sum(), rtol=1e-5)
    np.testing.assert_allclose(got.z[source], (z * mine).sum(), rtol=1e-5)
  alone = losses.cross_entropy_sums(hidden, head, targets, weights, sources, 3)
  np.testing.assert_array_equal(alone, got.cross_entropy)
  counts = losses.source_sums(weights, sources, 3)
  np.testing.assert_allclose(
    counts[1], np.asarray(weights)[np.asarray(sources) == 1].sum(), rtol=1e-6
  )


def test_slots_without_weight_have_no_gradient_and_no_say():
  hidden, head, targets, weights, sources = problem()
  total = lambda h, t: losses.cross_entropy_sums(h, head, t, weights, sources, 3).sum()
  grad = jax.grad(total)(hidden, targets)
  silent = np.asarray(weights) == 0
  assert silent.any() and not np.asarray(grad)[silent].any()
  assert np.abs(np.asarray(grad)[~silent]).min(-1).max() > 0
  other = jnp.where(weights == 0, (targets + 1) % 31, targets)
  assert total(hidden, targets) == total(hidden, other)


def test_one_row_may_be_all_wanted_and_another_not_at_all():
  hidden, head, targets, weights, sources = problem()
  args = hidden, head, targets, weights.at[0].set(1.0).at[1].set(0.0), sources
  for chunk in ((2, 5), (6, 31), (100, 100)):
    assert full.errors(ours(args, {}, chunk), theirs(args, {})) < TOLERANCE
  nothing = losses.loss_sums(hidden, head, targets, weights * 0, sources, 3)
  np.testing.assert_array_equal(np.asarray(nothing), 0)


def test_what_an_unwanted_slot_holds_never_matters():
  hidden, head, targets, _, _ = problem()
  wanted = jnp.zeros((2, 13), bool).at[:, 9:11].set(True)
  hidden = jnp.where(wanted[..., None], hidden, jnp.nan)

  def total(hidden, head):
    found = losses.token_losses(hidden, head, targets, wanted, chunk=(4, 7))
    return found.cross_entropy.sum() + found.z.sum()

  value, grads = jax.value_and_grad(total, (0, 1))(hidden, head)
  assert np.isfinite(value) and all(np.isfinite(grad).all() for grad in grads)


def test_memory_does_not_grow_with_the_vocabulary():
  def temporary(vocabulary, chunk):
    hidden, head, targets = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (
      ((1, 256, 64), jnp.float32), ((64, vocabulary), jnp.float32), ((1, 256), jnp.int32)))

    def total(hidden, head, targets):
      return losses.token_losses(hidden, head, targets, targets >= 0, chunk=chunk)[0].sum()

    compiled = jax.jit(jax.grad(total, (0, 1))).lower(hidden, head, targets).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(65536, (256, 512)) < 1.5 * temporary(4096, (256, 512))
  assert temporary(65536, (256, 65536)) > 256 * 65536 * 4  # the check sees logits when they exist


def test_a_frozen_head_has_no_gradient_to_pay_for():
  hidden, head, targets, weights, _ = problem()

  def total(hidden, head):
    return losses.token_losses(hidden, head, targets, weights > 0, chunk=(4, 7))[0].sum()

  alone = jax.jit(jax.grad(total))(hidden, head)
  np.testing.assert_array_equal(alone, jax.jit(jax.grad(total, (0, 1)))(hidden, head)[0])
  assert np.asarray(alone).std() > 0

  def products(learned):
    jaxpr = jax.make_jaxpr(jax.grad(total, learned))(hidden, head)
    return str(jaxpr).count("dot_general")

  assert products((0, 1)) == products(0) + 1


def test_a_row_is_cut_so_that_few_slots_cost_little():
  assert losses.piece(2, 512, losses.CHUNK[0]) * 8 == 512
  assert losses.piece(1, 64, losses.CHUNK[0]) == 64  # too few to cut
  assert losses.piece(2, 13, 4) == 2  # what the caller allows
  assert losses.piece(8, 4096, losses.CHUNK[0]) == 256


@pytest.mark.parametrize("change,message", [
  (dict(head=jnp.zeros((9, 31))), r"head \[D,V\]"),
  (dict(targets=jnp.zeros((2, 12), jnp.int32)), r"targets \[B,T\] must be \(2, 13\)"),
  (dict(soft_cap=0.0), "soft_cap must be positive"),
  (dict(smoothing=1.0), r"smoothing must be in \[0, 1\)"),
])
def test_bad_input_is_named(change, message):
  hidden, head, targets, weights, _ = problem()
  given = dict(hidden=hidden, head=head, targets=targets, wanted=weights > 0) | change
  with pytest.raises(ValueError, match=message):
    losses.token_losses(**given)


def test_eight_devices_share_the_vocabulary():
  script = Path(__file__).parent / "sharded_vocabulary.py"
  done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=500)
  assert done.returncode == 0, done.stdout + done.stderr
  assert "BAD" not in done.stdout and done.stdout.count("ok") == 5, done.stdout
