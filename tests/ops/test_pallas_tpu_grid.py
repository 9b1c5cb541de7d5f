"""Which steps the TPU kernels take, what they keep on the chip, on which devices, and when not."""

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

from tests.ops.tpu_cases import TOLERANCE, documents, errors, inputs, oracle, program
from vlm_jax.core.mask import IntervalMask
from vlm_jax.ops.attention import make_plan, pallas_tpu, pallas_tpu_forward
from vlm_jax.ops.attention.pallas_tpu_layout import ENDS, STARTS, WHOLE, Pairs


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
  want = oracle(x, mask, biased=True)
  found = errors(run(x, mask), want, want)
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
  rows = (16, 2**17, 8, 128)
  many = request(plan=blocks(16, 128, 1024), q_shape=rows, k_shape=rows)
  assert pallas_tpu.declines(many).startswith("16 rows of 128 x 128 blocks")


@pytest.mark.parametrize("length,smem,vmem", [
  (8192, 1024, 7_897_088), (32768, 4096, 15_794_176), (131072, 65536, 15_794_176)])
def test_memory_is_what_the_docstrings_say(length, smem, vmem):
  block_q, block_k = pallas_tpu.block_sizes(length, length, 128, jnp.bfloat16)
  assert pallas_tpu.smem_bytes(1, length // block_q, length // block_k) == smem
  assert pallas_tpu.vmem_bytes(block_q, block_k, 128, jnp.bfloat16) == vmem


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


def test_eight_devices_are_one():
  script = Path(__file__).with_name("tpu_devices.py")
  done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=550)
  assert done.returncode == 0 and done.stdout.endswith("ok\n"), done.stdout + done.stderr[-3000:]
