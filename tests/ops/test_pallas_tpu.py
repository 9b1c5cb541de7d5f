"""What the TPU kernels compute, in interpret mode, against a float64 oracle on random packs."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.tpu_cases import TOLERANCE, cross, documents, errors, inputs, oracle, program
from vlm_jax.core.mask import IntervalMask
from vlm_jax.ops.attention import pallas_tpu

ATTEND = functools.partial(pallas_tpu.attend, interpret=True)
NAMES = ("out", "lse", "q", "k", "v")


@dataclasses.dataclass(frozen=True)
class Case:
  policy: str
  heads: int
  groups: int
  width: int
  length: int = 200
  blocks: tuple[int, int] = (128, 128)
  keys: int | None = None
  soft_cap: float | None = None
  biased: bool = False
  shuffled: bool = False  # keys out of order: a k_index

  def mask(self, rng) -> IntervalMask:
    if self.keys is not None:
      return cross(rng, 2, self.length, self.keys)
    mask = documents(rng, 2, self.length, self.policy)
    if self.length > 300:  # a whole block of queries, and one of keys, without a visible pair
      mask.lo[1, 128:256] = mask.hi[1, 128:256] = 0
    order = np.stack([rng.permutation(self.length) for _ in range(2)]).astype(np.int32)
    return mask.take(k=order) if self.shuffled else mask

  def draw(self, seed: int):
    rng = np.random.default_rng(seed)
    q_shape = (2, self.length, self.heads, self.width)
    k_shape = (2, self.keys or self.length, self.groups, self.width)
    return inputs(rng, q_shape, k_shape), self.mask(rng)

  @property
  def names(self):
    return NAMES + (("k_bias",) if self.biased else ())


CASES = {
  "causal": Case("causal", 2, 2, 64),
  "prefix, 3 heads on 1 group": Case("prefix", 3, 1, 72, blocks=(128, 256)),
  "window, soft cap": Case("window", 2, 1, 80, soft_cap=2.0),
  "fan out, empty blocks": Case("fan_out", 4, 2, 96, length=390),
  "cut, soft cap, key bias": Case("cut", 2, 1, 128, soft_cap=3.0, biased=True, shuffled=True),
  "full, key bias, wide": Case("full", 1, 1, 160, biased=True, blocks=(256, 128)),
  "cross, k_index": Case("cross", 2, 1, 64, length=150, keys=300),
}


@functools.cache
def compiled(case: Case):
  return program(ATTEND, case.blocks, case.soft_cap, case.biased)


@pytest.mark.parametrize("name", CASES)
def test_matches_the_oracle(name):
  case = CASES[name]
  for seed in range(3):  # one program, other packs
    x, mask = case.draw(seed)
    got = compiled(case)(x, mask)
    want = oracle(x, mask, soft_cap=case.soft_cap, biased=case.biased)
    found = errors(got, want, case.names)
    assert max(found.values()) < TOLERANCE, found
    nothing = ~np.asarray(mask.dense(x["k"].shape[1])).any(-1)
    assert nothing.any()
    assert not np.asarray(got["out"])[nothing].any(), "a query without keys must return exactly 0"
    assert not np.asarray(got["q"])[nothing].any(), "and have exactly zero gradient"


def test_a_batch_that_sees_nothing_at_all():
  case = CASES["causal"]
  x, mask = case.draw(0)
  got = compiled(case)(x, dataclasses.replace(mask, hi=mask.lo))
  assert np.isneginf(got["lse"]).all()
  assert not any(np.asarray(got[name]).any() for name in ("out", "q", "k", "v"))


def broken(case: Case, how: str, x, mask: IntervalMask):
  """Inputs that give the kernel something else to do than the oracle does."""
  replace = functools.partial(dataclasses.replace, mask)
  if how == "off by one":
    return x, replace(hi=np.maximum(mask.hi - 1, 0))
  if how == "class ignored":
    return x, replace(q_class=np.zeros_like(mask.lo))
  if how == "k_index ignored":
    return x, replace(k_index=np.broadcast_to(np.arange(mask.keys(), dtype=np.int32),
                                              mask.k_index.shape))
  if how == "groups swapped":
    return x | dict(k=x["k"][:, :, ::-1], v=x["v"][:, :, ::-1]), mask
  assert how == "key bias negated"
  return x | dict(k_bias=-x["k_bias"]), mask


@pytest.mark.parametrize("name,how", [
  ("causal", "off by one"),
  ("fan out, empty blocks", "class ignored"),
  ("fan out, empty blocks", "groups swapped"),
  ("cut, soft cap, key bias", "class ignored"),
  ("cut, soft cap, key bias", "key bias negated"),
  ("cut, soft cap, key bias", "k_index ignored"),
  ("full, key bias, wide", "key bias negated"),
  ("cross, k_index", "k_index ignored"),
])
def test_the_oracle_notices_a_broken_kernel(name, how):
  case = CASES[name]
  x, mask = case.draw(0)
  want = oracle(x, mask, soft_cap=case.soft_cap, biased=case.biased)
  got = compiled(case)(*broken(case, how, x, mask))
  got["lse"] = np.where(np.isneginf(want["lse"]), -np.inf,
                        np.where(np.isneginf(got["lse"]), 0.0, got["lse"]))
  found = errors(got, want, ("out", "lse", "q", "k"))
  assert min(found.values()) > 100 * TOLERANCE, found


@pytest.mark.parametrize("name,options", [
  ("window, soft cap", dict(soft_cap=None)),
  ("prefix, 3 heads on 1 group", dict(lse_gradient=False)),
])
def test_the_oracle_notices_a_term_left_out(name, options):
  case = CASES[name]
  x, mask = case.draw(0)
  want = oracle(x, mask, **(dict(soft_cap=case.soft_cap, biased=case.biased) | options))
  found = errors(compiled(case)(x, mask), want, ("q", "k"))
  assert min(found.values()) > 100 * TOLERANCE, found


def test_bfloat16_stays_close_to_the_oracle_of_the_same_inputs():
  case = CASES["prefix, 3 heads on 1 group"]
  x, mask = case.draw(4)
  half = {name: jnp.asarray(x[name], jnp.bfloat16) for name in ("q", "k", "v")}
  got = compiled(case)(x | half, mask)
  assert got["out"].dtype == got["q"].dtype == jnp.bfloat16
  assert got["lse"].dtype == jnp.float32
  found = errors(got, oracle(x | half, mask), NAMES)
  assert max(found.values()) < 2e-2, found


def test_a_document_does_not_notice_another_and_ten_runs_are_one():
  case = CASES["fan out, empty blocks"]
  x, mask = case.draw(5)
  got = compiled(case)(x, mask)
  for _ in range(10):
    again = compiled(case)(x, mask)
    assert all((np.asarray(again[name]) == np.asarray(got[name])).all() for name in NAMES)
  end = int(np.flatnonzero(mask.lo[0] > 0)[0])  # of the first document of row 0
  changed = {name: x[name].copy() for name in ("q", "k", "v")}
  for value in changed.values():
    value[0, :end] += 1.0
  other = compiled(case)(x | changed, mask)
  for name in NAMES:
    before, after = np.asarray(got[name]), np.asarray(other[name])
    assert (before[0, end:] == after[0, end:]).all() and (before[1] == after[1]).all(), name
    assert (before[0, :end] != after[0, :end]).any(), name
