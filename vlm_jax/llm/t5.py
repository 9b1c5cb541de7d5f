"""T5 (arXiv:1910.10683), T5 v1.1 and Flan-T5 (arXiv:2210.11416), as BLIP-2 reads.

An `encoder_decoder` whose logits are not scaled but get a learned number by distance, one table a
side for all its layers. Where the head is the embedding (T5), hidden states are scaled by D^-1/2
before it; v1.1 and Flan have a head of their own and gated GELU for ReLU. A text to be written
begins with token 0, which pads, and ends with 1.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.core import hf
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.fusion import Output
from vlm_jax.llm import _hf, encoder_decoder
from vlm_jax.llm.encoder_decoder import KIND, RUNS, empty_cache, supports

__all__ = ["KEYS", "KIND", "MODEL_TYPES", "RUNS", "SIZES", "Model", "empty_cache", "read_hf",
           "size", "supports", "write_hf"]


def _attention(ours: str, theirs: str) -> tuple[tuple[str, str, str], ...]:
  return (
    (f"{ours}/query/kernel", f"{theirs}.q.weight", "in"),
    (f"{ours}/key/kernel", f"{theirs}.k.weight", "in"),
    (f"{ours}/value/kernel", f"{theirs}.v.weight", "in"),
    (f"{ours}/out/kernel", f"{theirs}.o.weight", "out"),
  )


def _side(name: str, last: int) -> tuple[tuple[str, str, str], ...]:
  """The rows of a side whose feed-forward block is number `last` of a layer's."""
  ours, theirs = f"{name}/layers/", f"{name}.block.{{layer}}.layer."
  feed = f"{theirs}{last}.DenseReluDense."
  return (
    (f"{name}/relative/table",
     f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "in"),
    (ours + "attention_norm/scale", theirs + "0.layer_norm.weight", "copy"),
    *_attention(ours + "attention", theirs + "0.SelfAttention"),
    (ours + "mlp_norm/scale", f"{theirs}{last}.layer_norm.weight", "copy"),
    (ours + "gated/gate/kernel", feed + "wi_0.weight", "in"),
    (ours + "gated/up/kernel", feed + "wi_1.weight", "in"),
    (ours + "gated/down/kernel", feed + "wo.weight", "in"),
    (ours + "mlp/up/kernel", feed + "wi.weight", "in"),
    (ours + "mlp/down/kernel", feed + "wo.weight", "in"),
    (f"{name}/norm/scale", f"{name}.final_layer_norm.weight", "copy"),
  )


KEYS = (
  ("embed/embedding", "shared.weight", "copy"),
  *_side("encoder", 1),
  *_side("decoder", 2),
  ("decoder/layers/cross_norm/scale", "decoder.block.{layer}.layer.1.layer_norm.weight", "copy"),
  *_attention("decoder/layers/cross", "decoder.block.{layer}.layer.1.EncDecAttention"),
  ("head/kernel", "lm_head.weight", "in"),
)
# The embedding under its other names, and a table of distances that nothing reads.
UNREAD = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
          "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight")
MODEL_TYPES = ("t5",)
START = 0  # decoder_start_token_id of all that were published
FIELDS = (
  hf.Field("vocab_size", "vocab_size", 32128),
  hf.Field("width", "d_model", 512),
  hf.Field("head_dim", "d_kv", 64),
  hf.Field("mlp", "d_ff", 2048),
  hf.Field("heads", "num_heads", 8),
  hf.Field("relative_buckets", "relative_attention_num_buckets", 32),
  hf.Field("relative_distance", "relative_attention_max_distance", 128),
  hf.Field("norm_eps", "layer_norm_epsilon", 1e-6),
)
# feed_forward_proj to our two fields; their "gated-gelu" means the approximation.
FEED_FORWARDS = {"relu": ("plain", "relu"), "gated-gelu": ("gated", "gelu_tanh"),
                 "gated-silu": ("gated", "silu"), "gated-relu": ("gated", "relu")}

_FIRST = dict(vocab_size=32128, feed_forward="plain", activation="relu", tie_embeddings=True)
_SECOND = dict(vocab_size=32128, feed_forward="gated", activation="gelu_tanh",
               tie_embeddings=False)  # v1.1, and Flan
SIZES: dict[str, dict[str, Any]] = {
  "small": dict(_FIRST, width=512, depth=6, mlp=2048, heads=8, head_dim=64),
  "base": dict(_FIRST, width=768, depth=12, mlp=3072, heads=12, head_dim=64),
  "large": dict(_FIRST, width=1024, depth=24, mlp=4096, heads=16, head_dim=64),
  "3b": dict(_FIRST, width=1024, depth=24, mlp=16384, heads=32, head_dim=128),
  "11b": dict(_FIRST, width=1024, depth=24, mlp=65536, heads=128, head_dim=128),
  "flan-small": dict(_SECOND, width=512, depth=8, mlp=1024, heads=6, head_dim=64),
  "flan-base": dict(_SECOND, width=768, depth=12, mlp=2048, heads=12, head_dim=64),
  "flan-large": dict(_SECOND, width=1024, depth=24, mlp=2816, heads=16, head_dim=64),
  "flan-xl": dict(_SECOND, width=2048, depth=24, mlp=5120, heads=32, head_dim=64),
  "flan-xxl": dict(_SECOND, width=4096, depth=24, mlp=10240, heads=64, head_dim=64),
}


class Model(encoder_decoder.Model):
  """Both sides; see `encoder_decoder.Model`."""

  def __call__(self, *args, **kwargs) -> Output:
    """As there, with the scale of hidden states that are compared with the embedding."""
    output = super().__call__(*args, **kwargs)
    if not self.config.tie_embeddings:
      return output
    return dataclasses.replace(output, hidden=output.hidden * self.config.width**-0.5)


def size(name: str) -> dict[str, Any]:
  """The fields of `config.llm` of a member: `config.llm.update(t5.size("flan-xl"))`.

  Raises:
    UsageError: no such member.
  """
  if name not in SIZES:
    raise UsageError(f"config.llm: no T5 '{name}'; {nearest(name, SIZES)}")
  fields = SIZES[name]
  return {**_common(fields["heads"]), "encoder_depth": 0, "norm_eps": 1e-6,
          "relative_buckets": 32, "relative_distance": 128, **fields}


def _common(heads: int) -> dict[str, Any]:
  """What all of them have; logits without a scale are those of the scalar 1."""
  return {**_hf.PLAIN, "rope_scaling": "none", "kv_heads": heads, "query_scalar": 1.0,
          "norm": "rms"}


def read_hf(theirs: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of `config.llm` that their node says.

  Raises:
    UsageError: an activation that no published one has, or another start of a text.
  """
  hf.expect(theirs, "decoder_start_token_id", START, START)
  name = theirs.get("feed_forward_proj", "relu")
  if name not in FEED_FORWARDS:
    raise UsageError(f"config.json: {hf.place(theirs, 'feed_forward_proj')} is '{name}'; "
                     f"{nearest(name, FEED_FORWARDS)}")
  depth = theirs.get("num_layers", 6)
  decoder = theirs.get("num_decoder_layers") or depth
  # transformers 5 writes tie_word_embeddings as True always, and this beside it.
  tied = theirs.get("scale_decoder_outputs", theirs.get("tie_word_embeddings", True))
  fields = hf.read(theirs, FIELDS)
  feed_forward, activation = FEED_FORWARDS[name]
  return _common(fields["heads"]) | fields | {
    "depth": decoder, "encoder_depth": 0 if decoder == depth else depth,
    "feed_forward": feed_forward, "activation": activation, "tie_embeddings": tied}


def write_hf(config: ConfigDict) -> dict[str, Any]:
  """Their node of `config.llm`.

  Raises:
    UsageError: parts that their T5 does not have.
  """
  names = {ours: theirs for theirs, ours in FEED_FORWARDS.items()}
  feed = config.feed_forward, config.activation
  if feed not in names:
    raise UsageError(f"config.llm: feed_forward and activation are {feed}; a checkpoint of "
                     f"model_type 't5' can only say one of {', '.join(map(str, names))}")
  theirs = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    **hf.write(config, FIELDS),
    "num_layers": config.encoder_depth or config.depth,
    "num_decoder_layers": config.depth,
    "feed_forward_proj": names[feed],
    "tie_word_embeddings": config.tie_embeddings,
    "decoder_start_token_id": START, "pad_token_id": START, "is_encoder_decoder": True,
  }
  return _hf.written(config, theirs, read_hf(theirs))
