"""Qwen2 and Qwen2.5 (arXiv:2407.10671, 2412.15115), Qwen3 (arXiv:2505.09388).

A Llama whose queries, keys and values have biases (2, 2.5), or whose queries and keys are
normalised per head before they turn, with heads of a width of their own (3).
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.core import hf
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.llm import _decoder, _hf
from vlm_jax.llm._decoder import KIND, RUNS, Kind, Parts, empty_cache, supports

__all__ = ["KEYS", "KIND", "MODEL_TYPES", "RUNS", "SIZES", "Model", "empty_cache", "read_hf",
           "size", "supports", "write_hf"]

KEYS = (
  *_decoder.KEYS,
  ("layers/attention/query/bias", "model.layers.{layer}.self_attn.q_proj.bias", "flat"),
  ("layers/attention/key/bias", "model.layers.{layer}.self_attn.k_proj.bias", "flat"),
  ("layers/attention/value/bias", "model.layers.{layer}.self_attn.v_proj.bias", "flat"),
  *_decoder.QK_NORM_KEYS,
)
MODEL_TYPES = ("qwen2", "qwen3")
# What is absent means in theirs, beyond `_hf.FIELDS`.
DEFAULTS = {
  "qwen2": dict(vocab_size=151936, intermediate_size=22016, num_key_value_heads=32),
  "qwen3": dict(vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, head_dim=128),
}

_SECOND = dict(vocab_size=151936, rope_theta=1e6, norm_eps=1e-6, qkv_bias=True, head_dim=0)
_THIRD = dict(vocab_size=151936, rope_theta=1e6, norm_eps=1e-6, qk_norm="rms", head_dim=128)
SIZES: dict[str, dict[str, Any]] = {
  "2.5-0.5b": dict(_SECOND, width=896, depth=24, mlp=4864, heads=14, kv_heads=2,
                   tie_embeddings=True),
  "2.5-1.5b": dict(_SECOND, width=1536, depth=28, mlp=8960, heads=12, kv_heads=2,
                   tie_embeddings=True),
  "2.5-3b": dict(_SECOND, width=2048, depth=36, mlp=11008, heads=16, kv_heads=2,
                 tie_embeddings=True),
  "2.5-7b": dict(_SECOND, width=3584, depth=28, mlp=18944, heads=28, kv_heads=4,
                 tie_embeddings=False, vocab_size=152064),
  "3-0.6b": dict(_THIRD, width=1024, depth=28, mlp=3072, heads=16, kv_heads=8, tie_embeddings=True),
  "3-1.7b": dict(_THIRD, width=2048, depth=28, mlp=6144, heads=16, kv_heads=8, tie_embeddings=True),
  "3-4b": dict(_THIRD, width=2560, depth=36, mlp=9728, heads=32, kv_heads=8, tie_embeddings=True),
  "3-8b": dict(_THIRD, width=4096, depth=36, mlp=12288, heads=32, kv_heads=8,
               tie_embeddings=False),
}


class Model(_decoder.Decoder):
  """The decoder; see `_decoder.Decoder`."""

  @staticmethod
  def parts(config: ConfigDict) -> Parts:
    """Biases or QK-norm, as the config says."""
    return Parts(kinds=(Kind(config.rope_theta),), qkv_bias=config.qkv_bias,
                 qk_norm=config.qk_norm or None)


def size(name: str) -> dict[str, Any]:
  """The fields of `config.llm` of a member: `config.llm.update(qwen.size("2.5-0.5b"))`.

  Raises:
    UsageError: no such member.
  """
  if name not in SIZES:
    raise UsageError(f"config.llm: no Qwen '{name}'; {nearest(name, SIZES)}")
  return {**_hf.PLAIN, "activation": "silu", "rope_scaling": "none", **SIZES[name]}


def read_hf(theirs: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of `config.llm` that their node says.

  Raises:
    UsageError: sliding windows, or an activation or kind of positions that no family has.
  """
  kind = theirs["model_type"]
  hf.expect(theirs, "use_sliding_window", False, False)
  if "sliding_attention" in (theirs.get("layer_types") or ()):
    raise UsageError(f"config.json: {hf.place(theirs, 'layer_types')} has sliding_attention; only "
                     "full_attention can be imported")
  fields = _hf.read({**DEFAULTS[kind], **theirs})
  if kind == "qwen2":
    return fields | {"qkv_bias": True}
  hf.expect(theirs, "attention_bias", False, False)
  return fields | {"qk_norm": "rms"}


def write_hf(config: ConfigDict) -> dict[str, Any]:
  """Their node of `config.llm`.

  Raises:
    UsageError: parts that neither of their two kinds has.
  """
  kind = ("qwen3", "Qwen3ForCausalLM") if config.qk_norm else ("qwen2", "Qwen2ForCausalLM")
  theirs = _hf.write(config, *kind)
  return _hf.written(config, theirs, read_hf(theirs))
