"""Vision transformers (arXiv:2010.11929): ViT, CLIP and SigLIP encoders by config.

Patches are cut by a reshape and embedded by a matrix product, which is the convolution with kernel
and stride p: kernel[(row * p + column) * 3 + channel, d] = conv.weight[d, channel, row, column] in
torch's order. Pixels that do not fill a patch at the right and lower edge are left out, as by a
convolution without padding. Positions learned at another size (`position_size`) are resized.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.nn import initializers
from ml_collections import ConfigDict

from vlm_jax.core import hf
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.fusion import Features
from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.mesh import constrain
from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array
from vlm_jax.nn import stack
from vlm_jax.nn.attention import Attention, Context, make_context
from vlm_jax.nn.linear import Linear, parameter
from vlm_jax.nn.mlp import MLP
from vlm_jax.nn.norms import LayerNorm
from vlm_jax.ops.attention import attention
from vlm_jax.ops.resize import resize_each, resize_grid

# Width, depth, mlp, heads. Ti to H: arXiv:2010.11929 and 2106.10270; g, G: 2106.04560;
# So400m: 2305.13035.
SIZES = {
  "Ti": (192, 12, 768, 3),
  "S": (384, 12, 1536, 6),
  "B": (768, 12, 3072, 12),
  "L": (1024, 24, 4096, 16),
  "H": (1280, 32, 5120, 16),
  "So400m": (1152, 27, 4304, 16),
  "g": (1408, 40, 6144, 16),
  "G": (1664, 48, 8192, 16),
}
POOLS = ("none", "gap", "tok", "map")
GRIDS = True  # it reads images with grids of their own, see `Model`

# Ours, theirs (CLIP and SigLIP share names but the patch, positions and first norm), operation.
KEYS = (
  ("patch/kernel", "embeddings.patch_embedding.weight", "patch"),
  ("patch/bias", "embeddings.patch_embedding.bias", "copy"),
  ("class_token", "embeddings.class_embedding", "flat"),
  ("positions", "embeddings.position_embedding.weight", "copy"),
  ("pre_norm/scale", "pre_layrnorm.weight", "copy"),  # the typo is theirs
  ("pre_norm/bias", "pre_layrnorm.bias", "copy"),
  ("layers/attention_norm/scale", "encoder.layers.{layer}.layer_norm1.weight", "copy"),
  ("layers/attention_norm/bias", "encoder.layers.{layer}.layer_norm1.bias", "copy"),
  ("layers/attention/query/kernel", "encoder.layers.{layer}.self_attn.q_proj.weight", "in"),
  ("layers/attention/query/bias", "encoder.layers.{layer}.self_attn.q_proj.bias", "flat"),
  ("layers/attention/key/kernel", "encoder.layers.{layer}.self_attn.k_proj.weight", "in"),
  ("layers/attention/key/bias", "encoder.layers.{layer}.self_attn.k_proj.bias", "flat"),
  ("layers/attention/value/kernel", "encoder.layers.{layer}.self_attn.v_proj.weight", "in"),
  ("layers/attention/value/bias", "encoder.layers.{layer}.self_attn.v_proj.bias", "flat"),
  ("layers/attention/out/kernel", "encoder.layers.{layer}.self_attn.out_proj.weight", "out"),
  ("layers/attention/out/bias", "encoder.layers.{layer}.self_attn.out_proj.bias", "copy"),
  ("layers/mlp_norm/scale", "encoder.layers.{layer}.layer_norm2.weight", "copy"),
  ("layers/mlp_norm/bias", "encoder.layers.{layer}.layer_norm2.bias", "copy"),
  ("layers/mlp/up/kernel", "encoder.layers.{layer}.mlp.fc1.weight", "in"),
  ("layers/mlp/up/bias", "encoder.layers.{layer}.mlp.fc1.bias", "copy"),
  ("layers/mlp/down/kernel", "encoder.layers.{layer}.mlp.fc2.weight", "in"),
  ("layers/mlp/down/bias", "encoder.layers.{layer}.mlp.fc2.bias", "copy"),
  ("post_norm/scale", "post_layernorm.weight", "copy"),
  ("post_norm/bias", "post_layernorm.bias", "copy"),
  ("pool/probe", "head.probe", "lead"),
  ("pool/query/kernel", "head.attention.in_proj_weight[0/3]", "in"),
  ("pool/key/kernel", "head.attention.in_proj_weight[1/3]", "in"),
  ("pool/value/kernel", "head.attention.in_proj_weight[2/3]", "in"),
  ("pool/query/bias", "head.attention.in_proj_bias[0/3]", "flat"),
  ("pool/key/bias", "head.attention.in_proj_bias[1/3]", "flat"),
  ("pool/value/bias", "head.attention.in_proj_bias[2/3]", "flat"),
  ("pool/out/kernel", "head.attention.out_proj.weight", "out"),
  ("pool/out/bias", "head.attention.out_proj.bias", "copy"),
  ("pool/norm/scale", "head.layernorm.weight", "copy"),
  ("pool/norm/bias", "head.layernorm.bias", "copy"),
  ("pool/mlp/up/kernel", "head.mlp.fc1.weight", "in"),
  ("pool/mlp/up/bias", "head.mlp.fc1.bias", "copy"),
  ("pool/mlp/down/kernel", "head.mlp.fc2.weight", "in"),
  ("pool/mlp/down/bias", "head.mlp.fc2.bias", "copy"),
)


class Family(NamedTuple):
  """A published kind of encoder: what its config.json leaves out means, its parts, its pixels."""

  patch: int
  norm_eps: float
  activation: str
  class_token: bool
  pre_norm: bool
  patch_bias: bool
  mean: tuple[float, float, float]
  std: tuple[float, float, float]


FAMILIES = {
  "clip_vision_model": Family(
    32, 1e-5, "quick_gelu", True, True, False,
    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
  "siglip_vision_model": Family(
    16, 1e-6, "gelu_pytorch_tanh", False, False, True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
MODEL_TYPES = tuple(FAMILIES)
FIELDS = (
  hf.Field("width", "hidden_size", 768),
  hf.Field("mlp", "intermediate_size", 3072),
  hf.Field("depth", "num_hidden_layers", 12),
  hf.Field("heads", "num_attention_heads", 12),
  hf.Field("image_size", "image_size", 224),
)


def read_hf(theirs: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of `config.tower` that their node says, with patches behind the last norm.

  They pool as the published model alone does; a VLM that reads patches sets `pool` "none".

  Raises:
    UsageError: an activation that the model does not have.
  """
  family = FAMILIES[theirs["model_type"]]
  head = "map" if theirs.get("vision_use_head", True) else "none"
  return hf.read(theirs, FIELDS) | {
    "patch": theirs.get("patch_size", family.patch),
    "norm_eps": theirs.get("layer_norm_eps", family.norm_eps),
    "activation": hf.activation(theirs, "hidden_act", family.activation),
    "class_token": family.class_token, "pre_norm": family.pre_norm,
    "patch_bias": family.patch_bias, "mean": family.mean, "std": family.std,
    "post_norm": True, "pool": "tok" if family.class_token else head, "feature_layer": -1,
    "position_size": 0, "position_resize": "bicubic", "read_class": False,
  }


def write_hf(config: ConfigDict) -> dict[str, Any]:
  """Their node of `config.tower`.

  Raises:
    UsageError: parts that no published kind has together.
  """
  parts = (config.class_token, config.pre_norm, config.patch_bias)
  for kind, family in FAMILIES.items():
    if parts == (family.class_token, family.pre_norm, family.patch_bias):
      return {
        "model_type": kind,
        **hf.write(config, FIELDS),
        "image_size": config.position_size or config.image_size,
        "patch_size": config.patch,
        "num_channels": 3,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": hf.ACTIVATIONS[config.activation][0],
        **({"vision_use_head": config.pool == "map"} if kind == "siglip_vision_model" else {}),
      }
  raise UsageError(f"config.tower: class_token, pre_norm, patch_bias are {parts}, neither CLIP's "
                   "(True, True, False) nor SigLIP's (False, False, True)")


def size(name: str) -> dict[str, int]:
  """The fields of `config.tower` of a size: `config.tower.update(vit.size("L/14"))`.

  Args:
    name: a size of `SIZES`, with or without "/patch".

  Raises:
    UsageError: no such size.
  """
  variant, _, patch = name.partition("/")
  if variant not in SIZES:
    raise UsageError(f"config.tower: no ViT size '{variant}'; {nearest(variant, SIZES)}")
  fields = dict(zip(("width", "depth", "mlp", "heads"), SIZES[variant], strict=True))
  return fields | ({"patch": int(patch)} if patch else {})


def patch_grid(config: ConfigDict) -> tuple[int, int]:
  """Rows and columns of patches."""
  side = config.image_size // config.patch
  return side, side


def grid(config: ConfigDict) -> tuple[int, int]:
  """Rows and columns of features: those of the patches; with the class token before them, one row.

  A class token that is to be read and is not there is a UsageError.
  """
  rows, columns = patch_grid(config)
  if config.read_class and not config.class_token:
    raise UsageError("config.tower.read_class needs config.tower.class_token=True")
  return (1, 1 + rows * columns) if config.read_class else (rows, columns)


def attention_shape(config: ConfigDict) -> tuple[int, int, int, int]:
  """(T, H, G, C) of every layer's attention."""
  rows, columns = patch_grid(config)
  length = rows * columns + int(config.class_token)
  return length, config.heads, config.heads, config.width // config.heads


def patches(values: Array, config: ConfigDict) -> Array:
  """Pixels u8[B,N,Height,Width,3] to normalised patches f32[B*N, P, p*p*3]."""
  batch, images, height, width, channels = values.shape
  p = config.patch
  rows, columns = height // p, width // p
  mean, std = (jnp.asarray(field, jnp.float32) for field in (config.mean, config.std))
  x = values[:, :, : rows * p, : columns * p].astype(jnp.float32)
  x = (x / 255 - mean) / std
  x = x.reshape(batch * images, rows, p, columns, p, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch * images, rows * columns, p * p * channels)


def see_all(queries: int, keys: int, rows: int) -> IntervalMask:
  """Every query sees every key."""
  zeros = jnp.zeros((rows, queries), jnp.int32)
  return IntervalMask(lo=zeros, hi=zeros + keys)


def see_grids(grids: Array, cells: int) -> IntervalMask:
  """Of `cells` patches the first rows * columns of every image i32[n,2] are seen, by all."""
  zeros = jnp.zeros((grids.shape[0], cells), jnp.int32)
  return IntervalMask(lo=zeros, hi=zeros + jnp.prod(grids, axis=-1, keepdims=True))


def positions(module: nn.Module, config: ConfigDict, tokens: int, precision: Precision,
              grids: Array | None = None) -> Array:
  """Learned positions f[tokens + P, D], of the tokens first; those of another grid are resized.

  `config.position_size` is the image size they were learned at (0: the same), and
  `config.position_resize` how the patches' are resized, see `ops.resize`. With grids i32[n,2] of
  the images they are each image's own, f[n, P, D].

  Raises:
    UsageError: grids, and a class token.
  """
  side = (config.position_size or config.image_size) // config.patch
  table = parameter(module, "positions", initializers.normal(config.width**-0.5),
                    (tokens + side * side, config.width), ("position", "embed"), precision.param)
  if grids is not None:
    if tokens:
      raise UsageError("config.tower.class_token is True, but config.data.decode.fit 'naflex' is "
                       "read by towers without one; use config.tower.name 'siglip2'")
    rows, columns = patch_grid(config)
    return resize_each(table, (side, side), grids, rows * columns, config.position_resize)
  resized = resize_grid(table[tokens:], (side, side), patch_grid(config), config.position_resize)
  return jnp.concatenate([table[:tokens], resized]) if tokens else resized


class Block(nn.Module):
  """x + attention(norm x), then x + mlp(norm x), with biases."""

  config: ConfigDict
  implementation: str
  precision: Precision

  @nn.compact
  def __call__(self, x: Array, columns: None, context: Context) -> tuple[Array, None]:
    """See `nn.stack`."""
    config = self.config
    norm = lambda name: LayerNorm(config.norm_eps, self.precision, name=name)
    x = constrain(x, ("batch", None, None))
    y, columns = Attention(
      heads=config.heads,
      groups=config.heads,
      head_dim=config.width // config.heads,
      bias=True,
      implementation=self.implementation,
      precision=self.precision,
      name="attention",
    )(norm("attention_norm")(x), columns, context)
    x = x + y
    mlp = MLP(config.width, config.mlp, config.activation, True, self.precision, name="mlp")
    return x + mlp(norm("mlp_norm")(x)), columns


class MapPool(nn.Module):
  """A learned probe reads all patches, then an MLP: the pooling of SigLIP (arXiv:2106.04560)."""

  config: ConfigDict
  precision: Precision

  @nn.compact
  def __call__(self, x: Array, mask: IntervalMask | None = None) -> Array:
    """f[B,P,D] to f[B,D]; the probe sees what the first query of the mask sees, None: all."""
    config, rows = self.config, x.shape[0]
    head = config.width // config.heads
    project = lambda name: Linear((config.heads, head), ("embed", "heads", "head"), True,
                                  self.precision, name=name)
    probe = parameter(self, "probe", initializers.xavier_uniform(), (1, config.width),
                      (None, "norm"), self.precision.param)
    probe = jnp.broadcast_to(probe, (rows, 1, config.width))
    seen = see_all(1, x.shape[1], rows) if mask is None else IntervalMask(
      mask.lo[:, :1], mask.hi[:, :1])
    y = attention(project("query")(probe), project("key")(x), project("value")(x), seen)
    axes = ("heads", "head", "embed")
    y = Linear((config.width,), axes, True, self.precision, name="out")(y)[:, 0]
    mlp = MLP(config.width, config.mlp, config.activation, True, self.precision, name="mlp")
    return y + mlp(LayerNorm(config.norm_eps, self.precision, name="norm")(y))


class Model(nn.Module):
  """The encoder. Attributes: `config.tower`, `config.attention`, dtypes."""

  config: ConfigDict
  attention: ConfigDict
  precision: Precision

  @nn.compact
  def __call__(self, values: Array, grids: Array | None = None) -> Features:
    """Pixels u8[B,N,Height,Width,3], and perhaps grids i32[B,N,2], to Features of D = config.width.

    `feature_layer` -1 reads the last block, behind `post_norm`; -2 the one before it (LLaVA),
    without norm. Layers that nothing reads have parameters and are not computed. The class token
    is dropped, or with `read_class` the first of the patches. Patches behind the grid of an image
    are seen by none, and mean nothing.

    Raises:
      UsageError: a feature_layer, pool or combination that does not exist.
    """
    config, precision = self.config, self.precision
    used = used_blocks(config)
    if grids is not None:
      grids = grids.reshape(-1, 2)
      if config.pool not in ("map", "none"):
        raise UsageError(f"config.tower.pool is '{config.pool}', but config.data.decode.fit "
                         "'naflex' is pooled by 'map'")
    batch, images = values.shape[:2]
    x = embed_patches(values, config, precision)
    if config.class_token:
      token = parameter(self, "class_token", initializers.normal(config.width**-0.5),
                        (config.width,), ("norm",), precision.param)
      token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, config.width))
      x = jnp.concatenate([token, x], axis=1)
    tokens = int(config.class_token)
    x = x + positions(self, config, tokens, precision, grids).astype(x.dtype)
    mask = None if grids is None else see_grids(grids, x.shape[1])
    if config.pre_norm:
      x = LayerNorm(config.norm_eps, precision, name="pre_norm")(x)
    depth = config.depth if self.is_initializing() else used
    x = run_blocks(Block, x, depth, config, self.attention, precision, mask)
    if config.post_norm and depth == config.depth:
      x = LayerNorm(config.norm_eps, precision, name="post_norm")(x)
    return features(x, tokens, (batch, images), config, precision, mask, config.read_class)


# Parts of a tower, called inside its compact `__call__`, where their modules belong to it.


def embed_patches(values: Array, config: ConfigDict, precision: Precision) -> Array:
  """Pixels u8[B,N,Height,Width,3] to patches f[B*N,P,D] in the compute dtype."""
  x = patches(values, config).astype(precision.compute)
  return Linear((config.width,), ("patch", "embed"), config.patch_bias, precision, name="patch")(x)


def run_blocks(block: type[nn.Module], x: Array, used: int, config: ConfigDict,
               attention: ConfigDict, precision: Precision,
               mask: IntervalMask | None = None) -> Array:
  """The first `used` of `config.depth` blocks on f[B*N,T,D]; None: all slots see each other."""
  mask = see_all(x.shape[1], x.shape[1], x.shape[0]) if mask is None else mask
  context = make_context(
    mask, None, (attention.block_q, attention.block_k),
    width=config.width // config.heads, dtype=precision.compute)
  x, _ = stack.run(
    block, config.depth, remat=config.remat, unroll=config.unroll, used=used, config=config,
    implementation=attention.implementation, precision=precision, name="layers",
  )(x, None, context)
  return x


def features(x: Array, tokens: int, outer: tuple[int, int], config: ConfigDict,
             precision: Precision, mask: IntervalMask | None = None, whole: bool = False
             ) -> Features:
  """f[B*N,T,D] of which the first `tokens` are no patches to Features of (B, N) = `outer`.

  Of a mask only pooling by "map" knows. `whole`: those tokens stay before the patches.
  """
  if config.pool == "map":
    pooled = MapPool(config, precision, name="pool")(x, mask)
  else:
    pooled = {"none": None, "tok": x[:, 0], "gap": x[:, tokens:].mean(axis=1)}[config.pool]
  if pooled is not None:
    pooled = pooled.reshape(*outer, config.width)
  return Features((x if whole else x[:, tokens:]).reshape(*outer, -1, config.width), pooled)


def unread(config: ConfigDict) -> tuple[str, ...]:
  """Patterns of the blocks behind `feature_layer`, and of the norm behind them."""
  used = used_blocks(config)
  if used == config.depth:
    return ()
  return (f"layers[{used}:]", *(("post_norm",) if config.post_norm else ()))


def used_blocks(config: ConfigDict) -> int:
  """How many blocks the features need.

  Raises:
    UsageError: a feature_layer, pool or combination that does not exist.
  """
  if not -config.depth - 1 <= config.feature_layer <= -1:
    raise UsageError(f"config.tower.feature_layer is {config.feature_layer}; use -1 (last block) "
                     f"to {-config.depth - 1} (embeddings), config.tower.depth is {config.depth}")
  if config.pool not in POOLS:
    raise UsageError(f"config.tower.pool is '{config.pool}'; {nearest(config.pool, POOLS)}")
  if config.pool == "tok" and not config.class_token:
    raise UsageError("config.tower.pool 'tok' needs config.tower.class_token=True")
  if config.pool != "none" and config.feature_layer != -1:
    raise UsageError(f"config.tower.pool '{config.pool}' pools the last block; set "
                     "config.tower.feature_layer=-1 or config.tower.pool='none'")
  return config.depth + 1 + config.feature_layer
