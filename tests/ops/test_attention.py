"""Every implementation against the float64 oracle: values, lse, gradients, on random packs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.attention_base import (
  CLASSES,
  POLICIES,
  RUNNERS,
  error,
  inputs,
  oracle,
  random_bias,
  random_pack,
  run,
  runners,
)
from vlm_jax.core.mask import NEVER, IntervalMask
from vlm_jax.ops.attention import xla

OUT, GRAD = 2e-6, 6e-6  # tolerances of values and gradients, f32
# Each policy with heads, groups, width, soft-cap, bias and whether keys have a bias: every choice
# of one meets several of the others. Policies with the same are one program.
CASES = {
  "causal": (2, 2, 256, None, "none", False),
  "prefix": (3, 1, 72, 4.0, "none", True),
  "spans": (4, 4, 8, None, "rows", False),
  "own_image": (6, 2, 80, 3.0, "shared", False),
  "window": (2, 1, 96, None, "distance", True),
  "last_image_cross": (8, 2, 64, None, "distance", False),
  "last_image": (8, 1, 16, 5.0, "none", True),
  "cut": (4, 2, 88, 4.0, "rows", True),
  "full": (2, 2, 256, None, "none", False),
  "fan_out": (4, 2, 88, 4.0, "rows", True),
}
each_runner = pytest.mark.parametrize("name", RUNNERS)
each_pair = pytest.mark.parametrize("policy, name", [
  (policy, name) for policy in POLICIES
  for name in runners(*(("classes",) if policy in CLASSES else ()))])


def make(name, rng, policy, without=()):
  """The mask, inputs and soft-cap of a policy's case, without what the runner lacks."""
  heads, groups, width, soft_cap, bias, k_bias = CASES[policy]
  lacks, rows, length = RUNNERS[name].lacks.union(without), 2, 70
  mask, keys = random_pack(rng, rows, length, policy)
  x = inputs(rng, rows, length, keys, heads, groups, width, lacks)
  x["bias"] = random_bias(rng, "none" if "bias" in lacks else bias, rows, heads, length, keys)
  if k_bias and "k_bias" not in lacks:
    x["k_bias"] = rng.normal(size=(rows, keys)).astype(np.float32)
  return mask, x, None if "soft_cap" in lacks else soft_cap


def breakages(policy, x, soft_cap):
  """What could go wrong, and which result must show it."""
  heads, groups = CASES[policy][:2]
  found = {"off_by_one": "out"}
  found |= {"lse_ignored": "q"} if x["weigh_lse"].any() else {}
  found |= {"class_ignored": "out"} if policy in CLASSES else {}
  found |= {"groups_swapped": "out"} if groups > 1 else {}
  found |= {"cap_ignored": "out"} if soft_cap else {}
  found |= {"bias_heads_swapped": "out"} if x["bias"] is not None and heads > 1 else {}
  return found | ({"k_bias_ignored": "out"} if x["k_bias"] is not None else {})


def far(got, want):
  """The larger of the errors of out and lse, where there is one."""
  return max(error(a, b) for a, b in zip(got[:2], want[:2], strict=True) if a is not None)


@each_pair
def test_matches_the_oracle(policy, name):
  for seed in range(3):
    rng = np.random.default_rng([POLICIES.index(policy), seed])
    mask, x, soft_cap = make(name, rng, policy)
    got, want = run(name, x, mask, soft_cap), oracle(x, mask, soft_cap)
    assert far(got, want) < OUT
    (out, _, grads), (_, want_lse, want_grads) = got, want
    for part, grad in want_grads.items():
      assert grad is None or error(grads[part], grad) < GRAD, part
    blind = np.isneginf(want_lse)
    assert blind.any(), "the pack has padding"
    assert not np.asarray(out)[blind].any(), "a query without keys returns exactly 0"
    assert not np.asarray(grads["q"])[blind].any(), "and has exactly no gradient"
    # Twins: what is computed is none of these.
    for broken, shows in breakages(policy, x, soft_cap).items():
      wrong, _, wrong_grads = oracle(x, mask, soft_cap, broken)
      if shows == "out":
        assert error(out, wrong) > 100 * OUT, broken
      else:
        assert error(grads[shows], wrong_grads[shows]) > 100 * GRAD, broken


@pytest.mark.parametrize("name, where", [("xla", "cpu"), *((name, "gpu") for name in RUNNERS)])
def test_bfloat16_stays_close(name, where, monkeypatch):
  # Elsewhere than on a CPU, products of xla take bfloat16.
  monkeypatch.setattr(xla, "platform", lambda: where)
  policy = "own_image" if "classes" in RUNNERS[name].lacks else "cut"
  mask, x, soft_cap = make(name, np.random.default_rng(6), policy, without={"bias"})
  half = {part: jnp.asarray(x[part], jnp.bfloat16) for part in ("q", "k", "v")}
  x |= {part: np.asarray(value, np.float32) for part, value in half.items()}
  out, lse, grads = run(name, x | half, mask, soft_cap)
  want = oracle(x, mask, soft_cap)
  assert out.dtype == grads["k"].dtype == jnp.bfloat16 and (lse is None or lse.dtype == jnp.float32)
  assert far((out.astype(jnp.float32), lse), want) < 1e-2
  for part in "qkv":
    assert error(grads[part].astype(jnp.float32), want[2][part]) < 2e-2, part
  assert error(out.astype(jnp.float32), oracle(x, mask, soft_cap, "off_by_one")[0]) > 0.1


@each_pair
def test_nothing_leaks(policy, name):
  """What a query does not see changes not one bit of its output, nor its gradient of that key's."""
  rng = np.random.default_rng(11)
  mask, x, soft_cap = make(name, rng, policy)
  keys = x["k"].shape[1]
  out, _, grads = run(name, x, mask, soft_cap)
  seen = np.asarray(mask.dense(keys))
  for at in rng.permutation(min(keys, 60))[:4]:
    touched = {part: x[part].copy() for part in "kv"}
    touched["k"][:, at] *= 1.5
    touched["v"][:, at] += 100.0
    moved, _, _ = run(name, x | touched, mask, soft_cap)
    changed = (np.asarray(out) != np.asarray(moved)).any((2, 3))
    assert (changed == seen[:, :, at]).all()
    weigh = x["weigh_out"].copy()
    weigh[:, at] += 1.0
    _, _, back = run(name, x | {"weigh_out": weigh}, mask, soft_cap)
    changed = (np.asarray(grads["v"]) != np.asarray(back["v"])).any((2, 3))
    assert (changed <= seen[:, at]).all() and changed.any() == seen[:, at].any()
  # Twin: one more key than the mask shows is noticed by the same comparison.
  wider = dataclasses.replace(mask, hi=np.where(mask.hi > mask.lo, mask.hi + 1, 0))
  more, _, _ = run(name, x, wider, soft_cap)
  assert (np.asarray(out) != np.asarray(more)).any((2, 3))[mask.hi > mask.lo].mean() > 0.5


@pytest.mark.parametrize("name", runners("classes", "k_index"))
def test_a_permutation_of_the_keys_changes_nothing(name):
  rng = np.random.default_rng(3)
  mask, x, soft_cap = make(name, rng, "fan_out", without={"bias", "k_bias"})
  keys = x["k"].shape[1]
  order = np.stack([rng.permutation(keys) for _ in range(2)]).astype(np.int32)
  take = lambda part: np.take_along_axis(part, order[:, :, None, None], 1)
  turned, moved = x | {"k": take(x["k"]), "v": take(x["v"])}, mask.take(k=order)
  got, want = run(name, turned, moved, soft_cap), oracle(x, mask, soft_cap)
  assert far(got, want) < OUT
  for part in "qkv":
    expected = want[2][part] if part == "q" else take(want[2][part])
    assert error(got[2][part], expected) < GRAD
  unsorted = oracle(turned, dataclasses.replace(moved, k_index=None), soft_cap)
  assert error(got[0], unsorted[0]) > 100 * OUT


@pytest.mark.parametrize("name", runners("k_index"))
@pytest.mark.parametrize("length", (1, 21))
def test_a_cache_and_keys_nobody_sees(name, length):
  """Decoding (one query) and a chunk of a prompt, in a cache that is not full."""
  rng, keys = np.random.default_rng(5), 77
  lo = rng.integers(0, 20, (2, length)).astype(np.int32)
  index = np.tile(np.arange(keys, dtype=np.int32), (2, 1))
  index[:, 60:] = NEVER
  mask = IntervalMask(lo, lo + rng.integers(1, 40, lo.shape).astype(np.int32), k_index=index)
  x = inputs(rng, 2, length, keys, 4, 4, 8, RUNNERS[name].lacks)
  out, _, grads = run(name, x, mask)
  want, _, want_grads = oracle(x, mask)
  assert error(out, want) < OUT
  assert not np.asarray(grads["k"][:, 60:]).any()
  for part in "qkv":
    assert error(grads[part], want_grads[part]) < GRAD
  assert error(out, oracle(x, mask, broken="off_by_one")[0]) > 100 * OUT


@each_runner
def test_the_backward_pass_repeats_itself_bit_for_bit(name):
  policy = "window" if "classes" in RUNNERS[name].lacks else "fan_out"
  mask, x, soft_cap = make(name, np.random.default_rng(9), policy)
  first = run(name, x, mask, soft_cap)
  for _ in range(9):
    again = run(name, x, mask, soft_cap)
    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), first, again)
    assert jax.tree.all(same)
