"""What the config.json nodes of all decoder families have in common."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.core import hf
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.llm._decoder import head_dim

# What is absent means in transformers' Llama; other families add what it means in theirs.
FIELDS = (
  hf.Field("vocab_size", "vocab_size", 32000),
  hf.Field("width", "hidden_size", 4096),
  hf.Field("mlp", "intermediate_size", 11008),
  hf.Field("depth", "num_hidden_layers", 32),
  hf.Field("heads", "num_attention_heads", 32),
  hf.Field("norm_eps", "rms_norm_eps", 1e-6),
  hf.Field("tie_embeddings", "tie_word_embeddings", False),
)
# Parts that a family has or has not; these mean: not.
PLAIN = {
  "qkv_bias": False, "qk_norm": "", "post_norms": False, "query_scalar": 0.0,
  "attention_soft_cap": 0.0, "final_soft_cap": 0.0, "window": 0, "global_every": 1,
  "local_theta": 0.0, "positions": 0, "linear_bias": False, "relative_buckets": 0,
}
# Kinds of rope_type to ours, and to our fields and their names.
ROPE_TYPES = {"default": "none", "linear": "linear", "llama3": "llama3"}
FACTOR = hf.Field("rope_factor", "factor", 1.0)
ROPE_FIELDS = {
  "none": (),
  "linear": (FACTOR,),
  "llama3": (FACTOR, hf.Field("rope_low", "low_freq_factor", 1.0),
             hf.Field("rope_high", "high_freq_factor", 4.0),
             hf.Field("rope_length", "original_max_position_embeddings", 8192)),
}


def read(theirs: Mapping[str, Any], activation: str = "hidden_act") -> dict[str, Any]:
  """The fields of `config.llm` of a Llama with these numbers; a family changes what it has more.

  Args:
    theirs: the node, with the defaults of its family.
    activation: the name of that setting.

  Raises:
    UsageError: an activation or a kind of positions that no family has.
  """
  fields = hf.read(theirs, FIELDS)
  # transformers 4 writes rope_theta and rope_scaling, 5 rope_parameters.
  rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
  return {
    **PLAIN,
    **fields,
    "kv_heads": theirs.get("num_key_value_heads") or fields["heads"],
    "head_dim": theirs.get("head_dim") or fields["width"] // fields["heads"],
    "activation": hf.activation(theirs, activation, "silu"),
    **read_rope({"rope_theta": theirs.get("rope_theta", 10000.0), **rope}),
  }


def read_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
  """The fields rope_* of their rope_parameters.

  Raises:
    UsageError: a rope_type that is not in `ROPE_TYPES`.
  """
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in ROPE_TYPES:
    raise UsageError(f"config.json: rope_type is '{kind}', which the language models do not have; "
                     f"{nearest(kind, ROPE_TYPES)}")
  scaling = ROPE_TYPES[kind]
  unused = {field.ours: field.default for field in ROPE_FIELDS["llama3"]}
  used = {field.ours: type(field.default)(value) for field, value in zip(
    ROPE_FIELDS[scaling], hf.read(rope, ROPE_FIELDS[scaling]).values(), strict=True)}
  return {"rope_theta": float(rope["rope_theta"]), "rope_scaling": scaling, **unused, **used}


def write(config: ConfigDict, kind: str, architecture: str, activation: str = "hidden_act"
          ) -> dict[str, Any]:
  """Their node of a Llama with our numbers; the inverse of `read`.

  Args:
    config: `config.llm`.
    kind, architecture: its model_type, and their class of a whole checkpoint.
    activation: the name of that setting.
  """
  rope = write_rope(config)
  scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
  return {
    "architectures": [architecture],
    "model_type": kind,
    **hf.write(config, FIELDS),
    "num_key_value_heads": config.kv_heads,
    "head_dim": head_dim(config),
    activation: hf.ACTIVATIONS[config.activation][0],
    "rope_theta": config.rope_theta,
    **({"rope_scaling": scaling} if config.rope_scaling != "none" else {}),
    "rope_parameters": rope,
  }


def write_rope(config: ConfigDict) -> dict[str, Any]:
  """Their rope_parameters."""
  names = {ours: theirs for theirs, ours in ROPE_TYPES.items()}
  return {"rope_type": names[config.rope_scaling], "rope_theta": config.rope_theta,
          **hf.write(config, ROPE_FIELDS[config.rope_scaling])}


def written(config: ConfigDict, theirs: dict[str, Any], back: Mapping[str, Any]) -> dict[str, Any]:
  """`theirs`, if reading it gives the config `back`.

  Args:
    config: `config.llm`.
    theirs: the node that was written.
    back: the fields that it is read as.

  Raises:
    UsageError: a field that the family's node cannot say.
  """
  heads = head_dim(config)
  implied = {"head_dim": heads, "query_scalar": float(heads)}  # what 0 means
  used = {field.ours for field in ROPE_FIELDS[config.rope_scaling]}
  for name, value in back.items():
    unused = name in {field.ours for field in ROPE_FIELDS["llama3"]} - used
    if not unused and (config[name] or implied.get(name, config[name])) != (
        value or implied.get(name, value)):
      raise UsageError(f"config.llm.{name} is {config[name]!r}; a checkpoint of model_type "
                       f"'{theirs['model_type']}' can only say {value!r}")
  return theirs
