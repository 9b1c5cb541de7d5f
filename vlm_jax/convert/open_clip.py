"""OpenCLIP's CLIP (arXiv:2212.07143): open_clip_config.json and state dicts, both directions.

Below "visual." lies the `vit` tower, at the top (or below "text.") the text tower, each with its
queries, keys and values in one matrix. OpenAI's CLIP has the same keys. A model of theirs is
`model_cfg`: sizes, "quick_gelu" for both towers or exact GELU, "argmax" for the largest id of a
text.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.convert.table import Keys, Part
from vlm_jax.core import hf
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.towers import vit

VISION, TEXT = "visual.", ""  # where the towers are


def both(ours: str, theirs: str, kind: str = "copy") -> Keys:
  """Rows of a norm (their weight is our scale) or of a linear layer."""
  name = "scale" if kind == "copy" else "kernel"
  return ((f"{ours}/{name}", f"{theirs}.weight", kind), (f"{ours}/bias", f"{theirs}.bias", "copy"))


_BLOCK = "transformer.resblocks.{layer}."
BLOCKS: Keys = (
  *both("layers/attention_norm", _BLOCK + "ln_1"),
  *((f"layers/attention/{name}/{leaf}", f"{_BLOCK}attn.in_proj_{theirs}[{part}/3]", op)
    for part, name in enumerate(("query", "key", "value"))
    for leaf, theirs, op in (("kernel", "weight", "in"), ("bias", "bias", "flat"))),
  *both("layers/attention/out", _BLOCK + "attn.out_proj", "out"),
  *both("layers/mlp_norm", _BLOCK + "ln_2"),
  *both("layers/mlp/up", _BLOCK + "mlp.c_fc", "in"),
  *both("layers/mlp/down", _BLOCK + "mlp.c_proj", "in"),
)
# By the module's name.
TABLES: dict[str, Keys] = {
  "vit": (
    ("patch/kernel", "conv1.weight", "patch"),
    ("class_token", "class_embedding", "copy"),
    ("positions", "positional_embedding", "copy"),
    *both("pre_norm", "ln_pre"),
    *BLOCKS,
    *both("post_norm", "ln_post"),
  ),
  "text_tower": (
    ("embed/embedding", "token_embedding.weight", "copy"),
    ("positions", "positional_embedding", "copy"),
    *BLOCKS,
    *both("norm", "ln_final"),
  ),
}
CLIP: Keys = (
  ("image_projection/kernel", "visual.proj", "copy"),
  ("text_projection/kernel", "text_projection", "copy"),
  ("logit_scale", "logit_scale", "copy"),
)
# What lies beside a tower and is no part of it.
UNREAD = re.compile(r"visual\..*|proj|text_projection|logit_(scale|bias)|attn_mask|context_length"
                    r"|vocab_size|input_resolution")

# Settings that our towers have as here only; what is absent is as here.
_PLAIN = {"ls_init_value": None, "block_type": None, "qk_norm": False, "scaled_cosine_attn": False,
          "scale_heads": False, "scale_attn_inner": False, "scale_attn": False, "scale_fc": False,
          "final_ln_after_pool": False}
VISION_PLAIN = {**_PLAIN, "timm_model_name": None, "attentional_pool": False,
                "pos_embed_type": "learnable"}
TEXT_PLAIN = {**_PLAIN, "hf_model_name": None, "embed_cls": False, "proj_type": "linear",
              "proj_bias": False}
VISION_POOLS = {"tok": "tok", "avg": "gap"}
TEXT_POOLS = {"argmax": "largest", "eos": "eos", "last": "last"}
VISION_FIELDS = (hf.Field("width", "width", 768), hf.Field("depth", "layers", 12),
                 hf.Field("patch", "patch_size", 16), hf.Field("image_size", "image_size", 224))
TEXT_FIELDS = (hf.Field("width", "width", 512), hf.Field("depth", "layers", 12),
               hf.Field("heads", "heads", 8), hf.Field("vocab_size", "vocab_size", 49408),
               hf.Field("positions", "context_length", 77), hf.Field("eos", "eos_id", 2))
MLP_RATIO, HEAD_WIDTH, NORM_EPS = 4.0, 64, 1e-5


def is_written_in(keys: Iterable[str]) -> bool:
  """Whether a state dict is of OpenCLIP's blocks."""
  return any(".resblocks." in key for key in keys)


def parts(config: ConfigDict) -> tuple[Part, ...]:
  """Where the tensors of a whole CLIP, strategy `clip`, are (`table.entries`)."""
  del config  # all have the same
  return (("tower/", VISION, TABLES["vit"]), ("llm/", TEXT, TABLES["text_tower"]), ("", "", CLIP))


def read_config(theirs: Mapping[str, Any], config: ConfigDict) -> ConfigDict:
  """A copy of `config` whose model is the one of their open_clip_config.json.

  Raises:
    UsageError: a setting that our towers do not have; the sentence names it.
  """
  config, model = config.copy_and_resolve_references(), theirs["model_cfg"]
  config.fusion.name, config.data.template = "clip", "caption"
  config.fusion.objectives = ConfigDict({"contrast": 1.0})
  config.fusion.width = model["embed_dim"]
  config.tower.update(read_vision(model))
  config.llm.update(read_text(model))
  clip, pixels = vit.FAMILIES["clip_vision_model"], theirs.get("preprocess_cfg") or {}
  config.tower.update(mean=tuple(pixels.get("mean", clip.mean)),
                      std=tuple(pixels.get("std", clip.std)))
  return config


def read_vision(model: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of `config.tower` of a `model_cfg`, the means of pixels apart; as `read_config`."""
  theirs = _node(model, "vision_cfg", VISION_PLAIN)
  fields = hf.read(theirs, VISION_FIELDS)
  return fields | _sizes(theirs, fields["width"], model) | {
    "name": "vit", "heads": fields["width"] // theirs.get("head_width", HEAD_WIDTH),
    "class_token": True, "pre_norm": not theirs.get("no_ln_pre"), "patch_bias": False,
    "post_norm": True, "pool": _choice(theirs, "pool_type", "tok", VISION_POOLS),
    "feature_layer": -1, "position_size": 0, "position_resize": "bicubic"}


def read_text(model: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of `config.llm` of a `model_cfg`; as `read_config`."""
  theirs = _node(model, "text_cfg", TEXT_PLAIN)
  fields = hf.read(theirs, TEXT_FIELDS)
  return fields | _sizes(theirs, fields["width"], model) | {
    "name": "text_tower", "kv_heads": fields["heads"], "head_dim": 0,
    "attends": "full" if theirs.get("no_causal_mask") else "causal",
    "pool": _choice(theirs, "pool_type", "argmax", TEXT_POOLS)}


def _node(model: Mapping[str, Any], name: str, plain: Mapping[str, Any]) -> dict[str, Any]:
  theirs = {**model[name], "model_type": name}  # for errors
  for setting, needed in plain.items():
    hf.expect(theirs, setting, needed, needed)
  return theirs


def _sizes(theirs: Mapping[str, Any], width: int, model: Mapping[str, Any]) -> dict[str, Any]:
  """What both towers say in the same words."""
  exact = "gelu_tanh" if (theirs.get("act_kwargs") or {}).get("approximate") == "tanh" else "gelu"
  return {"mlp": int(width * theirs.get("mlp_ratio", MLP_RATIO)),
          "activation": "quick_gelu" if model.get("quick_gelu") else exact,
          "norm_eps": (theirs.get("norm_kwargs") or {}).get("eps", NORM_EPS)}


def _choice(theirs: Mapping[str, Any], name: str, default: str, known: Mapping[str, str]) -> str:
  value = theirs.get(name, default)
  if value not in known:
    raise UsageError(f"open_clip_config.json: {hf.place(theirs, name)} is '{value}'; "
                     f"{nearest(value, known)}")
  return known[value]


def write_config(config: ConfigDict) -> dict[str, Any]:
  """Their open_clip_config.json of `config`'s model; the inverse of `read_config`.

  Raises:
    UsageError: parts that theirs do not have; the sentence names the field.
  """
  tower, text = config.tower, config.llm
  quick = {node.activation == "quick_gelu" for node in (tower, text)}
  if len(quick) > 1:
    raise UsageError(f"config.tower.activation is '{tower.activation}' and config.llm.activation "
                     f"'{text.activation}'; OpenCLIP has quick_gelu in both towers or in neither")
  names = lambda known: {ours: theirs for theirs, ours in known.items()}
  vision_cfg = {**hf.write(tower, VISION_FIELDS), **_written(tower),
                "image_size": tower.position_size or tower.image_size,
                "head_width": tower.width // tower.heads, "no_ln_pre": not tower.pre_norm,
                "pool_type": names(VISION_POOLS).get(tower.pool, tower.pool)}
  text_cfg = {**hf.write(text, TEXT_FIELDS), **_written(text),
              "no_causal_mask": text.attends == "full", "pool_type": names(TEXT_POOLS)[text.pool]}
  theirs = {
    "model_cfg": {"embed_dim": config.fusion.width, "quick_gelu": quick.pop(),
                  "vision_cfg": vision_cfg, "text_cfg": text_cfg},
    "preprocess_cfg": {"mean": list(tower.mean), "std": list(tower.std)},
  }
  back = read_config(theirs, config)
  for node in ("fusion", "tower", "llm"):
    for name, value in back[node].items():
      if config[node][name] != value and name not in ("position_size", "image_size"):
        raise UsageError(f"config.{node}.{name} is {config[node][name]!r}; an OpenCLIP checkpoint "
                         f"can only say {value!r}")
  return theirs


def _written(config: ConfigDict) -> dict[str, Any]:
  """The inverse of `_sizes`; their MLP is as wide as the ratio says, rounded down."""
  ratio = round(config.mlp / config.width, 4)
  if int(config.width * ratio) != config.mlp:
    ratio = (config.mlp + 0.5) / config.width
  tanh = {"act_kwargs": {"approximate": "tanh"}} if config.activation == "gelu_tanh" else {}
  return {"mlp_ratio": ratio, "norm_kwargs": {"eps": config.norm_eps}, **tanh}


def unread(keys: Keys) -> Callable[[str], bool]:
  """Which keys may be left over beside a table of `TABLES`; none beside other tables."""
  mine = any(keys is table for table in TABLES.values())
  return lambda key: mine and bool(UNREAD.fullmatch(key))
