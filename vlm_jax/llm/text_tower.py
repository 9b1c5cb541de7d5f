"""Text towers of CLIP and SigLIP (arXiv:2103.00020, 2303.15343): a text to one vector.

A ViT over tokens: learned positions, pre-norm blocks with biases, a last norm. Texts have a fixed
length L = config.llm.positions. `attends` and `pool` say which of the published ones it is:

    CLIP            causal, so padding behind the end changes nothing; pool "eos" or "largest"
    SigLIP          full, padding takes part; pool "last", whatever stands there

OpenAI's files end a text with the largest id of their vocabulary and take the largest; later ones
look for the first end-of-text id, which also pads.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.nn import initializers
from ml_collections import ConfigDict

from vlm_jax.core import hf
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array
from vlm_jax.llm._decoder import Embed
from vlm_jax.nn import stack
from vlm_jax.nn.attention import make_context
from vlm_jax.nn.linear import parameter
from vlm_jax.nn.norms import LayerNorm
from vlm_jax.towers import vit

KIND = "text tower"
RUNS = ()  # it reads whole texts and caches nothing
ATTENDS = ("causal", "full")
POOLS = ("eos", "largest", "last")

# Ours, theirs (CLIP and SigLIP share names), operation; blocks are a vision tower's.
KEYS = (
  ("embed/embedding", "embeddings.token_embedding.weight", "copy"),
  ("positions", "embeddings.position_embedding.weight", "copy"),
  *(row for row in vit.KEYS if row[0].startswith("layers/")),
  ("norm/scale", "final_layer_norm.weight", "copy"),
  ("norm/bias", "final_layer_norm.bias", "copy"),
)


class Family(NamedTuple):
  """A published kind of text tower: what its config.json leaves out means, and how it reads."""

  vocab_size: int
  width: int
  mlp: int
  heads: int
  positions: int
  activation: str
  norm_eps: float
  attends: str
  pool: str


_SIGLIP = Family(32000, 768, 3072, 12, 64, "gelu_pytorch_tanh", 1e-6, "full", "last")
FAMILIES = {
  "clip_text_model": Family(49408, 512, 2048, 8, 77, "quick_gelu", 1e-5, "causal", "eos"),
  "siglip_text_model": _SIGLIP,
  "siglip2_text_model": _SIGLIP,
}
MODEL_TYPES = tuple(FAMILIES)
EOS = 49407  # of CLIP
LARGEST = 2  # the wrong one that old files have: it means pool "largest"
NAMES = {"vocab_size": "vocab_size", "width": "hidden_size", "mlp": "intermediate_size",
         "heads": "num_attention_heads", "positions": "max_position_embeddings",
         "norm_eps": "layer_norm_eps"}


def read_hf(theirs: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of `config.llm` that their node says.

  Raises:
    UsageError: an activation that the model does not have.
  """
  family = FAMILIES[theirs["model_type"]]
  fields = hf.read(theirs, [hf.Field(ours, name, getattr(family, ours))
                            for ours, name in NAMES.items()])
  fields |= {"depth": theirs.get("num_hidden_layers", 12), "kv_heads": fields["heads"],
             "head_dim": 0, "activation": hf.activation(theirs, "hidden_act", family.activation),
             "attends": family.attends, "pool": family.pool}
  if family.pool == "eos":
    fields["eos"] = theirs.get("eos_token_id", EOS)
    fields["pool"] = "largest" if fields["eos"] == LARGEST else "eos"
  return fields


def write_hf(config: ConfigDict) -> dict[str, Any]:
  """Their node of `config.llm`.

  Raises:
    UsageError: a text tower that no published kind is.
  """
  read = (config.attends, config.pool)
  if read == ("causal", "eos") and config.eos == LARGEST:
    raise UsageError(f"config.llm.eos is {LARGEST}, which a CLIP checkpoint cannot say: there it "
                     "means the largest id; train with a tokenizer whose end of text is another id")
  kinds = {("causal", "eos"): "clip_text_model", ("causal", "largest"): "clip_text_model",
           ("full", "last"): "siglip_text_model"}
  if read not in kinds:
    raise UsageError(f"config.llm: attends and pool are {read}, neither CLIP's ('causal' with "
                     "'eos' or 'largest') nor SigLIP's ('full' with 'last')")
  eos = {"eos": config.eos, "largest": LARGEST}
  return {
    "model_type": kinds[read],
    **{name: config[ours] for ours, name in NAMES.items()},
    "num_hidden_layers": config.depth,
    "hidden_act": hf.ACTIVATIONS[config.activation][0],
    **({"eos_token_id": eos[config.pool]} if config.pool in eos else {}),
  }


def supports(mask: IntervalMask) -> str:
  """It makes its own mask: always the reason why no other can be given."""
  del mask
  return "it reads texts of fixed length under a mask of its own"


def attention_shape(config: ConfigDict) -> tuple[int, int, int, int]:
  """(T, H, G, C) of every layer's attention."""
  return config.positions, config.heads, config.heads, config.width // config.heads


class Model(nn.Module):
  """The tower. Attributes: `config.llm`, `config.attention`, dtypes."""

  config: ConfigDict
  attention: ConfigDict
  precision: Precision

  @nn.compact
  def __call__(self, tokens: Array) -> Array:
    """Texts i32[N,L] to f[N,D], the slot of each that `pool` names, behind the last norm.

    Raises:
      UsageError: an `attends` or `pool` that does not exist, or texts of another length.
    """
    config, dtypes = self.config, self.precision
    _check(config, tokens)
    rows, length = tokens.shape
    x = Embed(config.vocab_size, config.width, dtypes, name="embed")(tokens)
    table = parameter(self, "positions", initializers.normal(config.width**-0.5),
                      (length, config.width), ("position", "embed"), dtypes.param)
    x = x + table.astype(x.dtype)
    mask = vit.see_all(length, length, rows)
    if config.attends == "causal":
      ends = jnp.arange(1, length + 1, dtype=jnp.int32)
      mask = IntervalMask(mask.lo, jnp.broadcast_to(ends, (rows, length)))
    context = make_context(
      mask, None, (self.attention.block_q, self.attention.block_k),
      width=config.width // config.heads, dtype=dtypes.compute)
    x, _ = stack.run(
      vit.Block,
      config.depth,
      remat=config.remat,
      unroll=config.unroll,
      config=config,
      implementation=self.attention.implementation,
      precision=dtypes,
      name="layers",
    )(x, None, context)
    x = LayerNorm(config.norm_eps, dtypes, name="norm")(x)
    return jnp.take_along_axis(x, pooled_slot(tokens, config)[:, None, None], axis=1)[:, 0]


def pooled_slot(tokens: Array, config: ConfigDict) -> Array:
  """The slot i32[N] of texts i32[N,L] that stands for the text; the first of equal candidates."""
  if config.pool == "last":
    return jnp.full(tokens.shape[:1], tokens.shape[1] - 1, jnp.int32)
  found = tokens if config.pool == "largest" else tokens == config.eos
  return jnp.argmax(found, axis=-1).astype(jnp.int32)


def _check(config: ConfigDict, tokens: Array) -> None:
  for field, known in (("attends", ATTENDS), ("pool", POOLS)):
    if config[field] not in known:
      raise UsageError(f"config.llm.{field} is '{config[field]}'; {nearest(config[field], known)}")
  if tokens.shape[1] != config.positions:
    raise UsageError(f"config.llm.positions is {config.positions}, the length of every text, but "
                     f"texts of {tokens.shape[1]} tokens were given; make them equal")
