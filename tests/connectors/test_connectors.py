import jax
import numpy as np
import pytest
from flax.core import meta

from vlm_jax.configs import base
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_connector
from vlm_jax.core.precision import Precision

GRID, WIDTH, OUT = (4, 6), 5, 7
NAMES = ("linear", "mlp", "pool", "space_to_depth")


def get_config(name, **overrides):
  config = base.get_config()
  config.connector.update(name=name, hidden=9, **overrides)
  return config


def make(config, seed=0):
  model = find_connector(config).Model(config.connector, OUT, Precision())
  features = np.random.default_rng(1).normal(size=(2, 3, 24, WIDTH)).astype(np.float32)
  init = lambda key, features: model.init(key, features, GRID)
  shapes = meta.unbox(jax.eval_shape(init, jax.random.key(0), features))
  rng = np.random.default_rng(seed)
  params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), shapes)
  return features, params, lambda features: np.asarray(model.apply(params, features, GRID))


@pytest.mark.parametrize("name", NAMES)
def test_slots_are_the_rows_of_the_output(name):
  config = get_config(name)
  features, params, run = make(config)
  slots = find_connector(config).slots(config.connector, 1, *GRID)
  out = run(features)
  assert slots.dtype == np.int32
  assert out.shape == (2, 3, len(slots), OUT)
  np.testing.assert_array_equal(np.sort(slots), np.arange(out.shape[2]))
  assert len(find_connector(config).slots(config.connector, 3, *GRID)) == 3 * len(slots)
  paths = {"/".join(str(key.key) for key in path)
           for path, _ in jax.tree_util.tree_flatten_with_path(params["params"])[0]}
  assert paths == {ours for ours, _, _ in find_connector(config).KEYS}
  without = get_config(name, bias=False)
  assert not any("bias" in jax.tree_util.keystr(path)
                 for path, _ in jax.tree_util.tree_flatten_with_path(make(without)[1])[0])


@pytest.mark.parametrize("name", NAMES)
def test_which_patch_reaches_which_slot(name):
  """One patch at a time is changed: the slot of its window changes, in reading order."""
  features, _, run = make(get_config(name))
  before = run(features)
  factor = 1 if name in ("linear", "mlp") else 2
  for patch in range(24):
    other = features.copy()
    other[0, 0, patch] += 1
    changed = np.argwhere((run(other) != before).any(-1))
    row, column = patch // GRID[1] // factor, patch % GRID[1] // factor
    np.testing.assert_array_equal(changed, [[0, 0, row * (GRID[1] // factor) + column]])


def test_mlp_is_two_layers_with_the_exact_gelu():
  features, params, run = make(get_config("mlp"))
  up, down = params["params"]["up"], params["params"]["down"]
  assert up["kernel"].shape == (WIDTH, 9)
  hidden = features @ up["kernel"] + up["bias"]
  gelu = np.asarray(jax.nn.gelu(hidden, approximate=False))
  np.testing.assert_allclose(run(features), gelu @ down["kernel"] + down["bias"], atol=1e-5)
  config = get_config("mlp")
  config.connector.hidden = 0
  assert make(config)[1]["params"]["up"]["kernel"].shape == (WIDTH, OUT)


def test_pool_averages_and_space_to_depth_keeps():
  features, _, run = make(get_config("pool"))
  mixed = features.copy()
  mixed[:, :, 0], mixed[:, :, 1] = features[:, :, 1], features[:, :, 0]  # inside one window
  np.testing.assert_allclose(run(mixed), run(features), atol=1e-6)
  features, params, run = make(get_config("space_to_depth"))
  assert params["params"]["mlp"]["up"]["kernel"].shape == (4 * WIDTH, 9)
  assert np.abs(run(mixed) - run(features)).max() > 1e-2


@pytest.mark.parametrize("name", ["pool", "space_to_depth"])
@pytest.mark.parametrize("factor", [0, 4])
def test_a_factor_that_does_not_divide_is_refused(name, factor):
  config = get_config(name, factor=factor)
  with pytest.raises(UsageError, match="config.connector.factor"):
    find_connector(config).slots(config.connector, 1, *GRID)


def test_a_linear_layer_may_start_at_zero():
  features = make(get_config("linear"))[0]
  for initial, silent in (("zeros", True), ("random", False)):
    config = get_config("linear", initial=initial)
    model = find_connector(config).Model(config.connector, OUT, Precision())
    rows, _ = model.init_with_output(jax.random.key(0), features, GRID)
    assert np.any(rows) != silent
  with pytest.raises(UsageError, match="config.connector.initial is 'zero'; did you mean 'zeros'"):
    make(get_config("linear", initial="zero"))


def test_learned_queries_read_every_patch():
  features, params, run = make(get_config("attention_pool", latents=3, heads=1))
  slots = find_connector(get_config("attention_pool", latents=3)).slots
  assert len(slots(get_config("attention_pool", latents=3).connector, 2, *GRID)) == 6
  before = run(features)
  assert before.shape == (2, 3, 3, OUT)
  for patch in (0, 23):
    other = features.copy()
    other[0, 0, patch, 0] += 1
    changed = (run(other) != before).any(-1)
    assert changed[0, 0].all() and changed.sum() == 3
  # By hand, with both norms.
  tree = params["params"]["pool"]
  def norm(x, name):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return x * tree[name]["scale"] + tree[name]["bias"]
  attends = tree["attention"]
  project = lambda x, name: x @ attends[name]["kernel"][:, 0] + attends[name]["bias"][0]
  keys = norm(features, "key_norm")
  logits = project(norm(tree["queries"], "query_norm"), "query") @ project(
    keys, "key").swapaxes(-1, -2) / np.sqrt(OUT)
  shares = np.exp(logits - logits.max(-1, keepdims=True))
  read = shares / shares.sum(-1, keepdims=True) @ project(keys, "value")
  expected = read @ attends["out"]["kernel"][0] + attends["out"]["bias"]
  np.testing.assert_allclose(before, expected, atol=1e-5)
  with pytest.raises(UsageError, match="config.connector.heads is 2, which must divide 7"):
    make(get_config("attention_pool", heads=2))
