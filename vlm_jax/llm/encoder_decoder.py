"""Encoder-decoder transformers, pre-norm (arXiv:1706.03762, 1910.10683): SimVLM's and T5.

The encoder reads one stream, the decoder another and, in every layer, the encoder's result:

    encoder   x + attention(norm x), x + mlp(norm x)                          repeated, norm
    decoder   x + attention(norm x), x + cross(norm x, memory), x + mlp(norm x)   repeated, norm

`config.llm.norm` "layer" with `feed_forward` "plain", `linear_bias` and learned positions is the
model of SimVLM (arXiv:2108.10904); with norm "rms" and `relative_buckets`, which all layers of a
side share, it is the T5 of `llm/t5.py`.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from ml_collections import ConfigDict

from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.fusion import Cache, Output
from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.mesh import constrain
from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array
from vlm_jax.llm import _decoder
from vlm_jax.llm._decoder import Embed, Head, head_dim, place
from vlm_jax.nn import stack
from vlm_jax.nn.attention import (
  Attention,
  Columns,
  Context,
  CrossAttention,
  make_context,
)
from vlm_jax.nn.linear import parameter
from vlm_jax.nn.mlp import FEED_FORWARDS, MLP, GatedMLP
from vlm_jax.nn.norms import NORMS
from vlm_jax.nn.relative import DistanceTable
from vlm_jax.ops.attention import Bias, DistanceBias

__all__ = ["KIND", "RUNS", "Model", "empty_cache", "supports"]

KIND = "encoder-decoder"
RUNS = ("decoder/layers",)


def supports(mask: IntervalMask) -> str | None:
  """Attention executes every mask: always None."""
  del mask


def empty_cache(config: ConfigDict, rows: int, columns: int, dtype: Any) -> Cache:
  """As `_decoder.empty_cache`; where logits depend on distances, with the columns' positions."""
  cache = _decoder.empty_cache(config, rows, columns, dtype)
  if not config.relative_buckets:
    return cache
  return dataclasses.replace(cache, positions=jnp.zeros((rows, columns), jnp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Contexts:
  """What all layers of a decoder share.

  Attributes:
    own: of its self-attention.
    cross: of its attention to the encoder's slots.
    memory: f[B,S,D], the encoder's result; None when its keys are in the cache.
  """

  own: Context
  cross: Context
  memory: Array | None


@dataclasses.dataclass(frozen=True)
class Parts:
  """Makes the parts of a block from the config.

  Attributes: `config.llm`, the implementation of attention, dtypes.
  """

  config: ConfigDict
  implementation: str
  precision: Precision

  def norm(self, name: str) -> nn.Module:
    """A norm of `config.norm`."""
    return NORMS[self.config.norm](self.config.norm_eps, self.precision, name=name)

  def attention(self, kind: type[nn.Module], name: str) -> nn.Module:
    """Attention or CrossAttention of the config's sizes."""
    config = self.config
    return kind(heads=config.heads, groups=config.kv_heads, head_dim=head_dim(config),
                bias=config.linear_bias, implementation=self.implementation,
                scale=config.query_scalar**-0.5 if config.query_scalar else None,
                precision=self.precision, name=name)

  def mlp(self) -> nn.Module:
    """The feed-forward block; two names, for theirs call the same kernel otherwise in the other."""
    config = self.config
    if config.feed_forward == "gated":
      return GatedMLP(config.width, config.mlp, config.activation, self.precision, name="gated")
    return MLP(config.width, config.mlp, config.activation, config.linear_bias, self.precision,
               name="mlp")


class EncoderBlock(nn.Module):
  """x + attention(norm x), then x + mlp(norm x)."""

  parts: Parts

  @nn.compact
  def __call__(self, x: Array, columns: None, context: Context) -> tuple[Array, None]:
    """See `nn.stack`."""
    parts = self.parts
    x = constrain(x, ("batch", None, None))
    y, _ = parts.attention(Attention, "attention")(parts.norm("attention_norm")(x), None, context)
    x = x + y
    return x + parts.mlp()(parts.norm("mlp_norm")(x)), columns


class DecoderBlock(nn.Module):
  """Self-attention, attention to the encoder, mlp, each of them x + f(norm x)."""

  parts: Parts

  @nn.compact
  def __call__(
    self, x: Array, columns: tuple[Columns, Columns | None] | None, contexts: Contexts
  ) -> tuple[Array, tuple[Columns, Columns] | None]:
    """See `nn.stack`; columns are those of self-attention and those of the encoder's slots."""
    parts = self.parts
    own, kept = (None, None) if columns is None else columns
    x = constrain(x, ("batch", None, None))
    y, own = parts.attention(Attention, "attention")(
      parts.norm("attention_norm")(x), own, contexts.own)
    x = x + y
    y, kept = parts.attention(CrossAttention, "cross")(
      parts.norm("cross_norm")(x), contexts.memory, kept, contexts.cross)
    x = x + y
    x = x + parts.mlp()(parts.norm("mlp_norm")(x))
    return x, None if columns is None else (own, kept)


class Stack(nn.Module):
  """Learned positions or distances, layers and the last norm of one side.

  Attributes:
    block: EncoderBlock or DecoderBlock.
    depth: layers.
    parts: see `Parts`.
    bidirectional: whether a key after its query has a distance of its own.
  """

  block: type[nn.Module]
  depth: int
  parts: Parts
  bidirectional: bool

  def setup(self):
    config, precision = self.parts.config, self.parts.precision
    if config.positions:
      self.positions = parameter(
        self, "positions", initializers.normal(config.width**-0.5),
        (config.positions, config.width), ("position", "embed"), precision.param)
    if config.relative_buckets:
      self.relative = DistanceTable(config.heads, config.relative_buckets, config.relative_distance,
                                    self.bidirectional, precision)
    self.layers = stack.run(self.block, self.depth, remat=config.remat, unroll=config.unroll,
                            parts=self.parts)
    self.norm = self.parts.norm(None)

  def distances(self, queries: Array, keys: Array) -> DistanceBias | None:
    """The bias of logits between positions i32[B,T] and i32[B,S], if there is one."""
    return self.relative(queries, keys) if self.parts.config.relative_buckets else None

  def place(self, positions: Array) -> Array | float:
    """i32[B,T] to the embeddings of positions f[B,T,D]; NaN behind the last there is."""
    if not self.parts.config.positions:
      return 0.0
    return place(self.positions, positions, self.parts.precision)

  def __call__(self, x: Array, columns: Any, context: Any) -> tuple[Array, Any]:
    """f[B,T,D], the columns of all layers or None, what they share; the same two after them."""
    x, columns = self.layers(x.astype(self.parts.precision.compute), columns, context)
    return self.norm(x), columns


class Model(nn.Module):
  """Both sides and the vocabulary. Attributes: `config.llm`, `config.attention`, dtypes."""

  config: ConfigDict
  attention: ConfigDict
  precision: Precision

  def setup(self):
    config = self.config
    for field, known in (("norm", NORMS), ("feed_forward", FEED_FORWARDS)):
      if config[field] not in known:
        raise UsageError(f"config.llm.{field} is '{config[field]}'; "
                         f"{nearest(config[field], known)}")
    if config.feed_forward == "gated" and config.linear_bias:
      raise UsageError("config.llm.linear_bias: the gated feed-forward block has no biases; set it "
                       "to False or config.llm.feed_forward='plain'")
    parts = Parts(config, self.attention.implementation, self.precision)
    self.embedder = Embed(config.vocab_size, config.width, self.precision, name="embed")
    self.encoder = Stack(EncoderBlock, config.encoder_depth or config.depth, parts, True)
    self.decoder = Stack(DecoderBlock, config.depth, parts, False)
    if not config.tie_embeddings:
      self.head = Head(config.vocab_size, config.width, self.precision)

  def embed(self, tokens: Array, positions: Array, side: str) -> Array:
    """i32[B,T] tokens and positions on a side ("encoder", "decoder") to f[B,T,D]."""
    return self.embedder(tokens) + getattr(self, side).place(positions)

  def encode(self, x: Array, positions: Array, mask: IntervalMask, bias: Array | None = None
             ) -> Array:
    """Runs the encoder.

    Args:
      x: f[B,S,D], embedded tokens and media rows.
      positions: i32[B,S], whose distances the logits may depend on.
      mask: query and key fields i32[B,S].
      bias: f[B,H,S,S] added to the attention logits of every layer, or None.

    Returns:
      The memory f[B,S,D], after the last norm.
    """
    bias = _sum(bias, self.encoder.distances(positions, positions))
    return self.encoder(x, None, self._plan(mask, bias=bias))[0]

  def __call__(
    self, x: Array, positions: Array, memory: Array | None, mask: IntervalMask,
    cross: IntervalMask, cache: Cache | None = None,
  ) -> Output:
    """Runs the decoder.

    Args:
      x: f[B,T,D], embedded tokens.
      positions: i32[B,T], whose distances the logits may depend on.
      memory: f[B,S,D] of `encode`; None when the cache has its keys and values.
      mask: the decoder's own; with a cache of n columns, key fields and `k_index` i32[B,n].
      cross: queries i32[B,T], keys the encoder's slots i32[B,S].
      cache: keys and values so far; this call's are appended at column `cache.length`.

    Returns:
      hidden f[B,T,D], head f[D,V] and the longer cache (None without one).

    Raises:
      ValueError: neither memory nor a cache that has it, or a cache with a mask without k_index.
    """
    if memory is None and (cache is None or cache.memory is None):
      raise ValueError("the decoder needs the encoder's memory, or a cache that an earlier call "
                       "with it returned")
    slots = jax.tree.leaves(cache.memory)[0].shape[-3] if memory is None else memory.shape[1]
    written, columns, places = {}, None, positions
    if cache is not None:
      written = dict(columns=cache.slots, length=cache.length)
      columns = ((cache.k, cache.v), cache.memory if memory is None else None)
      places = cache.positions
      if places is not None:
        places = jax.lax.dynamic_update_slice(places, positions, (0, cache.length))
    own = self._plan(mask, bias=self.decoder.distances(positions, places), **written)
    other = self._plan(cross, keys=slots)
    hidden, columns = self.decoder(x, columns, Contexts(own, other, memory))
    if cache is not None:
      (k, v), kept = columns
      cache = Cache(k, v, cache.length + x.shape[1], kept, places)
    head = self.embedder.embedding.T if self.config.tie_embeddings else self.head()
    return Output(hidden, constrain(head, (None, "vocab")), cache)

  def _plan(self, mask: IntervalMask, **fields) -> Context:
    blocks = (self.attention.block_q, self.attention.block_k)
    sharing = self.config.heads // self.config.kv_heads
    return make_context(mask, None, blocks, sharing=sharing, width=head_dim(self.config),
                        dtype=self.precision.compute, **fields)


def _sum(bias: Array | None, distances: DistanceBias | None) -> Bias | None:
  if bias is None or distances is None:
    return distances if bias is None else bias
  return bias + distances.dense()
