import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.core import meta
from ml_collections import FrozenConfigDict

from vlm_jax.configs import base
from vlm_jax.core.errors import UsageError
from vlm_jax.core.precision import Precision
from vlm_jax.towers import vit

SIDE, PATCH = 10, 4  # two pixels do not fill a patch


def get_config(**overrides):
  config = base.get_config()
  config.tower.update(
    image_size=SIDE, patch=PATCH, width=12, depth=2, mlp=20, heads=2,
    mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), **overrides,
  )
  return config


def make(config, seed=0):
  config = FrozenConfigDict(config)  # modules that jit hashes
  model = vit.Model(config.tower, config.attention, Precision())
  shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), images(1)))
  rng = np.random.default_rng(seed)
  params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), shapes)
  return model, params


def images(count, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (1, count, SIDE, SIDE, 3)).astype(np.uint8)


def test_patches_are_a_convolution():
  config, values = get_config().tower, images(2)
  kernel = np.random.default_rng(1).normal(size=(PATCH * PATCH * 3, 12)).astype(np.float32)
  got = vit.patches(values, config) @ kernel
  assert got.shape == (2, 4, 12) and vit.grid(config) == (2, 2)
  pixels = (values[0] / 255 - np.array(config.mean)) / np.array(config.std)
  pixels = torch.tensor(pixels.astype(np.float32).transpose(0, 3, 1, 2))
  weight = lambda order: torch.tensor(kernel.reshape(PATCH, PATCH, 3, 12).transpose(order).copy())
  conv = lambda w: torch.nn.functional.conv2d(pixels, w, stride=PATCH).flatten(2).mT.numpy()
  np.testing.assert_allclose(got, conv(weight((3, 2, 0, 1))), rtol=1e-4, atol=1e-4)
  assert np.abs(got - conv(weight((3, 2, 1, 0)))).max() > 0.1  # twin: rows and columns swapped


@pytest.mark.parametrize("flags, names", [
  (dict(), {"patch", "positions", "layers", "post_norm"}),
  (dict(class_token=True, pre_norm=True, post_norm=False, patch_bias=False),
   {"patch", "positions", "layers", "class_token", "pre_norm"}),
])
def test_shapes_and_parameters(flags, names):
  config = get_config(**flags)
  model, params = make(config)
  assert set(params["params"]) == names
  assert params["params"]["positions"].shape == (5 if config.tower.class_token else 4, 12)
  assert ("bias" in params["params"]["patch"]) == config.tower.patch_bias
  out = jax.jit(model.apply)(params, images(3))
  assert out.patches.shape == (1, 3, 4, 12) and out.pooled is None
  # Every row of KEYS that exists is a parameter, and every parameter is in KEYS.
  paths = {"/".join(str(key.key) for key in path)
           for path, _ in jax.tree_util.tree_flatten_with_path(params["params"])[0]}
  assert paths <= {ours for ours, _, _ in vit.KEYS}


def test_images_do_not_see_each_other_and_patches_do():
  model, params = make(get_config())
  run = jax.jit(lambda values: model.apply(params, values).patches)
  values = images(2)
  other = values.copy()
  other[0, 1, 0, 0, 0] ^= 255
  a, b = run(values), run(other)
  np.testing.assert_array_equal(a[0, 0], b[0, 0])
  assert (np.asarray(a[0, 1]) != np.asarray(b[0, 1])).any(-1).all()
  # Pixels beyond the last whole patch are not read.
  other = values.copy()
  other[:, :, 8:] ^= 255
  np.testing.assert_array_equal(a, run(other))


def test_permuting_patches_with_their_positions_permutes_features():
  model, params = make(get_config())
  order = [3, 1, 0, 2]
  cells = images(1)[:, :, :8, :8].reshape(1, 1, 2, 4, 2, 4, 3).transpose(0, 1, 2, 4, 3, 5, 6)
  cells = cells.reshape(4, 4, 4, 3)
  paste = lambda cells: np.pad(
    cells.reshape(2, 2, 4, 4, 3).transpose(0, 2, 1, 3, 4).reshape(1, 1, 8, 8, 3),
    ((0, 0), (0, 0), (0, 2), (0, 2), (0, 0)),
  )
  run = jax.jit(lambda params, values: model.apply(params, values).patches[0, 0])
  expected = np.asarray(run(params, paste(cells)))[order]
  moved = {"params": dict(params["params"])}
  moved["params"]["positions"] = params["params"]["positions"][np.array(order)]
  np.testing.assert_allclose(run(moved, paste(cells[order])), expected, atol=1e-5)
  assert np.abs(run(params, paste(cells[order])) - expected).max() > 1e-2


@pytest.mark.parametrize("layer", [-2, -3])
def test_feature_layer_reads_before_the_last_blocks(layer):
  config = get_config(feature_layer=layer, class_token=True)
  model, params = make(config)
  got = jax.jit(model.apply)(params, images(1)).patches
  assert set(params["params"]) >= {"post_norm", "layers"}  # made, though nothing reads them
  assert params["params"]["layers"]["mlp"]["up"]["kernel"].shape[0] == 2
  # The same as a shallower tower without last norm.
  shallow = get_config(class_token=True, post_norm=False)
  shallow.tower.depth = 3 + layer
  leaves = dict(params["params"])
  del leaves["post_norm"]
  leaves["layers"] = jax.tree.map(lambda leaf: leaf[: 3 + layer], leaves["layers"])
  if not shallow.tower.depth:
    shallow.tower.depth, shallow.tower.feature_layer = 1, -2
    leaves["layers"] = jax.tree.map(lambda leaf: leaf[:1], params["params"]["layers"])
  expected = jax.jit(make(shallow)[0].apply)({"params": leaves}, images(1)).patches
  np.testing.assert_allclose(got, expected, atol=1e-6)
  whole = make(get_config(class_token=True, post_norm=False))[0]
  full = {"params": {k: v for k, v in params["params"].items() if k != "post_norm"}}
  assert np.abs(got - jax.jit(whole.apply)(full, images(1)).patches).max() > 1e-2


def test_pools():
  pooled = {}
  for pool in ("gap", "tok", "map"):
    config = get_config(pool=pool, class_token=True)
    model, params = make(config)
    out = jax.jit(model.apply)(params, images(2))
    assert out.patches.shape == (1, 2, 4, 12) and out.pooled.shape == (1, 2, 12)
    pooled[pool] = out
  gap = pooled["gap"]
  np.testing.assert_allclose(gap.pooled, np.asarray(gap.patches).mean(2), atol=1e-6)
  np.testing.assert_array_equal(gap.patches, pooled["tok"].patches)
  assert np.abs(gap.pooled - pooled["tok"].pooled).max() > 1e-2


def test_map_pool_is_torchs_attention():
  config = get_config(activation="gelu_tanh", norm_eps=1e-3)
  x = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)
  module = vit.MapPool(config.tower, Precision())
  shapes = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x))
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(leaf.dtype), shapes)
  p = jax.tree.map(torch.tensor, params["params"])
  theirs = torch.nn.MultiheadAttention(12, 2, batch_first=True)
  names = ("query", "key", "value")
  with torch.no_grad():
    theirs.in_proj_weight.copy_(torch.cat([p[n]["kernel"].reshape(12, 12).T for n in names]))
    theirs.in_proj_bias.copy_(torch.cat([p[n]["bias"].reshape(12) for n in names]))
    theirs.out_proj.weight.copy_(p["out"]["kernel"].reshape(12, 12).T)
    theirs.out_proj.bias.copy_(p["out"]["bias"])
    probe = p["probe"][None].repeat(2, 1, 1)
    y = theirs(probe, torch.tensor(x), torch.tensor(x))[0][:, 0]
    z = torch.nn.functional.layer_norm(y, (12,), p["norm"]["scale"], p["norm"]["bias"], 1e-3)
    up = z @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"]
    gelu = torch.nn.functional.gelu(up, approximate="tanh")
    expected = y + gelu @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"]
  np.testing.assert_allclose(module.apply(params, x), expected.numpy(), rtol=1e-4, atol=1e-4)


def test_sizes_have_the_published_numbers_of_parameters():
  # arXiv:2010.11929, table 1, without heads: 86, 307 and 632 million.
  for name, millions in (("B/16", 86), ("L/16", 303), ("H/14", 631)):
    config = base.get_config()
    config.tower.update(vit.size(name), image_size=224, class_token=True)
    model = vit.Model(config.tower, config.attention, Precision())
    values = jax.ShapeDtypeStruct((1, 1, 224, 224, 3), jnp.uint8)
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), values))
    total = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert abs(total / 1e6 - millions) < 1, (name, total)


@pytest.mark.parametrize("fields, words", [
  (dict(feature_layer=0), "config.tower.feature_layer"),
  (dict(feature_layer=-4), "config.tower.feature_layer"),
  (dict(pool="mpa"), "did you mean 'map'"),
  (dict(pool="tok"), "class_token"),
  (dict(pool="gap", feature_layer=-2), "config.tower.pool"),
])
def test_what_cannot_be_is_refused(fields, words):
  with pytest.raises(UsageError, match=words):
    make(get_config(**fields))


def test_unknown_size():
  with pytest.raises(UsageError, match="known: B, G, H"):
    vit.size("Z")
