"""Patterns, stages, schedules and frozen parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import Stage
from vlm_jax.train.optimizer import count, make_optimizer, make_schedule
from vlm_jax.train.state import Leaf, flatten, unflatten

ALL = (Stage("all", (".*",)), Stage("align", ("connector/.*",)))
LEAVES = {
  "tower/layers/mlp/kernel": Leaf((4, 3, 5), np.float32, ("layers", "embed", "mlp")),
  "connector/kernel": Leaf((3, 3), np.float32, (None, None)),
  "connector/bias": Leaf((3,), np.float32, (None,)),
  "llm/embed/embedding": Leaf((7, 3), np.float32, ("vocab", "embed")),
  "llm/layers/attention/kernel": Leaf((6, 3, 3), np.float32, ("layers", "embed", "heads")),
  "llm/norm/scale": Leaf((3,), np.float32, ("norm",)),
}
IMPORTED = {"tower/norm/frozen_mean": Leaf((5,), np.float32, ("norm",))}


def noise(seed=0):
  rng = np.random.default_rng(seed)
  params = {path: rng.normal(size=leaf.shape).astype(leaf.dtype) for path, leaf in LEAVES.items()}
  for leaf in params.values() if seed == 0 else ():
    leaf.reshape(-1)[0] = -0.0  # adding 0.0 would flip its sign bit
  return unflatten({path: jnp.asarray(leaf) for path, leaf in params.items()})


def moved_after(config, steps=3):
  """Path to bool[leading axis] of the rows that changed, the optimizer and its state."""
  optimizer = make_optimizer(config, ALL, LEAVES)
  params = noise()
  opt_state = optimizer.init(params)
  flat = flatten(params)
  for seed in range(1, steps + 1):
    part = optimizer.select(unflatten(flat))
    grads = optimizer.mask(optimizer.select(noise(seed)))
    part, opt_state = optimizer.apply(grads, opt_state, part)
    flat = flat | flatten(part)
  bits = lambda leaf: np.asarray(leaf).view(np.uint32).reshape(leaf.shape[0], -1)
  before = flatten(params)
  moved = {path: (bits(flat[path]) != bits(before[path])).any(1) for path in flat}
  return moved, optimizer, opt_state


def test_everything_moves(config):
  moved, optimizer, _ = moved_after(config)
  assert all(rows.all() for rows in moved.values())
  assert count(optimizer, LEAVES)[0] == count(optimizer, LEAVES)[1]


def test_layers_that_no_feature_reads_do_not_decay(config):
  config.tower.update(depth=4, feature_layer=-2, post_norm=False)
  moved, optimizer, _ = moved_after(config)
  assert moved["tower/layers/mlp/kernel"].tolist() == [True, True, True, False]
  assert count(optimizer, LEAVES)[0] == count(optimizer, LEAVES)[1] - 15


def test_frozen_is_bit_identical_and_without_memory(config):
  config.optim.frozen = ("tower/.*", "llm/layers[:2]/.*", "llm/norm")
  moved, optimizer, opt_state = moved_after(config)
  assert not moved["tower/layers/mlp/kernel"].any() and not moved["llm/norm/scale"].any()
  assert moved["llm/layers/attention/kernel"].tolist() == [False, False, True, True, True, True]
  assert moved["llm/embed/embedding"].all() and moved["connector/kernel"].all()
  shapes = [leaf.shape for leaf in jax.tree.leaves(opt_state)]
  assert (4, 3, 5) not in shapes and shapes.count((6, 3, 3)) == 2
  assert count(optimizer, LEAVES) == (9 + 3 + 21 + 4 * 9, 60 + 9 + 3 + 21 + 54 + 3)


def test_no_stage_trains_imported_statistics(config):
  optimizer = make_optimizer(config, ALL, LEAVES | IMPORTED)
  assert set(optimizer.trainable) == set(LEAVES)
  assert count(optimizer, LEAVES | IMPORTED)[1] - count(optimizer, LEAVES | IMPORTED)[0] == 5
  stages = (Stage("all", ("tower/norm/frozen_mean",)),)  # not even by name
  with pytest.raises(UsageError, match="nothing to train"):
    make_optimizer(config, stages, LEAVES | IMPORTED)


def test_slices_from_and_to(config):
  config.optim.frozen = ("llm/layers[4:]", "tower/layers[1:3]/.*")
  moved, _, _ = moved_after(config)
  assert moved["llm/layers/attention/kernel"].tolist() == [True] * 4 + [False] * 2
  assert moved["tower/layers/mlp/kernel"].tolist() == [True, False, False, True]


def test_stage(config):
  config.fusion.stage = "align"
  moved, _, _ = moved_after(config)
  trained = {path for path, rows in moved.items() if rows.any()}
  assert trained == {"connector/kernel", "connector/bias"}


def test_groups_first_match_wins(config):
  config.optim.update(schedule="constant", warmup=0, lr=1.0, weight_decay=0.0, clip=0.0)
  config.optim.groups = (("llm/layers[:2]", 0.5), ("llm/layers", 0.25), ("connector/bias", 0.0))
  optimizer = make_optimizer(config, ALL, LEAVES)
  params = noise()
  ones = jax.tree.map(jnp.ones_like, params)
  updates, _ = optimizer.transform.update(ones, optimizer.init(params), params)
  updates = flatten(updates)  # Adam's first update is the sign of the gradient
  layers = np.asarray(updates["llm/layers/attention/kernel"])[:, 0, 0]
  np.testing.assert_allclose(layers, [-0.5] * 2 + [-0.25] * 4, rtol=1e-4)
  np.testing.assert_allclose(updates["connector/kernel"], -1.0, rtol=1e-4)
  assert not np.asarray(updates["connector/bias"]).any()


def test_a_part_warms_up_slower(config):
  config.optim.update(schedule="rsqrt", warmup=2, lr=1.0, weight_decay=0.0, clip=0.0)
  config.optim.warmups = (("tower", 4),)
  optimizer = make_optimizer(config, ALL, LEAVES)
  params = noise()
  state, ones = optimizer.init(params), jax.tree.map(jnp.ones_like, params)
  for step in range(8):
    updates, state = optimizer.transform.update(ones, state, params)
    tower, rest = (-float(np.ravel(flatten(updates)[path])[0])
                   for path in ("tower/layers/mlp/kernel", "llm/norm/scale"))
    usual = min((step + 1) / 2, (2 / max(step + 1, 2)) ** 0.5)
    assert rest == pytest.approx(usual, rel=1e-4)
    assert tower / rest == pytest.approx(min((step + 1) / 4, 1) / min((step + 1) / 2, 1), rel=1e-4)
  config.optim.warmups = (("towr", 4),)
  with pytest.raises(UsageError, match="config.optim.warmups: pattern 'towr' matches no"):
    make_optimizer(config, ALL, LEAVES)


def test_decay_by_pattern(config):
  config.optim.update(schedule="constant", warmup=0, lr=1.0, weight_decay=0.5, clip=0.0)
  optimizer = make_optimizer(config, ALL, LEAVES)
  params = noise()
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.transform.update(zeros, optimizer.init(params), params)
  updates = flatten(updates)
  for path, leaf in flatten(params).items():
    decays = path.endswith(("kernel", "embedding"))
    np.testing.assert_allclose(updates[path], -0.5 * leaf if decays else 0 * leaf, rtol=1e-6)


def test_clip_is_global(config):
  config.optim.update(clip=1.0)
  optimizer = make_optimizer(config, ALL, LEAVES)
  params = noise()
  big = jax.tree.map(lambda leaf: 1e3 * jnp.ones_like(leaf), params)
  _, opt_state = optimizer.transform.update(big, optimizer.init(params), params)
  first = jax.tree.leaves(opt_state[1].mu)  # 0.1 of the clipped gradient
  norm = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in first)) / (1 - config.optim.b1)
  assert abs(norm - 1) < 1e-4


@pytest.mark.parametrize("schedule,middle,last", [
  ("constant", 1.0, 1.0), ("linear", 0.55, 0.1), ("cosine", 0.55, 0.1), ("rsqrt", None, None)])
def test_schedules(config, schedule, middle, last):
  config.optim.update(schedule=schedule, warmup=10, lr=2.0, end_lr=0.1)
  config.train.steps = 110
  rate = make_schedule(config)
  np.testing.assert_allclose([rate(0), rate(4), rate(9)], [0.2, 1.0, 2.0], rtol=1e-6)
  if schedule == "rsqrt":
    np.testing.assert_allclose(rate(89), 2.0 * np.sqrt(10 / 90), rtol=1e-6)
  else:
    np.testing.assert_allclose([rate(60), rate(110)], [2 * middle, 2 * last], rtol=1e-5)


@pytest.mark.parametrize("field,value,words", [
  ("frozen", ("towr/.*",), ("config.optim.frozen", "towr/.*", "tower")),
  ("frozen", ("llm/layers[9:]",), ("config.optim.frozen", "none of the 6 layers")),
  ("frozen", ("llm/norm[:1]",), ("config.optim.frozen", "not stacked")),
  ("frozen", ("llm/(",), ("config.optim.frozen", "regular expression")),
  ("frozen", (".*",), ("config.optim.frozen", "nothing to train")),
  ("groups", (("connectr", 2.0),), ("config.optim.groups", "connector")),
  ("decay_pattern", "weight", ("config.optim.decay_pattern", "weight")),
  ("schedule", "cosin", ("config.optim.schedule", "did you mean 'cosine'")),
  ("name", "adam", ("config.optim.name", "adamw")),
])
def test_wrong_patterns_name_field_and_way_out(config, field, value, words):
  config.optim[field] = value
  with pytest.raises(UsageError) as error:
    make_optimizer(config, ALL, LEAVES)
  assert all(word in str(error.value) for word in words), str(error.value)


def test_unknown_stage(config):
  config.fusion.stage = "aling"
  with pytest.raises(UsageError, match=r"config\.fusion\.stage.*did you mean 'align'"):
    make_optimizer(config, ALL, LEAVES)
