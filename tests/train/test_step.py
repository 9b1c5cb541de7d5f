"""The step: totals over objectives and sources, accumulation, sources without weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import tiny_fusion
from vlm_jax.core.batch import from_flat
from vlm_jax.core.errors import UsageError
from vlm_jax.core.mesh import make_mesh
from vlm_jax.core.tree import flatten
from vlm_jax.train import state as state_lib
from vlm_jax.train.optimizer import make_optimizer
from vlm_jax.train.step import make_step, place


def run(config, flats, module=tiny_fusion):
  """The state and numbers after one step per batch, from noise parameters."""
  mesh = make_mesh(config)
  init, leaves = state_lib.initializer(module, config)
  optimizer = make_optimizer(config, module.STAGES, leaves)
  abstract = state_lib.abstract_state(leaves, optimizer.init, mesh)
  state = state_lib.create(init, optimizer.init, abstract, config.seed)
  step = make_step(config, module, optimizer, mesh, abstract)
  rows = []
  for flat in flats:
    state, numbers = step(state, place(flat, mesh))
    rows.append(jax.device_get(numbers))
  return jax.device_get(state), rows


def worst(a, b):
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return max(np.max(np.abs(x - y)) / max(np.max(np.abs(y)), 1e-30) for x, y in pairs)


def test_accumulation_is_the_big_batch(config):
  flats = [tiny_fusion.batch(config, index) for index in range(2)]
  config.optim.clip = 0.0
  big, numbers = run(config, flats)
  assert np.isfinite(numbers[0].total) and numbers[0].grad_norm > 0.1
  for parts in (2, 8):
    config.train.accumulation = parts
    small, split = run(config, flats)
    assert worst(small.opt_state[1].mu, big.opt_state[1].mu) < 1e-5
    for one, other in zip(split, numbers, strict=True):
      np.testing.assert_allclose(one.total, other.total, rtol=1e-6)
    np.testing.assert_allclose(split[0].losses["lm"], numbers[0].losses["lm"], rtol=1e-6)


def test_accumulation_twin_mean_of_means_is_far_off(config):
  flat = tiny_fusion.batch(config, 0)
  whole, _ = run(config, [flat])
  halves = []
  config.data.rows = 4
  for start in (0, 1):
    state, _ = run(config, [{path: array[start::2] for path, array in flat.items()}])
    halves.append(state.opt_state[1].mu)
  mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
  assert worst(mean, whole.opt_state[1].mu) > 100 * 1e-5


def test_total_is_the_weighted_sum(config):
  config.fusion.objectives.lm = 3.0
  flat = tiny_fusion.batch(config, 0)
  state, leaves = state_lib.initializer(tiny_fusion, config)
  params = state(jax.random.key(config.seed))
  batch = from_flat(flat)
  output = tiny_fusion.Model(config).apply({"params": params}, batch)
  sums = tiny_fusion.losses(output, batch, config)["lm"]
  weights = tiny_fusion.weights(batch, config)["lm"]
  _, (numbers,) = run(config, [flat])
  expected = 3.0 * (1.0 * sums[0] / weights[0] + 0.5 * sums[1] / weights[1])
  np.testing.assert_allclose(numbers.total, expected, rtol=1e-6)
  np.testing.assert_allclose(numbers.losses["lm"], sums / weights, rtol=1e-6)


def test_source_without_weight_contributes_nothing(config):
  flat = tiny_fusion.batch(config, 0)
  flat["streams/text/loss_weights/lm"] *= flat["streams/text/source_ids"] == 0
  state, (numbers,) = run(config, [flat])
  assert numbers.weights["lm"][1] == 0 and numbers.losses["lm"][1] == 0
  np.testing.assert_allclose(numbers.total, numbers.losses["lm"][0], rtol=1e-6)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
  flat["streams/text/loss_weights/lm"] *= 0
  state, (numbers,) = run(config, [flat])
  assert numbers.total == 0 and numbers.grad_norm == 0


def test_frozen_parameters_keep_their_bits(config):
  config.fusion.stage = "top"
  config.optim.weight_decay = 1.0
  before, _ = run(config, [])
  after, _ = run(config, [tiny_fusion.batch(config, index) for index in range(3)])
  changed = {}
  old, new = flatten(before.params), flatten(after.params)
  for path in old:
    differs = old[path].view(np.uint32) != new[path].view(np.uint32)
    changed[path] = differs.reshape(len(differs), -1).any(1)
  assert changed["llm/layers"].tolist() == [False, False, True, True]
  assert changed["connector/kernel"].all()
  assert not any(changed[path].any() for path in ("tower/kernel", "llm/embedding", "llm/scale"))
  sizes = [leaf.size for leaf in jax.tree.leaves(after.opt_state)]
  assert sum(sizes) < 2 * (old["llm/layers"].size + old["connector/kernel"].size) + 4


def test_unknown_objective(config):
  config.fusion.objectives = type(config)({"ml": 1.0})
  with pytest.raises(UsageError, match=r"config\.fusion\.objectives\.ml.*lm"):
    run(config, [tiny_fusion.batch(config, 0)])


def test_rows_must_divide(config):
  config.train.accumulation = 3
  with pytest.raises(UsageError, match=r"config\.data\.rows is 8"):
    state_lib.abstract_batch(tiny_fusion, config, make_mesh(config))


def test_counts(config):
  flat = tiny_fusion.batch(config, 0)
  _, (numbers,) = run(config, [flat])
  assert numbers.used["tokens/text"] == (flat["streams/text/segment_ids"] > 0).sum()
  assert numbers.used["images/images"] == (flat["media/images/segment_ids"] > 0).sum()
  spans = flat["masks/text/hi"] - flat["masks/text/lo"]
  assert numbers.pairs["text"] == np.maximum(spans, 0).sum()
  assert jnp.isfinite(numbers.lr)
