"""EVA-CLIP ViT-g (arXiv:2211.07636) as BLIP-2 and InstructBLIP read it: all but its last block.

The encoder of `vit` with a class token, queries, keys and values in one matrix, and exact GELU. The
blocks come from EVA; the norm behind them is the bridge's (LAVIS: ln_vision), so stages that freeze
the tower may train "tower/post_norm". Its keys began without a bias: published ones are zero.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.core import hf
from vlm_jax.core.errors import UsageError
from vlm_jax.towers import vit
from vlm_jax.towers.vit import GRIDS, Model, attention_shape, grid, unread

__all__ = ["GRIDS", "KEYS", "MODEL_TYPES", "Model", "attention_shape", "grid", "read_hf", "unread",
           "write_hf"]

_ATTENTION = "encoder.layers.{layer}.self_attn."
_OWN = {
  "class_token": ("embeddings.class_embedding", "lead2"),
  "positions": ("embeddings.position_embedding", "lead"),
  "layers/attention/out/kernel": (_ATTENTION + "projection.weight", "out"),
  "layers/attention/out/bias": (_ATTENTION + "projection.bias", "copy"),
  **{f"layers/attention/{name}/{leaf}": (f"{_ATTENTION}qkv.{theirs}[{part}/3]", op)
     for part, name in enumerate(("query", "key", "value"))
     for leaf, theirs, op in (("kernel", "weight", "in"), ("bias", "bias", "flat"))},
}
# Ours, theirs, operation.
KEYS = tuple((ours, *_OWN.get(ours, (theirs, op))) for ours, theirs, op in vit.KEYS
             if not ours.startswith(("pre_norm/", "pool/")))
MODEL_TYPES = ("blip_2_vision_model", "instructblip_vision_model")  # one by two names
FIELDS = (
  hf.Field("width", "hidden_size", 1408),
  hf.Field("mlp", "intermediate_size", 6144),
  hf.Field("depth", "num_hidden_layers", 39),
  hf.Field("heads", "num_attention_heads", 16),
  hf.Field("image_size", "image_size", 224),
  hf.Field("patch", "patch_size", 14),
  hf.Field("norm_eps", "layer_norm_eps", 1e-6),
)
PARTS = {"class_token": True, "pre_norm": False, "patch_bias": True, "post_norm": True}


def read_hf(theirs: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of `config.tower` that their node says, with patches behind the last norm.

  Raises:
    UsageError: no biases, or an activation that the model does not have.
  """
  hf.expect(theirs, "qkv_bias", True, True)
  clip = vit.FAMILIES["clip_vision_model"]
  return hf.read(theirs, FIELDS) | PARTS | {
    "activation": hf.activation(theirs, "hidden_act", "gelu"), "pool": "none", "feature_layer": -1,
    "read_class": False, "position_size": 0, "position_resize": "bicubic", "mean": clip.mean,
    "std": clip.std}


def write_hf(config: ConfigDict) -> dict[str, Any]:
  """Their node of `config.tower`, under BLIP-2's name.

  Raises:
    UsageError: parts or an interpolation that theirs has not.
  """
  for name, needed in {**PARTS, "position_resize": "bicubic"}.items():
    if config[name] != needed:
      raise UsageError(f"config.tower.{name} is {config[name]!r}; a checkpoint of model_type "
                       f"'{MODEL_TYPES[0]}' can only say {needed!r}")
  return {
    "model_type": MODEL_TYPES[0],
    **hf.write(config, FIELDS),
    "image_size": config.position_size or config.image_size,
    "hidden_act": hf.ACTIVATIONS[config.activation][0],
    "qkv_bias": True,
  }
