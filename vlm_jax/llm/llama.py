"""Llama-family decoders: RMSNorm, rotary positions, grouped queries, SwiGLU (arXiv:2307.09288)."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.nn import initializers
from ml_collections import ConfigDict

from vlm_jax.core import hf
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import Cache, Output
from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.mesh import constrain
from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array
from vlm_jax.nn import stack
from vlm_jax.nn.attention import Attention, Columns, Context, make_context
from vlm_jax.nn.linear import parameter
from vlm_jax.nn.mlp import GatedMLP
from vlm_jax.nn.norms import RMSNorm
from vlm_jax.ops.rope import rotation, sequence

KIND = "decoder"
RUNS = ("layers",)

# Ours, theirs (below "model."; lm_head is its sibling), operation: see vlm_jax/convert/table.py.
KEYS = (
  ("embed/embedding", "model.embed_tokens.weight", "copy"),
  ("layers/attention_norm/scale", "model.layers.{layer}.input_layernorm.weight", "copy"),
  ("layers/attention/query/kernel", "model.layers.{layer}.self_attn.q_proj.weight", "in"),
  ("layers/attention/key/kernel", "model.layers.{layer}.self_attn.k_proj.weight", "in"),
  ("layers/attention/value/kernel", "model.layers.{layer}.self_attn.v_proj.weight", "in"),
  ("layers/attention/out/kernel", "model.layers.{layer}.self_attn.o_proj.weight", "out"),
  ("layers/mlp_norm/scale", "model.layers.{layer}.post_attention_layernorm.weight", "copy"),
  ("layers/mlp/gate/kernel", "model.layers.{layer}.mlp.gate_proj.weight", "in"),
  ("layers/mlp/up/kernel", "model.layers.{layer}.mlp.up_proj.weight", "in"),
  ("layers/mlp/down/kernel", "model.layers.{layer}.mlp.down_proj.weight", "in"),
  ("norm/scale", "model.norm.weight", "copy"),
  ("head/kernel", "lm_head.weight", "in"),
)
MODEL_TYPES = ("llama",)
FIELDS = (
  hf.Field("vocab_size", "vocab_size", 32000),
  hf.Field("width", "hidden_size", 4096),
  hf.Field("mlp", "intermediate_size", 11008),
  hf.Field("depth", "num_hidden_layers", 32),
  hf.Field("heads", "num_attention_heads", 32),
  hf.Field("norm_eps", "rms_norm_eps", 1e-6),
  hf.Field("tie_embeddings", "tie_word_embeddings", False),
)


def read_hf(theirs: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of `config.llm` that their node says.

  Raises:
    UsageError: biases, an activation or a kind of positions that the model does not have.
  """
  hf.expect(theirs, "attention_bias", False, False)
  hf.expect(theirs, "mlp_bias", False, False)
  fields = hf.read(theirs, FIELDS)
  # transformers 4 writes rope_theta and rope_scaling, 5 rope_parameters.
  rope = theirs.get("rope_parameters") or {"rope_theta": theirs.get("rope_theta", 10000.0),
                                           **(theirs.get("rope_scaling") or {})}
  hf.expect(rope, "rope_type", rope.get("type", "default"), "default")
  return fields | {
    "kv_heads": theirs.get("num_key_value_heads") or fields["heads"],
    "head_dim": theirs.get("head_dim") or fields["width"] // fields["heads"],
    "activation": hf.activation(theirs, "hidden_act", "silu"),
    "rope_theta": float(rope["rope_theta"]),
  }


def write_hf(config: ConfigDict) -> dict[str, Any]:
  """Their node of `config.llm`; transformers 4 reads its rope_theta, 5 its rope_parameters."""
  return {
    "model_type": "llama",
    **hf.write(config, FIELDS),
    "num_key_value_heads": config.kv_heads,
    "head_dim": head_dim(config),
    "hidden_act": hf.ACTIVATIONS[config.activation][0],
    "rope_theta": config.rope_theta,
    "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
  }


def head_dim(config: ConfigDict) -> int:
  """C.

  Raises:
    UsageError: heads that cannot be: RoPE turns pairs of channels, and heads share keys in groups.
  """
  width = config.head_dim or config.width // config.heads
  if width % 2:
    raise UsageError(f"config.llm: a head has {width} channels (head_dim, or width / heads), but "
                     "RoPE turns them in pairs; make it an even number")
  if config.heads % config.kv_heads:
    raise UsageError(f"config.llm.heads is {config.heads}, which must be a multiple of kv_heads, "
                     f"{config.kv_heads}; change one of them")
  return width


def supports(mask: IntervalMask) -> str | None:
  """Attention executes every mask: always None."""
  del mask


def empty_cache(config: ConfigDict, rows: int, columns: int, dtype: Any) -> Cache:
  """A cache with nothing in it: k, v [L, rows, columns, G, C]."""
  shape = (config.depth, rows, columns, config.kv_heads, head_dim(config))
  zeros = jnp.zeros(shape, dtype)
  return Cache(k=zeros, v=zeros, length=jnp.zeros((), jnp.int32))


class Embed(nn.Module):
  """The token embedding, f[V,D].

  Its standard deviation is D^-1/2: tied logits start near unit variance at any width. With the 0.02
  of large models, one Adam step changes the embedding of a narrow model by a large share of itself.
  """

  vocab: int
  width: int
  precision: Precision

  def setup(self):
    self.embedding = parameter(
      self, "embedding", initializers.normal(self.width**-0.5), (self.vocab, self.width),
      ("vocab", "embed"), self.precision.param,
    )

  def __call__(self, tokens: Array) -> Array:
    """i32[B,T] to f[B,T,D]."""
    # Gathered over its width first, as every weight: rows lie where the embedding's width does.
    table = constrain(self.embedding.astype(self.precision.compute), ("vocab", None))
    return constrain(jnp.take(table, tokens, axis=0), ("batch", None, None))


class Head(nn.Module):
  """The vocabulary projection of models that do not tie it to the embedding, f[D,V]."""

  vocab: int
  width: int
  precision: Precision

  def setup(self):
    self.kernel = parameter(
      self, "kernel", initializers.normal(self.width**-0.5), (self.width, self.vocab),
      ("embed", "vocab"), self.precision.param,
    )

  def __call__(self) -> Array:
    """The kernel."""
    return self.kernel


class Block(nn.Module):
  """x + attention(norm x), then x + mlp(norm x)."""

  config: ConfigDict
  implementation: str
  precision: Precision

  @nn.compact
  def __call__(
    self, x: Array, columns: Columns | None, context: Context
  ) -> tuple[Array, Columns | None]:
    """See `nn.stack`."""
    config = self.config
    norm = lambda name: RMSNorm(config.norm_eps, self.precision, name=name)
    x = constrain(x, ("batch", None, None))
    y, columns = Attention(
      heads=config.heads,
      groups=config.kv_heads,
      head_dim=head_dim(config),
      bias=False,
      implementation=self.implementation,
      precision=self.precision,
      name="attention",
    )(norm("attention_norm")(x), columns, context)
    x = x + y
    mlp = GatedMLP(config.width, config.mlp, config.activation, self.precision, name="mlp")
    return x + mlp(norm("mlp_norm")(x)), columns


class Model(nn.Module):
  """The decoder. Attributes: `config.llm`, `config.attention`, dtypes."""

  config: ConfigDict
  attention: ConfigDict
  precision: Precision

  def setup(self):
    config = self.config
    self.embedder = Embed(config.vocab_size, config.width, self.precision, name="embed")
    self.layers = stack.run(
      Block,
      config.depth,
      remat=config.remat,
      unroll=config.unroll,
      config=config,
      implementation=self.attention.implementation,
      precision=self.precision,
    )
    self.norm = RMSNorm(config.norm_eps, self.precision)
    if not config.tie_embeddings:
      self.head = Head(config.vocab_size, config.width, self.precision)

  def embed(self, tokens: Array) -> Array:
    """i32[B,T] to f[B,T,D] in the compute dtype."""
    return self.embedder(tokens)

  def __call__(
    self, x: Array, positions: Array, mask: IntervalMask, cache: Cache | None = None
  ) -> Output:
    """Runs the decoder.

    Args:
      x: f[B,T,D], embedded tokens and media rows.
      positions: i32[B,T] for the rotary embedding.
      mask: query fields i32[B,T]; with a cache of S columns, key fields and `k_index` i32[B,S].
      cache: keys and values so far; this call's are appended at column `cache.length`.

    Returns:
      hidden f[B,T,D], head f[D,V] and the longer cache (None without one).

    Raises:
      ValueError: a cache with a mask that has no k_index for its columns.
    """
    plan = functools.partial(
      make_context, blocks=(self.attention.block_q, self.attention.block_k),
      sharing=self.config.heads // self.config.kv_heads, width=head_dim(self.config),
      dtype=self.precision.compute)
    turn = rotation(positions, sequence(head_dim(self.config), self.config.rope_theta))
    if cache is None:
      context, columns = plan(mask, turn), None
    else:
      context = plan(mask, turn, columns=cache.slots, length=cache.length)
      columns = (cache.k, cache.v)
    x, columns = self.layers(x.astype(self.precision.compute), columns, context)
    if cache is not None:
      cache = Cache(*columns, length=cache.length + x.shape[1])
    head = self.embedder.embedding.T if self.config.tie_embeddings else self.head()
    return Output(self.norm(x), constrain(head, (None, "vocab")), cache)
