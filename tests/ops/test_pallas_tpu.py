"""The TPU kernels in interpret mode, against a float64 oracle; what they prefetch, and when not."""

import dataclasses
import functools
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from tests.ops.tpu_cases import TOLERANCE, cross, documents, errors, inputs, oracle, program
from vlm_jax.core.mask import IntervalMask
from vlm_jax.ops.attention import make_plan, pallas_tpu, pallas_tpu_forward
from vlm_jax.ops.attention.pallas_tpu_layout import ENDS, STARTS, WHOLE, Pairs

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

  def mask(self, rng) -> IntervalMask:
    if self.keys is not None:
      return cross(rng, 2, self.length, self.keys)
    mask = documents(rng, 2, self.length, self.policy)
    if self.length > 300:  # a whole block of queries, and one of keys, without a visible pair
      mask.lo[1, 128:256] = mask.hi[1, 128:256] = 0
      mask.hi[1, 256:] = np.maximum(mask.hi[1, 256:], mask.lo[1, 256:])
    return mask

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
  "cut, soft cap, key bias": Case("cut", 2, 1, 128, soft_cap=3.0, biased=True),
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


def broken(case: Case, how: str, x, mask: IntervalMask):
  """Inputs that give the kernel something else to do than the oracle does."""
  replace = functools.partial(dataclasses.replace, mask)
  if how == "off by one":
    return x, replace(hi=np.maximum(mask.hi - 1, 0))
  if how == "class ignored":
    return x, replace(q_class=np.zeros_like(mask.lo))
  if how == "k_index ignored":
    return x, replace(k_index=np.tile(np.arange(case.keys, dtype=np.int32), (2, 1)))
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


def test_eight_devices_are_one():
  script = Path(__file__).with_name("eight_devices.py")
  done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
  assert done.returncode == 0 and done.stdout.endswith("ok\n"), done.stdout + done.stderr[-3000:]


def test_pairs_are_those_of_the_plan_in_order():
  rng = np.random.default_rng(0)
  for batch, runs, members in ((1, 1, 1), (2, 3, 5), (3, 8, 4), (1, 16, 17)):
    kinds = rng.integers(0, 3, (batch, runs, members)).astype(np.int8)
    kinds[0, 0] = 0
    pairs = Pairs(runs, members)
    entries, steps = (np.asarray(x) for x in pairs.compact(jnp.asarray(kinds)))
    active = np.argwhere(kinds)
    assert steps == max(1, len(active)) and entries.size == kinds.size
    listed = entries[:len(active)]
    where = np.stack([pairs.row(listed), pairs.run(listed), pairs.member(listed)], 1)
    assert (where == active).all()
    assert ((listed & WHOLE > 0) == (kinds[kinds > 0] == 2)).all()
    # A run's steps are neighbours: its block is written once, whatever the order of the adding.
    edge = (np.diff(active[:, :2], axis=0) != 0).any(1)
    assert ((listed & STARTS > 0) == np.r_[[True] * (len(active) > 0), edge]).all()
    assert ((listed & ENDS > 0) == np.r_[edge, [True] * (len(active) > 0)]).all()
    assert not entries[len(active):].any()


@pytest.fixture
def interpreter():
  pltpu.reset_tpu_interpret_mode_state()
  yield
  pltpu.reset_tpu_interpret_mode_state()


def test_steps_are_the_active_blocks_of_the_plan(interpreter):
  visited = []

  def record(token, grid_point, core):
    visited.append(grid_point)
    return token

  attend = functools.partial(
    pallas_tpu.attend, interpret=pltpu.InterpretParams(grid_point_recorder=record))
  both = program(attend, (128, 128))

  @jax.jit
  def forward(x, mask):
    plan = make_plan(mask, 256, block_q=128, block_k=128)
    return attend(x["q"], x["k"], x["v"], mask, plan, scale=1.0)

  counts = set()
  for seed in range(20):
    rng = np.random.default_rng(seed)
    mask = documents(rng, 2, 256, ("causal", "prefix", "window", "full")[seed % 4])
    x = inputs(rng, (2, 256, 1, 8), (2, 256, 1, 8))
    mask.hi[1, 128 * (seed % 3):] = 0
    mask = jax.tree.map(jnp.asarray, mask)
    active = int(make_plan(mask, 256, block_q=128, block_k=128).k_count.sum())
    visited.clear()
    jax.block_until_ready(forward(x, mask))
    assert len(visited) == active
    counts.add(active)
    if seed < 2:  # and once in each of the two backward kernels
      visited.clear()
      jax.block_until_ready(both(x, mask))
      assert len(visited) == 3 * active
  assert len(counts) > 3 and min(counts) < 4  # of 8 blocks


def races() -> bool:
  """Whether the detector finds a race in a forward pass of 2 heads on two simulated cores."""
  rng = np.random.default_rng(0)
  mask = jax.tree.map(jnp.asarray, documents(rng, 1, 256, "prefix"))
  x = inputs(rng, (1, 256, 2, 8), (1, 256, 1, 8))
  plan = make_plan(mask, 256, block_q=128, block_k=128)
  params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
  out, _ = pallas_tpu.attend(x["q"], x["k"], x["v"], mask, plan, scale=8**-0.5, interpret=params)
  jax.block_until_ready(out)
  return interpret_pallas_call.races.races_found


def test_no_race_on_two_cores(interpreter):
  assert not races()


def test_the_race_detector_notices_two_cores_that_write_one_block(interpreter, monkeypatch):
  specs = pallas_tpu_forward.forward_specs

  def shared(call, operands):
    own = specs(call, operands)
    first = lambda head, *rest: own.q.index_map(jnp.int32(0), *rest)
    return dataclasses.replace(own, q=dataclasses.replace(own.q, index_map=first))

  monkeypatch.setattr(pallas_tpu_forward, "forward_specs", shared)
  assert races()


def test_no_race_in_the_backward_kernels(interpreter):
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  run = program(functools.partial(pallas_tpu.attend, interpret=params), (128, 128), biased=True)
  rng = np.random.default_rng(1)
  mask = documents(rng, 1, 250, "cut")
  x = inputs(rng, (1, 250, 2, 8), (1, 250, 1, 8))
  found = errors(run(x, mask), oracle(x, mask, biased=True), (*NAMES, "k_bias"))
  assert max(found.values()) < TOLERANCE, found
  assert not interpret_pallas_call.races.races_found


def request(**changes):
  """A call that is not declined, with changes."""
  mask = jax.tree.map(jnp.asarray, documents(np.random.default_rng(0), 1, 256, "causal"))
  plan = make_plan(mask, 256, block_q=128, block_k=128)
  defaults = dict(
    q_shape=(1, 256, 4, 64), k_shape=(1, 256, 2, 64), dtype=jnp.bfloat16, plan=plan, has_bias=False,
    has_k_bias=True, soft_cap=None, has_classes=True, has_k_index=True, platform="tpu", asked=False)
  return types.SimpleNamespace(**(defaults | changes))


def blocks(batch: int, number: int, size: int):
  """A plan of that many blocks of size x size; only its shape is read."""
  plan = make_plan(IntervalMask(jnp.zeros((1, 8), jnp.int32), jnp.ones((1, 8), jnp.int32)), 8,
                   block_q=8, block_k=8)
  kinds = jax.ShapeDtypeStruct((batch, number, number), jnp.int8)
  return dataclasses.replace(plan, kinds=kinds, block_q=size, block_k=size)


@pytest.mark.parametrize("changes,reason", [
  (dict(platform="cpu"), "it runs on a TPU, and this is 'cpu'"),
  (dict(has_bias=True), "cannot add a bias of T x S"),
  (dict(plan=None), "needs an AttentionPlan"),
  (dict(plan=blocks(1, 16, 16)), "multiples of 128 and the plan has 16 x 16"),
  (dict(dtype=jnp.float16), "not in float16"),
  (dict(q_shape=(1, 500, 4, 64)), r"the plan is of \(1, 2, 2\) blocks, .* have \(1, 4, 2\)"),
  (dict(q_shape=(1, 256, 4, 320)), "width 320 are wider than 256"),
  (dict(plan=blocks(16, 128, 1024), q_shape=(16, 2**17, 8, 64), k_shape=(16, 2**17, 8, 64)),
   "take 1048576 bytes of scalar memory, more than 943718: use fewer rows"),
  (dict(plan=blocks(1, 1, 2048), q_shape=(1, 2048, 4, 256), k_shape=(1, 2048, 2, 256)),
   "bytes of vector memory, more than 30198988: make the plan with"),
])
def test_declines_with_the_reason(changes, reason):
  with pytest.raises(AssertionError, match=reason):
    assert not pallas_tpu.declines(request(**changes)), pallas_tpu.declines(request(**changes))


def test_takes_what_it_can_do():
  assert pallas_tpu.declines(request()) is None
  rows = (14, 2**17, 8, 128)
  assert pallas_tpu.declines(
    request(plan=blocks(14, 128, 1024), q_shape=rows, k_shape=rows)) is None


@pytest.mark.parametrize("length,smem", [(8192, 1024), (32768, 4096), (131072, 65536)])
def test_memory_is_what_the_docstrings_say(length, smem):
  block_q, block_k = pallas_tpu.block_sizes(length, length, 128, jnp.bfloat16)
  assert pallas_tpu.smem_bytes(1, length // block_q, length // block_k) == smem
  assert pallas_tpu.vmem_bytes(1024, 1024, 128, jnp.bfloat16) == VMEM_1024
  assert min(block_q, block_k) >= 512


VMEM_1024 = 15_794_176


def test_block_sizes():
  size = pallas_tpu.block_sizes
  assert size(8192, 8192, 128, jnp.bfloat16) == (512, 512)
  assert size(8192, 8192, 128, jnp.bfloat16, "TPU v6 lite") == (1024, 1024)
  assert size(32768, 32768, 128, jnp.bfloat16) == (1024, 1024)
  assert size(32768, 32768, 128, jnp.float32) == size(32768, 32768, 256, jnp.bfloat16) == (512, 512)
  assert size(300, 2048, 64, jnp.bfloat16) == (384, 512)


def test_the_cost_is_of_active_blocks_where_their_number_is_known():
  rng = np.random.default_rng(0)
  mask = jax.tree.map(jnp.asarray, documents(rng, 1, 1024, "window"))
  q = jnp.zeros((1, 1024, 1, 8))

  def flops(plan):
    attend = functools.partial(pallas_tpu.attend, scale=1.0, interpret=True)
    jaxpr = str(jax.make_jaxpr(lambda q: attend(q, q, q, mask, plan))(q))
    return int(jaxpr.split("flops=")[1].split(",")[0])

  plan = make_plan(mask, 1024, block_q=128, block_k=128)
  active = int(plan.k_count.sum())
  known = flops(plan)
  assert 4 * 128**3 * active <= known < 2 * 4 * 128**3 * active
  bound = []
  jax.make_jaxpr(lambda kinds: bound.append(flops(dataclasses.replace(plan, kinds=kinds))))(
    plan.kinds)
  assert bound == [4 * 128**3 * 64]
