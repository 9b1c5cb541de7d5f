"""The stock splash kernel driven by intervals, in interpret mode, against the float64 oracle."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.tpu_cases import TOLERANCE, documents, errors, inputs, oracle, program
from vlm_jax.core.mask import IntervalMask
from vlm_jax.ops.attention import make_plan, splash

NAMES = ("out", "lse", "q", "k", "v")


@functools.cache
def compiled(soft_cap):
  return program(functools.partial(splash.attend, interpret=True), (128, 128), soft_cap)


def draw(policy: str, seed: int):
  rng = np.random.default_rng(seed)
  if policy == "cross":
    lo = rng.integers(0, 260, (2, 200)).astype(np.int32)
    mask = IntervalMask(lo, lo + rng.integers(0, 40, lo.shape).astype(np.int32))
    return inputs(rng, (2, 200, 4, 64), (2, 300, 2, 64)), mask
  mask = documents(rng, 2, 300, policy)
  mask.hi[1, 128:256] = 0  # a block of queries that see nothing
  return inputs(rng, (2, 300, 4, 64), (2, 300, 2, 64)), mask


@pytest.mark.parametrize("policy,soft_cap", [
  ("causal", None), ("prefix", None), ("window", 2.0), ("cross", None)])
def test_matches_the_oracle(policy, soft_cap):
  x, mask = draw(policy, 0)
  got = compiled(soft_cap)(x, mask)
  found = errors(got, oracle(x, mask, soft_cap=soft_cap), NAMES)
  assert max(found.values()) < TOLERANCE, found
  nothing = mask.lo >= mask.hi
  assert nothing.any() and not np.asarray(got["out"])[nothing].any()
  assert not np.asarray(got["q"])[nothing].any()


@pytest.mark.parametrize("how", ["off by one", "groups swapped", "lse gradient", "soft cap"])
def test_the_oracle_notices_a_broken_kernel(how):
  x, mask = draw("window", 1)
  want = oracle(x, mask, soft_cap=None if how == "soft cap" else 2.0,
                lse_gradient=how != "lse gradient")
  if how == "off by one":
    mask = dataclasses.replace(mask, lo=mask.lo + (mask.lo + 1 < mask.hi))
  if how == "groups swapped":
    x = x | dict(k=x["k"][:, :, ::-1], v=x["v"][:, :, ::-1])
  found = errors(compiled(2.0)(x, mask), want, ("q", "k"))
  assert min(found.values()) > 100 * TOLERANCE, found


def test_bfloat16_stays_close_to_the_oracle_of_the_same_inputs():
  x, mask = draw("prefix", 2)
  half = {name: jnp.asarray(x[name], jnp.bfloat16) for name in ("q", "k", "v")}
  got = compiled(None)(x | half, mask)
  assert got["out"].dtype == got["q"].dtype == jnp.bfloat16
  assert max(errors(got, oracle(x | half, mask), NAMES).values()) < 2e-2


@pytest.mark.parametrize("changes,reason", [
  (dict(), None),
  (dict(platform="cpu"), "it runs on a TPU, and this is 'cpu'"),
  (dict(plan=None), "needs an AttentionPlan"),
  (dict(has_classes=True), "no classes"),
  (dict(has_k_index=True), "no k_index"),
  (dict(has_bias=True), "cannot add a bias"),
  (dict(has_k_bias=True), "cannot add a bias"),
  (dict(k_shape=(1, 2**15, 2, 64)), "at most 32767 keys"),
  (dict(block_q=64), "multiples of 128, not 64 x 128"),
])
def test_declines_with_the_reason(changes, reason):
  mask = jax.tree.map(jnp.asarray, documents(np.random.default_rng(0), 1, 256, "causal"))
  plan = make_plan(mask, 256, block_q=changes.pop("block_q", 128), block_k=128)
  defaults = dict(
    q_shape=(1, 256, 4, 64), k_shape=(1, 256, 2, 64), dtype=jnp.bfloat16, plan=plan, has_bias=False,
    has_k_bias=False, soft_cap=2.0, has_classes=False, has_k_index=False, platform="tpu",
    asked=False)
  found = splash.declines(types.SimpleNamespace(**(defaults | changes)))
  assert found is None if reason is None else reason in found
