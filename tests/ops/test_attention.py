"""Every implementation against a float64 numpy oracle, forward and backward, on random packs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.core.errors import UsageError
from vlm_jax.core.mask import NEVER, IntervalMask
from vlm_jax.ops.attention import ORDER, attention, choose, make_plan

BLOCK = 16


def random_mask(rng: np.random.Generator, rows: int, length: int, policy: str) -> IntervalMask:
  """Random packed documents with padding at the row's end; `policy` says who sees whom."""
  lo, hi = np.zeros((2, rows, length), np.int32)
  q_class, k_class = np.zeros((2, rows, length), np.int32)
  for row in range(rows):
    start = 0
    while start < length - 8:
      n = int(rng.integers(5, 40))
      end = min(start + n, length - 3)
      image = start + int(rng.integers(1, max(2, end - start)))
      index = np.arange(start, end)
      lo[row, start:end] = start
      hi[row, start:end] = index + 1
      if policy in ("prefix", "fan_out", "cut"):
        hi[row, start:image] = image
      if policy == "window":
        lo[row, start:end] = np.maximum(start, index - 4)
      if policy == "full":
        hi[row, start:end] = end
      if policy == "fan_out":
        q_class[row, image:end] = 1 + (index[image - start :] - image) // 5
        k_class[row, image:end] = q_class[row, image:end]
      if policy == "cut":  # images see themselves and text, text sees everything
        k_class[row, start:image] = q_class[row, start:image] = 1 + start
        q_class[row, image:end:2] = -1
      start = end
  classes = policy in ("fan_out", "cut")
  return IntervalMask(lo, hi, q_class if classes else None, k_class if classes else None)


def oracle(q, k, v, mask, weight, bias=0.0):
  """Output and gradients of sum(out * weight) in float64, written from the definition."""
  q, k, v, weight = (np.asarray(x, np.float64) for x in (q, k, v, weight))
  repeats = q.shape[2] // k.shape[2]
  keys, values = np.repeat(k, repeats, 2), np.repeat(v, repeats, 2)
  scale = q.shape[-1] ** -0.5
  logits = np.einsum("bthc,bshc->bhts", q, keys) * scale + np.asarray(bias, np.float64)
  seen = np.asarray(mask.dense(k.shape[1]))[:, None]
  logits = np.where(seen, logits, -np.inf)
  top = np.where(seen.any(-1, keepdims=True), logits.max(-1, keepdims=True), 0.0)
  weights = np.exp(logits - top)
  weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
  out = np.einsum("bhts,bshc->bthc", weights, values)
  inner = np.einsum("bthc,bshc->bhts", weight, values)
  grad_logits = weights * (inner - (inner * weights).sum(-1, keepdims=True)) * scale
  fold = lambda x: x.reshape(*k.shape[:3], repeats, -1).sum(3)
  return out, (
    np.einsum("bhts,bshc->bthc", grad_logits, keys),
    fold(np.einsum("bhts,bthc->bshc", grad_logits, q)),
    fold(np.einsum("bhts,bthc->bshc", weights, weight)),
  )


def inputs(rng, rows, length, heads, groups, width, keys=None):
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  keys = keys or length
  return (draw(rows, length, heads, width), draw(rows, keys, groups, width),
          draw(rows, keys, groups, width), draw(rows, length, heads, width))


def run(implementation, q, k, v, weight, mask):
  mask = jax.tree.map(jnp.asarray, mask)

  @jax.jit
  def both(q, k, v, mask):
    plan = make_plan(mask, k.shape[1], block_q=BLOCK, block_k=BLOCK)

    def total(q, k, v):
      out = attention(q, k, v, mask, plan=plan, implementation=implementation)
      return (out * weight).sum(), out

    grads, out = jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)
    return out, grads

  return both(q, k, v, mask)


def error(got, want) -> float:
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert np.isfinite(got).all()
  assert want.std() > 1e-3
  return float(np.abs(got - want).max() / np.abs(want).max())


POLICIES = ("causal", "prefix", "window", "full", "fan_out", "cut")


@pytest.mark.parametrize("implementation", ORDER)
@pytest.mark.parametrize("policy", POLICIES)
def test_matches_the_oracle(implementation, policy):
  rng = np.random.default_rng(POLICIES.index(policy))
  for heads, groups, length, width in ((4, 2, 70, 16), (3, 1, 64, 8)):
    mask = random_mask(rng, 2, length, policy)
    q, k, v, weight = inputs(rng, 2, length, heads, groups, width)
    out, grads = run(implementation, q, k, v, weight, mask)
    want, want_grads = oracle(q, k, v, mask, weight)
    assert error(out, want) < 2e-6
    assert not np.asarray(out[:, -3:]).any(), "padding must return exactly 0"
    assert not np.asarray(grads[0][:, -3:]).any(), "padding must have exactly zero gradient"
    for got, expected in zip(grads, want_grads, strict=True):
      assert error(got, expected) < 5e-6


@pytest.mark.parametrize("implementation", ORDER)
@pytest.mark.parametrize("broken", ("off_by_one", "class_ignored", "groups_swapped"))
def test_the_oracle_notices_a_broken_kernel(implementation, broken):
  rng = np.random.default_rng(7)
  mask = random_mask(rng, 2, 70, "fan_out")
  q, k, v, weight = inputs(rng, 2, 70, 4, 2, 16)
  want, want_grads = oracle(q, k, v, mask, weight)
  if broken == "off_by_one":
    mask = IntervalMask(mask.lo, np.maximum(mask.hi - 1, 0), mask.q_class, mask.k_class)
  elif broken == "class_ignored":
    mask = IntervalMask(mask.lo, mask.hi)
  else:
    k, v = k[:, :, ::-1], v[:, :, ::-1]
  out, grads = run(implementation, q, k, v, weight, mask)
  assert error(out, want) > 100 * 2e-6
  assert error(grads[0], want_grads[0]) > 100 * 5e-6


@pytest.mark.parametrize("implementation", ORDER)
def test_a_permutation_of_the_keys_changes_nothing(implementation):
  rng = np.random.default_rng(3)
  mask = random_mask(rng, 2, 70, "fan_out")
  q, k, v, weight = inputs(rng, 2, 70, 4, 2, 16)
  order = np.stack([rng.permutation(70) for _ in range(2)]).astype(np.int32)
  moved = mask.take(k=order)
  take = lambda x: jnp.take_along_axis(x, order[:, :, None, None], 1)
  want, _ = run(implementation, q, k, v, weight, mask)
  got, _ = run(implementation, q, take(k), take(v), weight, moved)
  assert error(got, want) < 2e-6
  wrong = IntervalMask(moved.lo, moved.hi, moved.q_class, moved.k_class)  # k_index dropped
  got, _ = run(implementation, q, take(k), take(v), weight, wrong)
  assert error(got, want) > 100 * 2e-6


@pytest.mark.parametrize("implementation", ORDER)
def test_cross_attention_with_keys_nobody_sees(implementation):
  rng = np.random.default_rng(5)
  keys = 37
  lo = rng.integers(0, 20, (2, 21)).astype(np.int32)
  index = np.tile(np.arange(keys, dtype=np.int32), (2, 1))
  index[:, 30:] = NEVER
  mask = IntervalMask(lo, lo + rng.integers(0, 12, lo.shape).astype(np.int32), k_index=index)
  q, k, v, weight = inputs(rng, 2, 21, 4, 4, 8, keys)
  out, grads = run(implementation, q, k, v, weight, mask)
  want, want_grads = oracle(q, k, v, mask, weight)
  assert error(out, want) < 2e-6
  assert not np.asarray(grads[1][:, 30:]).any()
  for got, expected in zip(grads, want_grads, strict=True):
    assert error(got, expected) < 5e-6


def test_a_bias_is_added_or_refused():
  rng = np.random.default_rng(8)
  mask = random_mask(rng, 2, 70, "fan_out")
  q, k, v, weight = inputs(rng, 2, 70, 4, 2, 16)
  bias = jnp.asarray(rng.normal(size=(2, 4, 70, 70)), jnp.float32)
  run_dense = jax.jit(lambda q, k, v, bias: attention(q, k, v, mask, bias=bias))

  def total(q, k, v, bias):
    out = run_dense(q, k, v, bias)
    return (out * weight).sum(), out

  grads, out = jax.grad(total, (0, 1, 2, 3), has_aux=True)(q, k, v, bias)
  want, want_grads = oracle(q, k, v, mask, weight, bias)
  assert error(out, want) < 2e-6
  for got, expected in zip(grads, want_grads, strict=False):
    assert error(got, expected) < 5e-6
  # Its gradient is that of the logits: none outside the mask, and nothing in total for a query.
  assert not np.asarray(grads[3])[~np.repeat(mask.dense()[:, None], 4, 1)].any()
  np.testing.assert_allclose(np.asarray(grads[3]).sum(-1), 0, atol=1e-5)
  # Twin: heads in another order.
  assert error(run_dense(q, k, v, bias[:, ::-1]), want) > 100 * 2e-6
  with pytest.raises(UsageError, match="xla: it cannot add a bias to the logits; dense can"):
    plan = make_plan(jax.tree.map(jnp.asarray, mask), 70, block_q=BLOCK, block_k=BLOCK)
    attention(q, k, v, mask, plan=plan, bias=bias, implementation="xla")
  with pytest.raises(ValueError, match=r"bias \[B,H,T,S\] must be \(2, 4, 70, 70\)"):
    attention(q, k, v, mask, bias=bias[:, :2])


def test_bfloat16_stays_close_to_float32():
  rng = np.random.default_rng(6)
  mask = random_mask(rng, 2, 70, "prefix")
  q, k, v, weight = inputs(rng, 2, 70, 4, 2, 16)
  want, _ = oracle(q, k, v, mask, weight)
  half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
  for implementation in ORDER:
    out, _ = run(implementation, *half, weight, mask)
    assert out.dtype == jnp.bfloat16
    assert error(out.astype(jnp.float32), want) < 3e-2


@pytest.mark.parametrize("policy", POLICIES)
def test_plan_never_skips_a_visible_block(policy):
  for seed in range(60):
    rng = np.random.default_rng(seed)
    mask = random_mask(rng, 2, 96, policy)
    plan = make_plan(jax.tree.map(jnp.asarray, mask), 96, block_q=16, block_k=8)
    blocks = mask.dense().reshape(2, 6, 16, 12, 8)
    some, every = blocks.any((2, 4)), blocks.all((2, 4))
    kinds = np.asarray(plan.kinds)
    assert ((kinds > 0) >= some).all(), "a visible block was skipped"
    assert ((kinds == 2) <= every).all(), "a partial block was called full"
    if mask.q_class is None:
      assert ((kinds > 0) == some).all() and ((kinds == 2) == every).all()
    count = np.asarray(plan.k_count)
    for row, i in np.ndindex(*count.shape):
      listed = np.asarray(plan.k_blocks)[row, i, : count[row, i]]
      assert (listed == np.flatnonzero(kinds[row, i])).all()


def test_choose_says_why():
  mask = jax.tree.map(jnp.asarray, random_mask(np.random.default_rng(0), 1, 70, "causal"))
  plan = make_plan(mask, 70, block_q=16, block_k=16)
  shape = (1, 70, 4, 16)
  assert choose(shape, shape, plan) == ("xla", {})
  name, refusals = choose(shape, shape, None)
  assert name == "dense" and "needs an AttentionPlan" in refusals["xla"]
  with pytest.raises(UsageError, match="declines: xla: it needs an AttentionPlan"):
    choose(shape, shape, None, "xla")
  with pytest.raises(UsageError, match="did you mean 'dense'"):
    choose(shape, shape, None, "dens")


def test_shapes_that_do_not_fit_are_named():
  q = jnp.zeros((1, 4, 4, 8))
  mask = IntervalMask(jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), jnp.int32))
  with pytest.raises(ValueError, match="H a multiple of G"):
    attention(q, jnp.zeros((1, 4, 3, 8)), jnp.zeros((1, 4, 3, 8)), mask)
  with pytest.raises(ValueError, match="k and v must have one shape"):
    attention(q, q, q[:, :3], mask)
  with pytest.raises(ValueError, match=r"mask.lo must be \(2, 4\)"):
    attention(jnp.zeros((2, 4, 4, 8)), jnp.zeros((2, 4, 4, 8)), jnp.zeros((2, 4, 4, 8)), mask)
