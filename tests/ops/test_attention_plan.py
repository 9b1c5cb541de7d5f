"""The plan against the whole mask, on thousands of random packs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.attention_base import CLASSES, POLICIES, random_pack
from vlm_jax.ops.attention import block_sizes, make_plan, xla

ROWS, LENGTH = 50, 256


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def plan_of(mask, keys, block_q, block_k):
  plan = make_plan(mask, keys, block_q=block_q, block_k=block_k)
  return plan, xla._windows(mask, plan, keys)


def blocks_of(dense, block_q, block_k):
  """bool[B,T,S] to [B,Q,block_q,K,block_k], padded."""
  batch, length, keys = dense.shape
  dense = np.pad(dense, ((0, 0), (0, -length % block_q), (0, -keys % block_k)))
  return dense.reshape(batch, -1, block_q, dense.shape[2] // block_k, block_k)


def met(starts, count, length, keys, block_q, block_k):
  """How often each key is met by each query, i32[B,T,S], from the windows of the blocks."""
  index = np.arange(keys)
  step = np.arange(starts.shape[1])[:, None]
  inside = (starts[..., None] <= index) & (index < starts[..., None] + block_k)
  times = (inside & (step < count[:, None, None])).sum(1)
  return times.reshape(ROWS, -1, keys).repeat(block_q, 1)[:, :length]


@pytest.mark.parametrize("policy", POLICIES)
def test_never_skips_a_visible_block(policy):
  active = exact = 0
  for seed in range(6):
    rng = np.random.default_rng([seed, POLICIES.index(policy)])
    # Longer and shorter documents than a block: only among long ones classes empty whole blocks.
    mask, keys = random_pack(rng, ROWS, LENGTH, policy, scale=1 + 3 * (seed % 2))
    plan, (starts, count) = plan_of(jax.tree.map(jnp.asarray, mask), keys, 16, 8)
    dense = np.asarray(mask.dense(keys))
    blocks = blocks_of(dense, 16, 8)
    some, every, kinds = blocks.any((2, 4)), blocks.all((2, 4)), np.asarray(plan.kinds)
    assert ((kinds > 0) >= some).all(), "a visible block was skipped"
    assert ((kinds == 2) <= every).all(), "a partial block was called full"
    if policy not in CLASSES:
      assert ((kinds > 0) == some).all() and ((kinds == 2) == every).all()
    active, exact = active + (kinds > 0).sum(), exact + some.sum()
    for listed, number, of in ((plan.k_blocks, plan.k_count, kinds > 0),
                               (plan.q_blocks, plan.q_count, (kinds > 0).swapaxes(1, 2))):
      inside = np.arange(of.shape[2]) < np.asarray(number)[..., None]
      order = np.argsort(~of, axis=-1, kind="stable")
      assert (np.asarray(number) == of.sum(-1)).all()
      assert (np.where(inside, listed, -1) == np.where(inside, order, -1)).all()
    times = met(np.asarray(starts), np.asarray(count), LENGTH, keys, 16, 8)
    assert (times[dense] == 1).all(), "the blocked loop meets a visible key exactly once"
    assert np.asarray(count).sum() <= np.asarray(plan.k_count).sum()
  assert active <= 1.05 * exact
  # Twin: the plan of a mask without its last keys skips blocks that are visible.
  short = dataclasses.replace(mask, hi=np.maximum(mask.hi - 8, 0))
  plan, _ = plan_of(jax.tree.map(jnp.asarray, short), keys, 16, 8)
  assert ((np.asarray(plan.kinds) > 0) < some).any()


@pytest.mark.parametrize("policy", CLASSES)
def test_classes_empty_blocks(policy):
  rng = np.random.default_rng(1)
  mask, keys = random_pack(rng, ROWS, LENGTH, policy, scale=4)
  plan, _ = plan_of(jax.tree.map(jnp.asarray, mask), keys, 16, 8)
  without = dataclasses.replace(mask, q_class=None, k_class=None)
  more, _ = plan_of(jax.tree.map(jnp.asarray, without), keys, 16, 8)
  assert more.k_count.sum() > 1.03 * plan.k_count.sum()


def test_classes_in_any_order_are_safe():
  rng = np.random.default_rng(2)
  mask, keys = random_pack(rng, ROWS, LENGTH, "full")
  for most in (1, 2, 6, 40):
    draw = lambda low, most=most: rng.integers(low, most + 1, (ROWS, LENGTH)).astype(np.int32)
    mask = dataclasses.replace(mask, q_class=draw(-1), k_class=draw(0))
    plan, _ = plan_of(jax.tree.map(jnp.asarray, mask), keys, 16, 8)
    blocks = blocks_of(np.asarray(mask.dense(keys)), 16, 8)
    assert ((np.asarray(plan.kinds) > 0) >= blocks.any((2, 4))).all()
    assert ((np.asarray(plan.kinds) == 2) <= blocks.all((2, 4))).all()


def test_flops_are_those_of_active_blocks():
  mask, keys = random_pack(np.random.default_rng(4), ROWS, LENGTH, "cut")
  plan, _ = plan_of(jax.tree.map(jnp.asarray, mask), keys, 16, 8)
  pairs = 16 * 8 * (np.asarray(plan.kinds) > 0).sum((1, 2))
  np.testing.assert_array_equal(plan.active_pairs(), pairs)
  np.testing.assert_array_equal(plan.active_flops(8, 64), 4 * 8 * 64 * pairs)
  assert (pairs >= mask.dense(keys).sum((1, 2))).all()


def tpu():
  """As if a v5e were there."""
  device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", platform="tpu", num_cores=None)
  mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


def test_no_array_of_queries_times_keys():
  """At 128k tokens the mask would have 17 billion entries; the plan's largest has 100 million."""
  shape = jax.ShapeDtypeStruct((1, 2**17), jnp.int32)
  mask = xla.IntervalMask(shape, shape)
  with tpu():
    block_q, block_k = block_sizes(2**17, 2**17, "tpu")
  traced = jax.make_jaxpr(lambda mask: make_plan(mask, 2**17, block_q=block_q, block_k=block_k))
  largest = max(var.aval.size for eqn in traced(mask).eqns for var in eqn.outvars)
  assert largest <= 2**17 * 2**17 // block_k


def test_block_sizes_fit_what_is_short():
  assert block_sizes(10, 33, "cpu") == (16, 40)
  assert block_sizes(10, 8192, "gpu") == (128, 512)
  with tpu():
    assert block_sizes(10, 8192, "tpu") == (128, 512)
    assert block_sizes(2**15, 2**15, "tpu") == (1024, 1024)
    assert block_sizes(2**15, 2**15, "tpu", width=256) == (512, 512)
    assert block_sizes(2**15, 2**15, "tpu", dtype=jnp.float32) == (512, 512)
  # A product of a tile has rows for all cores, whatever the number of heads that share keys.
  for sharing in (1, 2, 4, 8):
    block_q, block_k = block_sizes(8192, 8192, "cpu", sharing=sharing)
    assert block_q * sharing * block_k >= 2**17
