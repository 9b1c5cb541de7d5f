"""EfficientNet-Lite0: inverted bottlenecks without squeeze-and-excitation (arXiv:1905.11946).

The lite form has ReLU6 everywhere and a stem and a head that no scaling changes. An image becomes
ceil(side / 32)^2 patches of 1280 channels: 7 x 7 of 224 x 224 pixels. Its published weights were
trained in TensorFlow: `config.tower` for them is norm "frozen", norm_eps 1e-3, padding
"tensorflow", mean 127 / 255 and std 128 / 255.
"""

import itertools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.fusion import Features
from vlm_jax.core.mesh import constrain
from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array
from vlm_jax.nn.conv import Conv
from vlm_jax.towers.resnet import NORMS, norm_keys

STEM, HEAD = 32, 1280
POOLS = ("none", "gap")


class Stage(NamedTuple):
  """Blocks in a row: the first has the stride, all give `width` channels."""

  blocks: int
  size: int  # of the depthwise kernel
  stride: int
  expansion: int
  width: int


STAGES = (
  Stage(1, 3, 1, 1, 16), Stage(2, 3, 2, 6, 24), Stage(2, 5, 2, 6, 40), Stage(3, 3, 2, 6, 80),
  Stage(3, 5, 1, 6, 112), Stage(4, 5, 2, 6, 192), Stage(1, 3, 1, 6, 320),
)
# (stage, stride) of every block in the order of the network.
BLOCKS = tuple(
  (stage, stage.stride if number == 0 else 1) for stage in STAGES for number in range(stage.blocks))


def _block_keys(number: int) -> tuple:
  ours, theirs = f"block{number}", f"_blocks.{number}"
  parts = (("expand", "_expand_conv", "_bn0"), ("depthwise", "_depthwise_conv", "_bn1"),
           ("project", "_project_conv", "_bn2"))
  return tuple(itertools.chain.from_iterable(
    ((f"{ours}/{name}/kernel", f"{theirs}.{conv}.weight", "conv"),
     *norm_keys(f"{ours}/{name}_norm", f"{theirs}.{norm}")) for name, conv, norm in parts))


# Ours, theirs (the layout of EfficientNet-PyTorch), operation: see vlm_jax/convert/table.py. The
# classifier is in files and never made: features end at the head.
KEYS = (
  ("stem/kernel", "_conv_stem.weight", "conv"),
  *norm_keys("stem_norm", "_bn0"),
  *itertools.chain.from_iterable(map(_block_keys, range(len(BLOCKS)))),
  ("head/kernel", "_conv_head.weight", "conv"),
  *norm_keys("head_norm", "_bn1"),
  ("classifier/kernel", "_fc.weight", "in"),
  ("classifier/bias", "_fc.bias", "copy"),
)


def _sides(config: ConfigDict) -> list[int]:
  """The side of the stem's output and of every block's."""
  sides = [-(-config.image_size // 2)]
  for _, stride in BLOCKS:
    sides.append(-(-sides[-1] // stride))
  return sides


def grid(config: ConfigDict) -> tuple[int, int]:
  """Rows and columns of patches."""
  side = _sides(config)[-1]
  return side, side


def unread(config: ConfigDict) -> tuple[str, ...]:
  """Nothing: the features are those of the head."""
  del config
  return ()


def uses(config: ConfigDict, path: str) -> int:
  """To how many places of one image a parameter is applied: blocks differ in size."""
  sides = _sides(config)
  module, *inner = path.split("/")
  if not module.startswith("block"):
    return sides[0 if module.startswith("stem") else -1] ** 2
  number = int(module.removeprefix("block"))
  # What expands still sees the size that the block is given.
  return sides[number + (not inner[0].startswith("expand"))] ** 2


class Block(nn.Module):
  """norm project relu6 norm depthwise relu6 norm expand x, plus x where the shape is kept."""

  stage: Stage
  stride: int
  config: ConfigDict
  precision: Precision

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """f[B,Height,Width,C] to f[B,ceil(Height/stride),ceil(Width/stride),stage.width]."""
    stage, config, precision = self.stage, self.config, self.precision
    norm = lambda name: NORMS[config.norm](config.norm_eps, precision, name=f"{name}_norm")
    hidden = x.shape[-1] * stage.expansion
    x = y = constrain(x, ("batch", None, None, None))
    if stage.expansion > 1:
      y = jax.nn.relu6(norm("expand")(Conv(hidden, 1, 1, precision, name="expand")(y)))
    y = Conv(hidden, stage.size, self.stride, precision, groups=hidden, padding=config.padding,
             name="depthwise")(y)
    y = jax.nn.relu6(norm("depthwise")(y))
    y = norm("project")(Conv(stage.width, 1, 1, precision, name="project")(y))
    return x + y if x.shape == y.shape else y


class Model(nn.Module):
  """The network. Attributes: `config.tower`, `config.attention` (unused), dtypes."""

  config: ConfigDict
  attention: ConfigDict
  precision: Precision

  @nn.compact
  def __call__(self, values: Array) -> Features:
    """Pixels u8[B,N,Height,Width,3] to patches f[B,N,P,1280] in reading order.

    Raises:
      UsageError: a norm, padding or pool that does not exist, or a remat policy.
    """
    config, precision = self.config, self.precision
    for field, known in (("norm", NORMS), ("pool", POOLS), ("remat", ("none",))):
      if config[field] not in known:
        raise UsageError(f"config.tower.{field} is '{config[field]}'; "
                         f"{nearest(config[field], known)}")
    rows, columns = grid(config)
    batch, images = values.shape[:2]
    mean, std = (jnp.asarray(field, jnp.float32) for field in (config.mean, config.std))
    x = (values.reshape(batch * images, *values.shape[2:]).astype(jnp.float32) / 255 - mean) / std
    norm = lambda name: NORMS[config.norm](config.norm_eps, precision, name=f"{name}_norm")
    x = Conv(STEM, 3, 2, precision, padding=config.padding, name="stem")(x)
    x = jax.nn.relu6(norm("stem")(x))
    for number, (stage, stride) in enumerate(BLOCKS):
      x = Block(stage, stride, config, precision, name=f"block{number}")(x)
    x = jax.nn.relu6(norm("head")(Conv(HEAD, 1, 1, precision, name="head")(x)))
    pooled = x.mean((1, 2)).reshape(batch, images, HEAD) if config.pool == "gap" else None
    return Features(x.reshape(batch, images, rows * columns, HEAD), pooled)
