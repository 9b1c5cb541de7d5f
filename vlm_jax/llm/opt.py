"""OPT (arXiv:2205.01068), as BLIP-2 reads: learned positions, LayerNorm, ReLU, biases everywhere.

The first two rows of the table of positions belong to none: the first token of a document reads the
third. Media rows are placed as tokens are. OPT-350m is built otherwise (normalised behind every
block, a vocabulary narrower than the model) and is refused.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.core import hf
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.llm import _decoder, _hf
from vlm_jax.llm._decoder import KIND, RUNS, Kind, Parts, empty_cache, supports
from vlm_jax.nn.norms import LayerNorm

__all__ = ["KEYS", "KIND", "MODEL_TYPES", "RUNS", "SIZES", "Model", "empty_cache", "read_hf",
           "size", "supports", "write_hf"]

_LAYER = "model.decoder.layers.{layer}."
KEYS = (
  ("embed/embedding", "model.decoder.embed_tokens.weight", "copy"),
  ("positions", "model.decoder.embed_positions.weight", "copy"),
  ("layers/attention_norm/scale", _LAYER + "self_attn_layer_norm.weight", "copy"),
  ("layers/attention_norm/bias", _LAYER + "self_attn_layer_norm.bias", "copy"),
  ("layers/attention/query/kernel", _LAYER + "self_attn.q_proj.weight", "in"),
  ("layers/attention/query/bias", _LAYER + "self_attn.q_proj.bias", "flat"),
  ("layers/attention/key/kernel", _LAYER + "self_attn.k_proj.weight", "in"),
  ("layers/attention/key/bias", _LAYER + "self_attn.k_proj.bias", "flat"),
  ("layers/attention/value/kernel", _LAYER + "self_attn.v_proj.weight", "in"),
  ("layers/attention/value/bias", _LAYER + "self_attn.v_proj.bias", "flat"),
  ("layers/attention/out/kernel", _LAYER + "self_attn.out_proj.weight", "out"),
  ("layers/attention/out/bias", _LAYER + "self_attn.out_proj.bias", "copy"),
  ("layers/mlp_norm/scale", _LAYER + "final_layer_norm.weight", "copy"),
  ("layers/mlp_norm/bias", _LAYER + "final_layer_norm.bias", "copy"),
  ("layers/mlp/up/kernel", _LAYER + "fc1.weight", "in"),
  ("layers/mlp/up/bias", _LAYER + "fc1.bias", "copy"),
  ("layers/mlp/down/kernel", _LAYER + "fc2.weight", "in"),
  ("layers/mlp/down/bias", _LAYER + "fc2.bias", "copy"),
  ("norm/scale", "model.decoder.final_layer_norm.weight", "copy"),
  ("norm/bias", "model.decoder.final_layer_norm.bias", "copy"),
  ("head/kernel", "lm_head.weight", "in"),
)
MODEL_TYPES = ("opt",)
POSITIONS_UNREAD = 2
NORM_EPS = 1e-5  # no file says it
FIELDS = (
  hf.Field("vocab_size", "vocab_size", 50272),
  hf.Field("width", "hidden_size", 768),
  hf.Field("mlp", "ffn_dim", 3072),
  hf.Field("depth", "num_hidden_layers", 12),
  hf.Field("heads", "num_attention_heads", 12),
  hf.Field("positions", "max_position_embeddings", 2048),
  hf.Field("linear_bias", "enable_bias", True),
  hf.Field("tie_embeddings", "tie_word_embeddings", True),
)
# Settings that the 350m alone has otherwise, or nobody's checkpoint.
NEEDED = {"do_layer_norm_before": True, "_remove_final_layer_norm": False,
          "layer_norm_elementwise_affine": True}

SIZES: dict[str, dict[str, Any]] = {
  "125m": dict(width=768, depth=12, mlp=3072, heads=12),
  "1.3b": dict(width=2048, depth=24, mlp=8192, heads=32),
  "2.7b": dict(width=2560, depth=32, mlp=10240, heads=32),
  "6.7b": dict(width=4096, depth=32, mlp=16384, heads=32),
  "13b": dict(width=5120, depth=40, mlp=20480, heads=40),
  "30b": dict(width=7168, depth=48, mlp=28672, heads=56),
  "66b": dict(width=9216, depth=64, mlp=36864, heads=72),
}


class Model(_decoder.Decoder):
  """The decoder; see `_decoder.Decoder`."""

  @staticmethod
  def parts(config: ConfigDict) -> Parts:
    """No rotation; a plain MLP.

    Raises:
      UsageError: no positions at all.
    """
    if not config.positions:
      raise UsageError("config.llm.positions is 0, but positions of config.llm.name 'opt' are "
                       "learned; set it to the longest document's tokens (2048 as published)")
    return Parts(kinds=(Kind(None),), norm=LayerNorm, qkv_bias=config.linear_bias,
                 bias=config.linear_bias, gated=False, positions=config.positions,
                 positions_unread=POSITIONS_UNREAD)


def size(name: str) -> dict[str, Any]:
  """The fields of `config.llm` of a member: `config.llm.update(opt.size("2.7b"))`.

  Raises:
    UsageError: no such member.
  """
  if name not in SIZES:
    raise UsageError(f"config.llm: no OPT '{name}'; {nearest(name, SIZES)}")
  fields = SIZES[name]
  return {**_common(fields["heads"]), "head_dim": 0, "vocab_size": 50272, "positions": 2048,
          "linear_bias": True, "tie_embeddings": True, "activation": "relu", **fields}


def _common(heads: int) -> dict[str, Any]:
  return {**_hf.PLAIN, "rope_scaling": "none", "norm_eps": NORM_EPS, "kv_heads": heads}


def read_hf(theirs: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of `config.llm` that their node says.

  Raises:
    UsageError: it is an OPT-350m, has norms without parameters, or an activation that no family
      has.
  """
  for name, needed in NEEDED.items():
    hf.expect(theirs, name, needed, needed)
  fields = hf.read(theirs, FIELDS)
  if theirs.get("word_embed_proj_dim") is not None:
    hf.expect(theirs, "word_embed_proj_dim", None, fields["width"])
  return _common(fields["heads"]) | fields | {
    "head_dim": fields["width"] // fields["heads"],
    "activation": hf.activation(theirs, "activation_function", "relu")}


def write_hf(config: ConfigDict) -> dict[str, Any]:
  """Their node of `config.llm`.

  Raises:
    UsageError: parts that their OPT does not have.
  """
  theirs = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    **hf.write(config, FIELDS),
    "word_embed_proj_dim": config.width,
    **NEEDED,
    "activation_function": hf.ACTIVATIONS[config.activation][0],
  }
  return _hf.written(config, theirs, read_hf(theirs))
