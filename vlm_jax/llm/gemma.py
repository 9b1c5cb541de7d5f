"""Gemma 1, 2 and 3, text (arXiv:2403.08295, 2408.00118, 2503.19786).

All: norms of scale 1 + s, token embeddings times sqrt(D), GeGLU. Gemma 2 and 3 also normalise what
attention and MLP return, and have local layers, which see a window of slots, between global ones.
Gemma 2 caps the logits of attention and vocabulary; Gemma 3 normalises queries and keys instead,
and its local layers turn by wavelengths of their own.

    layer of Gemma 2     local global local global ...
    layer of Gemma 3     local local local local local global ...

An image that sees itself whole sees ahead of the window, not further back than it.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.core import hf
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.llm import _decoder, _hf
from vlm_jax.llm._decoder import KIND, RUNS, Kind, Parts, empty_cache, head_dim, supports
from vlm_jax.nn.norms import OffsetRMSNorm

__all__ = ["KEYS", "KIND", "MODEL_TYPES", "RUNS", "SIZES", "Model", "empty_cache", "read_hf",
           "size", "supports", "write_hf"]

KEYS = (
  *_decoder.KEYS,
  *_decoder.QK_NORM_KEYS,
  ("layers/attention_post_norm/scale", "model.layers.{layer}.post_attention_layernorm.weight",
   "copy"),
  ("layers/mlp_pre_norm/scale", "model.layers.{layer}.pre_feedforward_layernorm.weight", "copy"),
  ("layers/mlp_post_norm/scale", "model.layers.{layer}.post_feedforward_layernorm.weight", "copy"),
)
MODEL_TYPES = ("gemma", "gemma2", "gemma3_text")
# What is absent means in theirs, beyond `_hf.FIELDS`.
_ALL = dict(tie_word_embeddings=True, head_dim=256)
_WINDOWS = dict(_ALL, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
                num_attention_heads=8, num_key_value_heads=4, sliding_window=4096,
                query_pre_attn_scalar=256, hidden_activation="gelu_pytorch_tanh")
DEFAULTS = {
  "gemma": dict(_ALL, vocab_size=256000, hidden_size=3072, intermediate_size=24576,
                num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=16,
                hidden_act="gelu_pytorch_tanh"),
  "gemma2": dict(_WINDOWS, vocab_size=256000, sliding_window_pattern=2,
                 attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
  "gemma3_text": dict(_WINDOWS, vocab_size=262208, sliding_window_pattern=6),
}
GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4  # of Gemma 3

_FIRST = dict(vocab_size=256000, head_dim=256, norm_eps=1e-6, rope_theta=1e4)
_SECOND = dict(_FIRST, post_norms=True, window=4096, global_every=2, query_scalar=256.0,
               attention_soft_cap=50.0, final_soft_cap=30.0)
_THIRD = dict(_FIRST, vocab_size=262208, post_norms=True, qk_norm="rms_offset", window=1024,
              global_every=6, query_scalar=256.0, rope_theta=GLOBAL_THETA, local_theta=LOCAL_THETA)
_LONG = dict(_THIRD, rope_scaling="linear", rope_factor=8.0)
SIZES: dict[str, dict[str, Any]] = {
  "1-2b": dict(_FIRST, width=2048, depth=18, mlp=16384, heads=8, kv_heads=1),
  "1-7b": dict(_FIRST, width=3072, depth=28, mlp=24576, heads=16, kv_heads=16),
  "2-2b": dict(_SECOND, width=2304, depth=26, mlp=9216, heads=8, kv_heads=4),
  "2-9b": dict(_SECOND, width=3584, depth=42, mlp=14336, heads=16, kv_heads=8),
  "2-27b": dict(_SECOND, width=4608, depth=46, mlp=36864, heads=32, kv_heads=16, head_dim=128,
                query_scalar=144.0),
  "3-270m": dict(_THIRD, width=640, depth=18, mlp=2048, heads=4, kv_heads=1, window=512,
                 vocab_size=262144),
  "3-1b": dict(_THIRD, width=1152, depth=26, mlp=6912, heads=4, kv_heads=1, window=512,
               vocab_size=262144),
  "3-4b": dict(_LONG, width=2560, depth=34, mlp=10240, heads=8, kv_heads=4),
  "3-12b": dict(_LONG, width=3840, depth=48, mlp=15360, heads=16, kv_heads=8),
  "3-27b": dict(_LONG, width=5376, depth=62, mlp=21504, heads=32, kv_heads=16, head_dim=128,
                query_scalar=168.0),
}


class Model(_decoder.Decoder):
  """The decoder; see `_decoder.Decoder`."""

  @staticmethod
  def parts(config: ConfigDict) -> Parts:
    """All that the three have more than a Llama, as the config says."""
    kinds, order = (Kind(config.rope_theta),), ()
    if config.global_every > 1:
      own = bool(config.local_theta)
      local = Kind(config.local_theta if own else config.rope_theta, not own, config.window)
      kinds = (local, *kinds)
      order = tuple(int((layer + 1) % config.global_every == 0) for layer in range(config.depth))
    return Parts(
      kinds=kinds,
      order=order,
      norm=OffsetRMSNorm,
      qk_norm=config.qk_norm or None,
      post_norms=config.post_norms,
      scale=(config.query_scalar or head_dim(config)) ** -0.5,
      attention_soft_cap=config.attention_soft_cap or None,
      final_soft_cap=config.final_soft_cap or None,
      embedding_scale=config.width**0.5,
    )


def size(name: str) -> dict[str, Any]:
  """The fields of `config.llm` of a member: `config.llm.update(gemma.size("2-2b"))`.

  Raises:
    UsageError: no such member.
  """
  if name not in SIZES:
    raise UsageError(f"config.llm: no Gemma '{name}'; {nearest(name, SIZES)}")
  return {**_hf.PLAIN, "activation": "gelu_tanh", "tie_embeddings": True, "rope_scaling": "none",
          **SIZES[name]}


def read_hf(theirs: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of `config.llm` that their node says.

  Raises:
    UsageError: biases, attention in both directions, an order of layers without a period, or an
      activation or kind of positions that no family has.
  """
  kind = theirs["model_type"]
  theirs = {**DEFAULTS[kind], **theirs}
  hf.expect(theirs, "attention_bias", False, False)
  if theirs.get("use_bidirectional_attention"):
    hf.expect(theirs, "use_bidirectional_attention", False, False)
  if kind == "gemma":
    # Their old files say "gelu" and mean the approximation.
    return _hf.read(theirs) | {"query_scalar": float(theirs["head_dim"]),
                               "activation": _activation(theirs)}
  if kind == "gemma2":
    fields = _hf.read(theirs, "hidden_activation")
    fields |= {"attention_soft_cap": float(theirs["attn_logit_softcapping"] or 0)}
  else:
    fields = _read_third(theirs)
  window = theirs["sliding_window"] or 0
  return fields | {
    "post_norms": True,
    "query_scalar": float(theirs["query_pre_attn_scalar"]),
    "final_soft_cap": float(theirs.get("final_logit_softcapping") or 0),
    "window": window,
    "global_every": _global_every(theirs),
  }


def _read_third(theirs: dict[str, Any]) -> dict[str, Any]:
  """The fields of Gemma 3 that the second does not have; its positions are of two kinds."""
  hf.expect(theirs, "attn_logit_softcapping", None, None)  # theirs is written down and never read
  rope = theirs.get("rope_parameters") or {}
  whole = {"rope_theta": theirs.get("rope_theta", GLOBAL_THETA),
           **(rope.get("full_attention") or {}), **(theirs.get("rope_scaling") or {})}
  local = {"rope_theta": theirs.get("rope_local_base_freq", LOCAL_THETA),
           **(rope.get("sliding_attention") or {})}
  hf.expect(local, "rope_type", "default", "default")
  plain = {key: value for key, value in theirs.items() if not key.startswith("rope_")}
  return _hf.read(plain, "hidden_activation") | _hf.read_rope(whole) | {
    "qk_norm": "rms_offset", "local_theta": float(local["rope_theta"])}


def _activation(theirs: dict[str, Any]) -> str:
  name = hf.activation(theirs, "hidden_act", "gelu_pytorch_tanh")
  return "gelu_tanh" if name == "gelu" else name


def _global_every(theirs: dict[str, Any]) -> int:
  """n, of which every n-th layer is global."""
  depth = theirs["num_hidden_layers"]
  kinds = theirs.get("layer_types")
  if kinds is None:
    return theirs["sliding_window_pattern"]
  every = (kinds + ["full_attention"]).index("full_attention") + 1
  if kinds != _layer_types(depth, every):
    raise UsageError(f"config.json: {hf.place(theirs, 'layer_types')} has no period that ends in "
                     "full_attention, and the layers can only be of such an order")
  return every


def _layer_types(depth: int, every: int) -> list[str]:
  return ["sliding_attention" if (layer + 1) % every else "full_attention"
          for layer in range(depth)]


def write_hf(config: ConfigDict) -> dict[str, Any]:
  """Their node of `config.llm`.

  Raises:
    UsageError: parts that none of their three kinds has together.
  """
  if not config.post_norms:
    theirs = _hf.write(config, "gemma", "GemmaForCausalLM")
    return _hf.written(config, theirs, read_hf(theirs))
  scalar = config.query_scalar or float(head_dim(config))
  third = bool(config.qk_norm)
  kind = ("gemma3_text", "Gemma3ForCausalLM") if third else ("gemma2", "Gemma2ForCausalLM")
  theirs = _hf.write(config, *kind, "hidden_activation") | {
    "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,
    "sliding_window": config.window or None,
    "sliding_window_pattern": config.global_every,
    "layer_types": _layer_types(config.depth, config.global_every),
    "attn_logit_softcapping": config.attention_soft_cap or None,
    "final_logit_softcapping": config.final_soft_cap or None,
  }
  if third:
    theirs["attn_logit_softcapping"] = None
    theirs["rope_local_base_freq"] = config.local_theta or config.rope_theta
    theirs["rope_parameters"] = {
      "full_attention": theirs["rope_parameters"],
      "sliding_attention": {"rope_type": "default", "rope_theta": theirs["rope_local_base_freq"]}}
  return _hf.written(config, theirs, read_hf(theirs))
