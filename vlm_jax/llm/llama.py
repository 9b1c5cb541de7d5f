"""Llama 1 to 3 (arXiv:2302.13971, 2307.09288, 2407.21783), Vicuna, SmolLM2 (arXiv:2502.02737).

RMSNorm, rotary positions, grouped queries, SwiGLU, no biases.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.core import hf
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.llm import _decoder, _hf
from vlm_jax.llm._decoder import KIND, RUNS, Kind, Parts, empty_cache, head_dim, supports

__all__ = ["KEYS", "KIND", "MODEL_TYPES", "RUNS", "SIZES", "Model", "empty_cache", "head_dim",
           "read_hf", "size", "supports", "write_hf"]

KEYS = _decoder.KEYS
MODEL_TYPES = ("llama",)

_SMOL = dict(vocab_size=49152, tie_embeddings=True, rope_theta=1e5, norm_eps=1e-5)
_SECOND = dict(vocab_size=32000, tie_embeddings=False, rope_theta=1e4, norm_eps=1e-5)
_THIRD = dict(vocab_size=128256, tie_embeddings=False, rope_theta=5e5, norm_eps=1e-5)
_LONG = dict(rope_scaling="llama3", rope_factor=32.0, tie_embeddings=True)  # as published, 3.2
_VICUNA = dict(_SECOND, rope_scaling="linear", rope_factor=4.0)  # the variants of 16k tokens
SIZES: dict[str, dict[str, Any]] = {
  "smollm2-135m": dict(_SMOL, width=576, depth=30, mlp=1536, heads=9, kv_heads=3),
  "smollm2-360m": dict(_SMOL, width=960, depth=32, mlp=2560, heads=15, kv_heads=5),
  "smollm2-1.7b": dict(_SMOL, width=2048, depth=24, mlp=8192, heads=32, kv_heads=32,
                       rope_theta=130000.0),
  "1-7b": dict(_SECOND, width=4096, depth=32, mlp=11008, heads=32, kv_heads=32, norm_eps=1e-6),
  "1-13b": dict(_SECOND, width=5120, depth=40, mlp=13824, heads=40, kv_heads=40, norm_eps=1e-6),
  "2-7b": dict(_SECOND, width=4096, depth=32, mlp=11008, heads=32, kv_heads=32),  # Vicuna 1.5
  "2-13b": dict(_SECOND, width=5120, depth=40, mlp=13824, heads=40, kv_heads=40),
  "2-70b": dict(_SECOND, width=8192, depth=80, mlp=28672, heads=64, kv_heads=8),
  "vicuna-7b-16k": dict(_VICUNA, width=4096, depth=32, mlp=11008, heads=32, kv_heads=32),
  "3-8b": dict(_THIRD, width=4096, depth=32, mlp=14336, heads=32, kv_heads=8),
  "3-70b": dict(_THIRD, width=8192, depth=80, mlp=28672, heads=64, kv_heads=8),
  "3.1-8b": dict(_THIRD, width=4096, depth=32, mlp=14336, heads=32, kv_heads=8,
                 rope_scaling="llama3", rope_factor=8.0),
  "3.2-1b": dict(_THIRD | _LONG, width=2048, depth=16, mlp=8192, heads=32, kv_heads=8),
  "3.2-3b": dict(_THIRD | _LONG, width=3072, depth=28, mlp=8192, heads=24, kv_heads=8),
}


class Model(_decoder.Decoder):
  """The decoder; see `_decoder.Decoder`."""

  @staticmethod
  def parts(config: ConfigDict) -> Parts:
    """Nothing beyond what all families have."""
    return Parts(kinds=(Kind(config.rope_theta),))


def size(name: str) -> dict[str, Any]:
  """The fields of `config.llm` of a member: `config.llm.update(llama.size("3.2-1b"))`.

  Raises:
    UsageError: no such member.
  """
  if name not in SIZES:
    raise UsageError(f"config.llm: no Llama '{name}'; {nearest(name, SIZES)}")
  return {**_hf.PLAIN, "head_dim": 0, "activation": "silu", "rope_scaling": "none", **SIZES[name]}


def read_hf(theirs: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of `config.llm` that their node says.

  Raises:
    UsageError: biases, an activation or a kind of positions that the model does not have.
  """
  hf.expect(theirs, "attention_bias", False, False)
  hf.expect(theirs, "mlp_bias", False, False)
  return _hf.read(theirs)


def write_hf(config: ConfigDict) -> dict[str, Any]:
  """Their node of `config.llm`.

  Raises:
    UsageError: parts that their Llama does not have.
  """
  theirs = _hf.write(config, "llama", "LlamaForCausalLM")
  return _hf.written(config, theirs, read_hf(theirs))
