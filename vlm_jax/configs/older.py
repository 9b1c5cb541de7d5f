"""Configs of older versions, which lack the fields that were added since.

What does not decide the model is taken from `base.py`; a field that does is never guessed, only
filled where no model of before could have had it.
"""

import re

from ml_collections import ConfigDict

from vlm_jax.configs import base
from vlm_jax.core.errors import UsageError

MODEL = ("fusion", "bridge", "tower", "connector", "llm", "precision")  # what decides a model
COMPUTED = ("remat", "unroll", "init")  # but for these: how it is computed, where it began
SINCE = ("connector.frames",)  # fields of a model added since; before, all did what they default to
# Models of before there was `bridge` had none of these; their defaults are what such models did.
WITH_BRIDGE = re.compile(
  "bridge|connector.(width|latents|depth|heads|norm_eps|kv_heads|head_dim|norm|feed_forward|qk_norm"
  "|slot_width|cross_every|vocab_size|positions)|fusion.(start|new_tokens|say_new|next_image"
  "|predict_unseen|pooling|compat)|llm.(cross|relative_buckets|relative_distance)|tower.read_class")


def fill(config: ConfigDict, path: str) -> list[str]:
  """Adds the fields of `configs/base.py` that a config lacks, and returns them as "name=value".

  Raises:
    UsageError: one of them decides the model; the sentence names `path`, where it belongs.
  """
  models, filled = base.entries(), []
  before = "bridge" not in config and config.get("fusion", {}).get("name") != "flamingo"

  def visit(node: ConfigDict, model: ConfigDict, prefix: str) -> None:
    if prefix in models:
      for name in node:
        visit(node[name], models[prefix], f"{prefix}.{name}")
      return
    if prefix == "fusion.objectives":
      return  # the strategy names them, and training has refused what is none
    for name, default in model.items():
      field = f"{prefix}.{name}" if prefix else name
      if name in node:
        if isinstance(default, ConfigDict):
          visit(node[name], default, field)
        continue
      known = name in COMPUTED or field in SINCE or before and WITH_BRIDGE.fullmatch(field)
      if field.split(".")[0] in MODEL and not known:
        raise UsageError(f"{path} has no config.{field}, which decides what the model is; write it "
                         f"there as it was in the version that trained it (now: {default!r})")
      node[name] = default
      filled.append(f"{field}={default!r}" if not isinstance(default, ConfigDict) else field)

  visit(config, base.get_config(), "")
  return filled
