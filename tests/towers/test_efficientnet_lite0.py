"""EfficientNet-Lite0 against timm's two: TensorFlow's padding and torch's; features, gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.core import meta
from ml_collections import FrozenConfigDict

from tests.numbers import error
from vlm_jax.configs import base
from vlm_jax.convert import table
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import FROZEN
from vlm_jax.core.precision import Precision
from vlm_jax.core.tree import flatten
from vlm_jax.towers import efficientnet_lite0

TOLERANCE, LOUD = 2e-4, 100  # measured: features 1e-6, gradients 2e-6 at most
SIDE = 40  # 20, 10, 5, 3, 2: strides meet odd and even sides
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
THEIRS = {"tensorflow": "tf_efficientnet_lite0", "torch": "efficientnet_lite0"}
EPS = {"tensorflow": 1e-3, "torch": 1e-5}
# timm's names of a block's parts; where nothing is expanded they count from the depthwise one.
PARTS = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
         "conv_pwl": "_project_conv", "bn3": "_bn2"}
FIRST = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
ENDS = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}


def of_the_file(key):
  """timm's key as the published file spells it."""
  match = re.fullmatch(r"blocks\.(\d)\.(\d)\.(\w+)\.(\w+)", key)
  if not match:
    name, leaf = key.split(".")
    return f"{ENDS[name]}.{leaf}"
  stage, block, part, leaf = match.groups()
  before = sum(stage.blocks for stage in efficientnet_lite0.STAGES[: int(stage)])
  return f"_blocks.{before + int(block)}.{(PARTS if stage != '0' else FIRST)[part]}.{leaf}"


def make(**overrides):
  config = base.get_config()
  tower = dict(name="efficientnet_lite0", image_size=SIDE, norm="frozen", norm_eps=1e-3, pool="gap",
               mean=MEAN, std=STD)
  config.tower.update(tower | overrides)
  config = FrozenConfigDict(config)
  return config, efficientnet_lite0.Model(config.tower, config.attention, Precision())


@functools.cache
def reference(padding) -> torch.nn.Module:
  """timm's in evaluation mode without classifier; every parameter and statistic is noise.

  Fifty layers lose or blow up their input quickly: with kernels of gain 1 the images are equal in
  the fifth digit at the end, with gain 2 rounding errors are.
  """
  import timm

  model = timm.create_model(THEIRS[padding], num_classes=0).eval()
  generator = torch.Generator().manual_seed(3)
  for name, leaf in model.state_dict().items():
    if leaf.is_floating_point():
      noise = torch.randn(leaf.shape, generator=generator)
      leaf.copy_(noise.abs() + 0.5 if "var" in name else 1.4 * noise * leaf[0].numel() ** -0.5
                 if leaf.ndim == 4 else 0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
  return model


class Tensors(dict):
  """A state dict as the table reads it."""

  @property
  def shapes(self):
    return {key: array.shape for key, array in self.items()}


def images(count, side=SIDE):
  return np.random.default_rng(0).integers(0, 256, (1, count, side, side, 3)).astype(np.uint8)


def imported(padding):
  """The reference's parameters in the module, the table that moved them, and the tensors."""
  _, model = make(padding=padding)
  shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), images(1)))["params"]
  rows = table.entries([("", "", efficientnet_lite0.KEYS)],
                       {path: leaf.shape for path, leaf in flatten(shapes).items()})
  source = Tensors({of_the_file(name): leaf.numpy()
                    for name, leaf in reference(padding).state_dict().items()})
  source["_fc.weight"] = np.zeros((1000, 1280), np.float32)
  ignored = lambda key: key.endswith("num_batches_tracked") or key.startswith("_fc")
  return table.load(source, rows, unread=ignored), rows, source


@functools.cache
def forward(config):
  model = efficientnet_lite0.Model(config.tower, config.attention, Precision())
  return jax.jit(lambda params, values: model.apply({"params": params}, values))


@pytest.mark.parametrize("padding", THEIRS)
def test_network_is_timms(padding):
  config, model = make(padding=padding, norm_eps=EPS[padding])
  params, rows, source = imported(padding)
  assert len(rows) == 294 - 49  # of the published file: without 49 counters and the classifier
  values = images(2)
  rng = np.random.default_rng(1)
  cotangents = [rng.normal(size=shape).astype(np.float32) for shape in ((1, 2, 4, 1280),
                                                                        (1, 2, 1280))]

  def total(params):
    out = model.apply({"params": params}, values)
    return (jnp.sum(out.patches * cotangents[0]) + jnp.sum(out.pooled * cotangents[1])), out

  grad = jax.jit(jax.value_and_grad(total, has_aux=True))
  (_, got), grads = grad(params)
  theirs = reference(padding)
  pixels = (values[0].astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
  maps = theirs.forward_features(torch.tensor(pixels.transpose(0, 3, 1, 2)))
  pooled = theirs.forward_head(maps)
  for ours, out in ((got.patches[0], maps.flatten(2).mT), (got.pooled[0], pooled)):
    expected = out.detach().numpy()
    assert ours.shape == expected.shape and expected.std() > 0.1 and np.isfinite(expected).all()
    assert error(ours, expected) < TOLERANCE
  assert efficientnet_lite0.grid(config.tower) == (2, 2)
  # Its twin: the other's padding, or another eps.
  change = dict(norm_eps=0.3) if padding == "torch" else dict(padding="torch")
  broken = forward(make(**dict(padding=padding, norm_eps=EPS[padding]) | change)[0])
  expected = maps.detach().flatten(2).mT.numpy()
  assert error(broken(params, values).patches[0], expected) > LOUD * TOLERANCE, change

  loss = (maps.flatten(2).mT * torch.tensor(cotangents[0][0])).sum()
  (loss + (pooled * torch.tensor(cotangents[1][0])).sum()).backward()
  wanted = {of_the_file(name): leaf.grad.numpy() for name, leaf in theirs.named_parameters()}
  paths = {entry.key: entry.path for entry in rows}
  worst = 0.0
  for key, tensor in table.export(grads, rows).items():
    grad = tensor.get()
    if paths[key].rsplit("/", 1)[-1].startswith(FROZEN):
      assert not grad.any(), key
    else:
      worst = max(worst, error(grad, wanted[key]))
  print(f"{padding}: gradients within {worst:.1e}")
  assert worst < TOLERANCE
  for key, tensor in table.export(params, rows).items():  # import, export: the identity
    np.testing.assert_array_equal(tensor.get(), source[key], err_msg=key)


def test_the_published_size():
  config, model = make(image_size=224)
  values = jax.ShapeDtypeStruct((1, 1, 224, 224, 3), jnp.uint8)
  shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), values))
  assert efficientnet_lite0.grid(config.tower) == (7, 7)
  assert jax.eval_shape(model.apply, shapes, values).patches.shape == (1, 1, 49, 1280)
  leaves = flatten(shapes["params"])
  trained = sum(leaf.size for path, leaf in leaves.items() if "frozen_mean" not in path
                and "frozen_variance" not in path)
  assert trained + 1281 * 1000 == 4_652_008  # timm's count of parameters
  uses = lambda path: efficientnet_lite0.uses(config.tower, path)
  assert uses("stem/kernel") == uses("block0/depthwise/kernel") == 112**2
  assert uses("block1/expand/kernel") == 112**2 and uses("block1/project/kernel") == 56**2
  assert uses("head/kernel") == uses("block15/project_norm/scale") == 49
  assert efficientnet_lite0.unread(config.tower) == ()


def test_from_scratch_there_are_group_norms():
  _, model = make(norm="group", pool="none")
  shapes = flatten(meta.unbox(jax.eval_shape(model.init, jax.random.key(0), images(1)))["params"])
  assert not any(FROZEN in path for path in shapes)


@pytest.mark.parametrize("field, value, sentence", [
  ("norm", "grup", "config.tower.norm is 'grup'; did you mean 'group'"),
  ("padding", "torhc", "config.tower.padding is 'torhc'; did you mean 'torch'"),
  ("pool", "map", "config.tower.pool is 'map'"),
  ("remat", "full", "config.tower.remat is 'full'"),
])
def test_what_cannot_be_is_named(field, value, sentence):
  _, model = make(**{field: value})
  with pytest.raises(UsageError, match=sentence):
    jax.eval_shape(model.init, jax.random.key(0), images(1))
