"""Convolutional stems: the first stages of a ResNet (arXiv:1512.03385, the v1.5 strides).

SimVLM reads images through conv2..conv4 of ResNet-101 or -152 (arXiv:2108.10904, section 3.2):
`config.tower.depths` (3, 4, 23) or (3, 8, 36), stride 16, so 224 x 224 pixels become 14 x 14
patches of 16 * width channels. `config.tower.norm` "group" is for training from scratch;
"frozen" keeps the statistics of an imported batch norm as parameters that nothing trains.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.fusion import Features
from vlm_jax.core.mesh import constrain
from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array
from vlm_jax.nn import stack
from vlm_jax.nn.conv import Conv, max_pool
from vlm_jax.nn.norms import FrozenNorm, GroupNorm

NORMS = {"group": GroupNorm, "frozen": FrozenNorm}
EXPANSION = 4  # a bottleneck's output is that many times wider than its middle


def norm_keys(ours: str, theirs: str) -> tuple:
  """Rows of KEYS of a norm, whether its statistics are frozen or it has none.

  Their count of batches is in files, and a parameter of nobody's.
  """
  pairs = (("scale", "weight"), ("bias", "bias"), ("frozen_scale", "weight"),
           ("frozen_bias", "bias"), ("frozen_mean", "running_mean"),
           ("frozen_variance", "running_var"), ("count", "num_batches_tracked"))
  return tuple((f"{ours}/{leaf}", f"{theirs}.{key}", "copy") for leaf, key in pairs)


def _block_keys(ours: str, theirs: str) -> tuple:
  keys = []
  for number in (1, 2, 3):
    keys.append((f"{ours}/conv{number}/kernel", f"{theirs}.conv{number}.weight", "conv"))
    keys += norm_keys(f"{ours}/norm{number}", f"{theirs}.bn{number}")
  return tuple(keys)


def _stage_keys(number: int) -> tuple:
  ours, theirs = f"stage{number}", f"layer{number}"
  shortcut = ((f"{ours}/first/shortcut/kernel", f"{theirs}.0.downsample.0.weight", "conv"),
              *norm_keys(f"{ours}/first/shortcut_norm", f"{theirs}.0.downsample.1"))
  return (_block_keys(f"{ours}/first", f"{theirs}.0") + shortcut
          + _block_keys(f"{ours}/rest", f"{theirs}.{{layer+1}}"))


# Ours, theirs (timm and torchvision), operation: see vlm_jax/convert/table.py.
KEYS = (
  ("stem/kernel", "conv1.weight", "conv"),
  *norm_keys("stem_norm", "bn1"),
  *_stage_keys(1),
  *_stage_keys(2),
  *_stage_keys(3),
)


def grid(config: ConfigDict) -> tuple[int, int]:
  """Rows and columns of patches: the image halved by conv1, pooling and all stages but the first.

  Raises:
    UsageError: tower.depths is not one to three numbers above 0.
  """
  depths = config.depths
  if not 1 <= len(depths) <= 3 or min(depths) < 1:
    raise UsageError(f"config.tower.depths is {tuple(depths)}; name the blocks of one to three "
                     "stages, e.g. (3, 4, 23) for ResNet-101")
  side = config.image_size
  for _ in range(len(depths) + 1):
    side = -(-side // 2)
  return side, side


def unread(config: ConfigDict) -> tuple[str, ...]:
  """Nothing: the features are those of the last stage."""
  del config
  return ()


def uses(config: ConfigDict, path: str) -> int:
  """To how many places of one image a parameter is applied: stages differ in size."""
  sides = [-(-config.image_size // 2)]
  for _ in range(len(config.depths)):
    sides.append(-(-sides[-1] // 2))
  module, *inner = path.split("/")
  if not module.startswith("stage"):
    return sides[0] ** 2
  number = int(module.removeprefix("stage"))
  # The first block's 1 x 1 convolution still sees the size that its stage is given.
  before = number > 1 and inner[:2] in (["first", "conv1"], ["first", "norm1"])
  return sides[number - before] ** 2


class Bottleneck(nn.Module):
  """x + norm conv1x1 relu norm conv3x3 relu norm conv1x1 x, then relu; see `nn.stack`."""

  width: int
  stride: int
  shortcut: bool  # whether x is projected (another width or size) before it is added
  config: ConfigDict
  precision: Precision

  @nn.compact
  def __call__(self, x: Array, columns: None, context: None) -> tuple[Array, None]:
    """f[B,Height,Width,C] to f[B,Height/stride,Width/stride,4*width]."""
    del context
    config, dtypes = self.config, self.precision
    norm = lambda name: NORMS[config.norm](config.norm_eps, dtypes, name=name)
    x = constrain(x, ("batch", None, None, None))
    y = Conv(self.width, 1, 1, dtypes, name="conv1")(x)
    y = jax.nn.relu(norm("norm1")(y))
    y = Conv(self.width, 3, self.stride, dtypes, name="conv2")(y)
    y = jax.nn.relu(norm("norm2")(y))
    y = norm("norm3")(Conv(EXPANSION * self.width, 1, 1, dtypes, name="conv3")(y))
    if self.shortcut:
      x = Conv(EXPANSION * self.width, 1, self.stride, dtypes, name="shortcut")(x)
      x = norm("shortcut_norm")(x)
    return jax.nn.relu(x + y), columns


class Stage(nn.Module):
  """A bottleneck that changes size and width, and `depth` - 1 that change neither."""

  width: int
  stride: int
  depth: int
  config: ConfigDict
  precision: Precision

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """f[B,Height,Width,C] to f[B,Height/stride,Width/stride,4*width]."""
    config = self.config
    block = dict(width=self.width, config=config, precision=self.precision)
    run = lambda repeats, **fields: stack.run(
      Bottleneck, repeats, remat=config.remat, unroll=config.unroll, **block, **fields)
    x, _ = Bottleneck(stride=self.stride, shortcut=True, name="first", **block)(x, None, None)
    if self.depth > 1:
      x, _ = run(self.depth - 1, stride=1, shortcut=False, name="rest")(x, None, None)
    return x


class Model(nn.Module):
  """The stem. Attributes: `config.tower`, `config.attention` (unused), dtypes."""

  config: ConfigDict
  attention: ConfigDict
  precision: Precision

  @nn.compact
  def __call__(self, values: Array) -> Features:
    """Pixels u8[B,N,Height,Width,3] to patches f[B,N,P,D] in reading order.

    D is 4 * width * 2^(stages - 1).

    Raises:
      UsageError: a norm or depths that do not exist.
    """
    config, dtypes = self.config, self.precision
    if config.norm not in NORMS:
      raise UsageError(f"config.tower.norm is '{config.norm}'; {nearest(config.norm, NORMS)}")
    rows, columns = grid(config)
    batch, images = values.shape[:2]
    mean, std = (jnp.asarray(field, jnp.float32) for field in (config.mean, config.std))
    x = (values.reshape(batch * images, *values.shape[2:]).astype(jnp.float32) / 255 - mean) / std
    x = Conv(config.width, 7, 2, dtypes, name="stem")(x)
    x = jax.nn.relu(NORMS[config.norm](config.norm_eps, dtypes, name="stem_norm")(x))
    x = max_pool(x, 3, 2)
    for number, depth in enumerate(config.depths):
      stride = 2 if number else 1
      x = Stage(config.width * 2**number, stride, depth, config, dtypes,
                name=f"stage{number + 1}")(x)
    return Features(x.reshape(batch, images, rows * columns, x.shape[-1]))
