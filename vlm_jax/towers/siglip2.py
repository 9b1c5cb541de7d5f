"""SigLIP 2 in its NaFlex form (arXiv:2502.14786, section 2.4.2).

The encoder of `vit` whose patches are cut before a linear layer and whose positions are always
resized with antialiasing: to every image's own grid where config.data.decode.fit is "naflex", else
to the square. The checkpoints of SigLIP 2 for one resolution are plain SigLIP (`vit`).
"""

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.core import hf
from vlm_jax.core.errors import UsageError
from vlm_jax.towers import vit
from vlm_jax.towers.vit import GRIDS, Model, attention_shape, grid, unread

__all__ = ["GRIDS", "KEYS", "MODEL_TYPES", "Model", "attention_shape", "grid", "read_hf", "unread",
           "write_hf"]

# Ours, theirs, operation: their patches are (row, column, channel) already.
KEYS = tuple(
  (ours, theirs, "in" if op == "patch" else op) for ours, theirs, op in vit.KEYS)
MODEL_TYPES = ("siglip2_vision_model",)
FIELDS = (*(field for field in vit.FIELDS if field.ours != "image_size"),
          hf.Field("patch", "patch_size", 16), hf.Field("norm_eps", "layer_norm_eps", 1e-6))


def read_hf(theirs: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of `config.tower` that their node says, pooled as the published model alone does.

  Raises:
    UsageError: positions that are no square, an activation that the model does not have.
  """
  count, config = theirs.get("num_patches", 256), hf.read(theirs, FIELDS)
  if math.isqrt(count) ** 2 != count:
    raise UsageError(f"config.json: siglip2_vision_model.num_patches is {count}; only a square "
                     "number can be imported")
  return config | {
    "image_size": math.isqrt(count) * config["patch"],
    "activation": hf.activation(theirs, "hidden_act", "gelu_pytorch_tanh"),
    "class_token": False, "pre_norm": False, "patch_bias": True, "post_norm": True,
    "pool": "map" if theirs.get("vision_use_head", True) else "none",
    "read_class": False, "feature_layer": -1, "position_size": 0,
    "position_resize": "bilinear_antialias",
    "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
  }


def write_hf(config: ConfigDict) -> dict[str, Any]:
  """Their node of `config.tower`.

  Raises:
    UsageError: parts or an interpolation that a SigLIP 2 has not.
  """
  parts = (config.class_token, config.pre_norm, config.patch_bias, config.position_resize)
  if parts != (False, False, True, "bilinear_antialias"):
    raise UsageError("config.tower: class_token, pre_norm, patch_bias, position_resize are "
                     f"{parts}, not SigLIP 2's (False, False, True, 'bilinear_antialias')")
  side = (config.position_size or config.image_size) // config.patch
  return {
    "model_type": MODEL_TYPES[0],
    **hf.write(config, FIELDS),
    "num_patches": side * side,
    "num_channels": 3,
    "hidden_act": hf.ACTIVATIONS[config.activation][0],
    "vision_use_head": config.pool == "map",
  }
