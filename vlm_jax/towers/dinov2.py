"""DINOv2 (arXiv:2304.07193), with registers (arXiv:2309.16588) or without.

The pre-norm encoder of `vit` with a learned scale of every residual branch (LayerScale,
arXiv:2103.17239) and, in the giant, SwiGLU. Registers stand between class token and patches, have
no positions and are dropped with it. Their checkpoints differ in how positions are resized:
`config.tower.position_resize` is "bicubic" without registers (transformers; DINOv2's own code adds
0.1 cells, "bicubic_offset") and "bicubic_antialias" with them.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from ml_collections import ConfigDict

from vlm_jax.core import hf
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.fusion import Features
from vlm_jax.core.mesh import constrain
from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array
from vlm_jax.nn.attention import Attention, Context
from vlm_jax.nn.linear import Linear, parameter
from vlm_jax.nn.mlp import MLP
from vlm_jax.nn.norms import LayerNorm
from vlm_jax.towers import vit
from vlm_jax.towers.vit import patch_grid as grid

__all__ = ["KEYS", "MODEL_TYPES", "Model", "attention_shape", "grid", "read_hf", "unread",
           "write_hf"]

LAYER = "encoder.layer.{layer}."
# Ours, theirs, operation.
KEYS = (
  ("patch/kernel", "embeddings.patch_embeddings.projection.weight", "patch"),
  ("patch/bias", "embeddings.patch_embeddings.projection.bias", "copy"),
  ("class_token", "embeddings.cls_token", "lead"),
  ("mask_token", "embeddings.mask_token", "lead"),
  ("registers", "embeddings.register_tokens", "lead"),
  ("positions", "embeddings.position_embeddings", "lead"),
  ("layers/attention_norm/scale", LAYER + "norm1.weight", "copy"),
  ("layers/attention_norm/bias", LAYER + "norm1.bias", "copy"),
  *((f"layers/attention/{name}/kernel", f"{LAYER}attention.attention.{name}.weight", "in")
    for name in ("query", "key", "value")),
  *((f"layers/attention/{name}/bias", f"{LAYER}attention.attention.{name}.bias", "flat")
    for name in ("query", "key", "value")),
  ("layers/attention/out/kernel", LAYER + "attention.output.dense.weight", "out"),
  ("layers/attention/out/bias", LAYER + "attention.output.dense.bias", "copy"),
  ("layers/attention_scale", LAYER + "layer_scale1.lambda1", "copy"),
  ("layers/mlp_norm/scale", LAYER + "norm2.weight", "copy"),
  ("layers/mlp_norm/bias", LAYER + "norm2.bias", "copy"),
  ("layers/mlp/up/kernel", LAYER + "mlp.fc1.weight", "in"),
  ("layers/mlp/up/bias", LAYER + "mlp.fc1.bias", "copy"),
  ("layers/mlp/down/kernel", LAYER + "mlp.fc2.weight", "in"),
  ("layers/mlp/down/bias", LAYER + "mlp.fc2.bias", "copy"),
  ("layers/gated/in/kernel", LAYER + "mlp.weights_in.weight", "in"),
  ("layers/gated/in/bias", LAYER + "mlp.weights_in.bias", "flat"),
  ("layers/gated/out/kernel", LAYER + "mlp.weights_out.weight", "in"),
  ("layers/gated/out/bias", LAYER + "mlp.weights_out.bias", "copy"),
  ("layers/mlp_scale", LAYER + "layer_scale2.lambda1", "copy"),
  ("post_norm/scale", "layernorm.weight", "copy"),
  ("post_norm/bias", "layernorm.bias", "copy"),
)

PLAIN, REGISTERS = MODEL_TYPES = ("dinov2", "dinov2_with_registers")
RESIZE = {PLAIN: "bicubic", REGISTERS: "bicubic_antialias"}
PATCH = {PLAIN: 14, REGISTERS: 16}  # what a node without patch_size means
FIELDS = (
  hf.Field("width", "hidden_size", 768),
  hf.Field("depth", "num_hidden_layers", 12),
  hf.Field("heads", "num_attention_heads", 12),
  hf.Field("image_size", "image_size", 224),
  hf.Field("norm_eps", "layer_norm_eps", 1e-6),
)
FEED_FORWARDS = ("plain", "gated")


def _gated_width(plain: int) -> int:
  """Two thirds of the plain MLP's width, up to a multiple of 8, as their SwiGLU has."""
  return (int(plain * 2 / 3) + 7) // 8 * 8


def read_hf(theirs: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of `config.tower` that their node says, pooled as the published model alone does.

  Raises:
    UsageError: a setting that the model does not have.
  """
  kind, config = theirs["model_type"], hf.read(theirs, FIELDS)
  hf.expect(theirs, "qkv_bias", True, True)
  hf.expect(theirs, "use_mask_token", True, True)
  plain, gated = int(config["width"] * theirs.get("mlp_ratio", 4)), theirs.get("use_swiglu_ffn")
  return config | {
    "patch": theirs.get("patch_size", PATCH[kind]),
    "mlp": _gated_width(plain) if gated else plain,
    "feed_forward": "gated" if gated else "plain",
    "activation": "silu" if gated else hf.activation(theirs, "hidden_act", "gelu"),
    "registers": theirs.get("num_register_tokens", 4) if kind == REGISTERS else 0,
    "class_token": True, "pre_norm": False, "patch_bias": True, "post_norm": True, "pool": "tok",
    "feature_layer": -1, "position_size": 0, "position_resize": RESIZE[kind],
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
  }


def write_hf(config: ConfigDict) -> dict[str, Any]:
  """Their node of `config.tower`.

  Raises:
    UsageError: a width or an interpolation that none of theirs has.
  """
  kind = REGISTERS if config.registers else PLAIN
  if config.position_resize != RESIZE[kind]:
    raise UsageError(f"config.tower.position_resize is '{config.position_resize}'; a {kind} "
                     f"checkpoint can only say '{RESIZE[kind]}'")
  gated = config.feed_forward == "gated"
  widths = {_gated_width(config.width * ratio) if gated else config.width * ratio: ratio
            for ratio in range(1, 9)}
  if config.mlp not in widths:
    raise UsageError(f"config.tower.mlp is {config.mlp}; a {kind} checkpoint of width "
                     f"{config.width} can only say {', '.join(map(str, widths))}")
  return {
    "model_type": kind,
    **hf.write(config, FIELDS),
    "image_size": config.position_size or config.image_size,
    "patch_size": config.patch,
    "num_channels": 3,
    "mlp_ratio": widths[config.mlp],
    "use_swiglu_ffn": gated,
    "hidden_act": "gelu" if gated else hf.ACTIVATIONS[config.activation][0],
    **({"num_register_tokens": config.registers} if config.registers else {}),
  }


def attention_shape(config: ConfigDict) -> tuple[int, int, int, int]:
  """(T, H, G, C) of every layer's attention."""
  length, *shape = vit.attention_shape(config)
  return length + config.registers, *shape


def unread(config: ConfigDict) -> tuple[str, ...]:
  """As `vit.unread`, and the mask token of their pretraining, which checkpoints keep."""
  return (*vit.unread(config), "mask_token")


class SwiGLU(nn.Module):
  """(silu(x gate) * (x up)) out with biases (arXiv:2002.05202), gate and up in one kernel."""

  width: int
  hidden: int
  precision: Precision

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """f[..., D] to f[..., width]."""
    both = Linear((2, self.hidden), ("embed", None, "mlp"), True, self.precision, name="in")(x)
    x = jax.nn.silu(both[..., 0, :]) * both[..., 1, :]
    return Linear((self.width,), ("mlp", "embed"), True, self.precision, name="out")(x)


class Block(nn.Module):
  """x + scale * attention(norm x), then x + scale * feed_forward(norm x)."""

  config: ConfigDict
  implementation: str
  precision: Precision

  @nn.compact
  def __call__(self, x: Array, columns: None, context: Context) -> tuple[Array, None]:
    """See `nn.stack`."""
    config, precision = self.config, self.precision
    norm = lambda name: LayerNorm(config.norm_eps, precision, name=name)
    scale = lambda name: parameter(
      self, name, initializers.ones, (config.width,), ("norm",), precision.param
    ).astype(precision.compute)
    x = constrain(x, ("batch", None, None))
    y, columns = Attention(
      heads=config.heads, groups=config.heads, head_dim=config.width // config.heads, bias=True,
      implementation=self.implementation, precision=precision, name="attention",
    )(norm("attention_norm")(x), columns, context)
    x = x + scale("attention_scale") * y
    if config.feed_forward == "gated":
      feed_forward = SwiGLU(config.width, config.mlp, precision, name="gated")
    else:
      feed_forward = MLP(config.width, config.mlp, config.activation, True, precision, name="mlp")
    return x + scale("mlp_scale") * feed_forward(norm("mlp_norm")(x)), columns


class Model(nn.Module):
  """The encoder. Attributes: `config.tower`, `config.attention`, dtypes."""

  config: ConfigDict
  attention: ConfigDict
  precision: Precision

  @nn.compact
  def __call__(self, values: Array) -> Features:
    """Pixels u8[B,N,Height,Width,3] to Features of D = config.width; `feature_layer` as in `vit`.

    Raises:
      UsageError: a feed_forward, feature_layer or pool that does not exist.
    """
    config, precision = self.config, self.precision
    if config.feed_forward not in FEED_FORWARDS:
      raise UsageError(f"config.tower.feed_forward is '{config.feed_forward}'; "
                       f"{nearest(config.feed_forward, FEED_FORWARDS)}")
    used = vit.used_blocks(config)
    x = vit.embed_patches(values, config, precision)

    def token(name: str, *shape: int) -> Array:
      init = initializers.normal(0.02)
      axes = (None,) * len(shape) + ("norm",)
      made = parameter(self, name, init, (*shape, config.width), axes, precision.param)
      return made.astype(x.dtype)

    repeat = lambda tokens: jnp.broadcast_to(tokens, (x.shape[0], *tokens.shape))
    place = vit.positions(self, config, 1, precision).astype(x.dtype)
    parts = [repeat(token("class_token", 1) + place[:1]), x + place[1:]]
    if config.registers:
      parts.insert(1, repeat(token("registers", config.registers)))
    token("mask_token")  # read by their pretraining only
    x = jnp.concatenate(parts, axis=1)
    depth = config.depth if self.is_initializing() else used
    x = vit.run_blocks(Block, x, depth, config, self.attention, precision)
    if config.post_norm and depth == config.depth:
      x = LayerNorm(config.norm_eps, precision, name="post_norm")(x)
    return vit.features(x, 1 + config.registers, values.shape[:2], config, precision)
