"""The convolutional stem against timm's ResNet: features, gradients, import and export."""

import functools

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
from vlm_jax.towers import resnet

TOLERANCE, LOUD = 2e-4, 100
SIDE, DEPTHS = 40, (1, 1, 3)  # 40 pixels become 20, 10, 10, 5 and 3: odd sizes too
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def make(norm="group", **overrides):
  """The frozen config (modules are hashed) and the module."""
  config = base.get_config()
  tower = dict(name="resnet", image_size=SIDE, width=64, depths=DEPTHS, norm=norm, norm_eps=1e-5,
               mean=MEAN, std=STD)
  config.tower.update(tower | overrides)
  config = FrozenConfigDict(config)
  return config, resnet.Model(config.tower, config.attention, Precision())


@functools.cache
def reference(norm) -> torch.nn.Module:
  """timm's ResNet in evaluation mode; every parameter and running statistic is noise."""
  from timm.models.resnet import Bottleneck, ResNet

  groups = lambda channels, **kwargs: torch.nn.GroupNorm(32, channels, **kwargs)
  layer = torch.nn.BatchNorm2d if norm == "frozen" else groups
  model = ResNet(Bottleneck, (*DEPTHS, 1), norm_layer=layer).eval()
  del model.layer4, model.fc
  generator = torch.Generator().manual_seed(3)
  for name, leaf in model.state_dict().items():
    if leaf.is_floating_point():
      noise = torch.randn(leaf.shape, generator=generator)
      leaf.copy_(noise.abs() + 0.5 if "var" in name else noise * leaf[0].numel() ** -0.5
                 if leaf.ndim == 4 else 0.3 * noise + (1.0 if name.endswith("weight") else 0.0))
  return model


def features(model, x):
  x = model.maxpool(model.act1(model.bn1(model.conv1(x))))
  return model.layer3(model.layer2(model.layer1(x)))


class Tensors(dict):
  """A state dict as the table reads it."""

  @property
  def shapes(self):
    return {key: array.shape for key, array in self.items()}


def imported(norm, model):
  """The reference's parameters in the module, the table that moved them, and the tensors."""
  shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), images(1)))["params"]
  rows = table.entries([("", "", resnet.KEYS)],
                       {path: leaf.shape for path, leaf in flatten(shapes).items()})
  source = Tensors({name: leaf.numpy() for name, leaf in reference(norm).state_dict().items()})
  ignored = lambda key: key.endswith("num_batches_tracked")
  return table.load(source, rows, unread=ignored), rows, source


def images(count, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (1, count, SIDE, SIDE, 3)).astype(np.uint8)


def pixels(values) -> torch.Tensor:
  x = (values[0].astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
  return torch.tensor(x.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("norm", ["frozen", "group"])
def test_stages_are_timms(norm):
  config, model = make(norm)
  params, rows, source = imported(norm, model)
  values = images(2)
  cotangent = np.random.default_rng(1).normal(size=(1, 2, 9, 1024)).astype(np.float32)

  def total(params):
    out = model.apply({"params": params}, values).patches
    return jnp.sum(out * cotangent), out

  (_, got), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
  theirs = reference(norm)
  theirs.zero_grad()
  out = features(theirs, pixels(values))
  expected = out.detach().flatten(2).mT.numpy()[None]
  assert got.shape == expected.shape and expected.std() > 0.1 and np.isfinite(expected).all()
  assert resnet.grid(config.tower) == (3, 3)
  assert error(got, expected) < TOLERANCE

  (out.flatten(2).mT * torch.tensor(cotangent[0])).sum().backward()
  wanted = {name: leaf.grad.numpy() for name, leaf in theirs.named_parameters()}
  seen = 0
  for key, tensor in table.export(grads, rows).items():
    grad = tensor.get()
    leaf = next(entry.path for entry in rows if entry.key == key).rsplit("/", 1)[-1]
    if leaf.startswith(FROZEN):
      assert not grad.any(), key
    else:
      assert error(grad, wanted[key]) < TOLERANCE, key
      seen += 1
  assert seen == sum(1 for name in wanted if norm == "group" or "conv" in name
                     or "downsample.0" in name)
  # Twin: another eps.
  _, broken = make(norm, norm_eps=0.3)
  assert error(broken.apply({"params": params}, values).patches, expected) > LOUD * TOLERANCE
  # Import, export: the identity.
  for key, tensor in table.export(params, rows).items():
    np.testing.assert_array_equal(tensor.get(), source[key], err_msg=key)


def test_images_do_not_see_each_other():
  _, model = make("group")
  params, _, _ = imported("group", model)
  run = jax.jit(lambda values: model.apply({"params": params}, values).patches)
  values = images(2)
  other = values.copy()
  other[0, 1] ^= 255
  a, b = np.asarray(run(values)), np.asarray(run(other))
  np.testing.assert_array_equal(a[0, 0], b[0, 0])
  assert (a[0, 1] != b[0, 1]).any(-1).all()


@pytest.mark.parametrize("field, value, sentence", [
  ("norm", "grup", "config.tower.norm is 'grup'; did you mean 'group'"),
  ("depths", (3, 4, 23, 3), "config.tower.depths is .3, 4, 23, 3.; name the blocks of one to"),
  ("depths", (3, 0), "config.tower.depths"),
])
def test_what_is_not_a_stem_is_refused(field, value, sentence):
  _, model = make(**{field: value})
  with pytest.raises(UsageError, match=sentence):
    jax.eval_shape(model.init, jax.random.key(0), images(1))


def test_published_sizes():
  # 224 pixels, ResNet-101's and -152's first three stages: 14 x 14 patches of 1024 channels.
  from timm.models.resnet import Bottleneck, ResNet

  for depths in ((3, 4, 23), (3, 8, 36)):
    config, model = make("group", image_size=224, depths=depths)
    assert resnet.grid(config.tower) == (14, 14)
    values = np.zeros((1, 1, 224, 224, 3), np.uint8)
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), values))
    theirs = ResNet(Bottleneck, (*depths, 1), device="meta")
    del theirs.layer4, theirs.fc
    count = sum(leaf.numel() for leaf in theirs.parameters())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    assert jax.eval_shape(model.apply, shapes, values).patches.shape == (1, 1, 196, 1024)
