"""A decoder whose first half reads text alone, and whose second half another stream too.

    first    x + attention(norm x), x + mlp(norm x)                                      repeated
    second   x + attention(norm x), x + cross(norm x, memory), x + mlp(norm x)   repeated, norm, V

So what the first half makes of a text does not depend on the other stream, and can stand for the
text where it is compared: a class token reads it there (CoCa, arXiv:2205.01917, section 3.2). It is
learned, has the position behind the longest text, and gives its result through a norm of its own.

`config.llm.cross` says where the second half reads: "inside" a layer, as drawn; "behind" it, in a
block of its own that normalises the memory and has another MLP, as OpenCLIP's models:

    second   x + attention(norm x), x + mlp(norm x), x + cross(norm x, norm memory), x + mlp(norm x)
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
from vlm_jax.core.layout import LEARNED
from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.mesh import constrain
from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array
from vlm_jax.llm._decoder import Embed, Head
from vlm_jax.nn import stack
from vlm_jax.nn.attention import Attention, Columns, Context, CrossAttention, make_context
from vlm_jax.nn.linear import parameter
from vlm_jax.nn.mlp import MLP
from vlm_jax.nn.norms import LayerNorm
from vlm_jax.towers import vit

KIND = "two halves"
RUNS = ("first", "second")


def supports(mask: IntervalMask) -> str | None:
  """Attention executes every mask: always None."""
  del mask


def depths(config: ConfigDict) -> tuple[int, int]:
  """Layers of both halves."""
  return config.encoder_depth or config.depth, config.depth


def layers_of(config: ConfigDict, mask: str) -> int:
  """Through how many layers a mask goes; those of what stands behind texts, through the first half.
  """
  first, second = depths(config)
  return {"cross": second, "text": first + second}.get(mask, first)


def empty_cache(config: ConfigDict, rows: int, columns: int, dtype: Any) -> Cache:
  """A cache with nothing in it: k, v of both halves, each [L, rows, columns, H, C]."""
  shape = (rows, columns, config.heads, config.width // config.heads)
  zeros = tuple(jnp.zeros((depth, *shape), dtype) for depth in depths(config))
  return Cache(k=zeros, v=zeros, length=jnp.zeros((), jnp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Contexts:
  """What the layers of the second half share.

  Attributes:
    own: of the text.
    cross: of the text with the other stream.
    memory: f[B,S,D], the other stream; None when its keys are in the cache.
  """

  own: Context
  cross: Context
  memory: Array | None


class Layer(nn.Module):
  """A layer of the second half, the other stream read inside or behind it.

  Attributes: `config.llm`, the implementation of attention, dtypes.
  """

  config: ConfigDict
  implementation: str
  precision: Precision

  @nn.compact
  def __call__(
    self, x: Array, columns: tuple[Columns, Columns | None] | None, contexts: Contexts
  ) -> tuple[Array, tuple[Columns, Columns] | None]:
    """See `nn.stack`; columns are those of the text and those of the other stream."""
    config, inside = self.config, self.config.cross == "inside"
    norm = lambda name: LayerNorm(config.norm_eps, self.precision, name=name)
    attention = lambda kind, name: kind(
      heads=config.heads, groups=config.heads, head_dim=config.width // config.heads, bias=True,
      implementation=self.implementation, precision=self.precision, name=name)
    mlp = lambda name: MLP(config.width, config.mlp, config.activation, True, self.precision,
                           name=name)
    own, kept = (None, None) if columns is None else columns
    x = constrain(x, ("batch", None, None))
    y, own = attention(Attention, "attention")(norm("attention_norm")(x), own, contexts.own)
    x, memory = x + y, contexts.memory
    if not inside:
      x = x + mlp("mlp")(norm("mlp_norm")(x))
      memory = None if memory is None else norm("memory_norm")(memory)
    y, kept = attention(CrossAttention, "cross")(norm("cross_norm")(x), memory, kept,
                                                 contexts.cross)
    x = x + y
    last = "mlp" if inside else "cross_mlp"
    return x + mlp(last)(norm(f"{last}_norm")(x)), None if columns is None else (own, kept)


class Model(nn.Module):
  """Both halves and the vocabulary. Attributes: `config.llm`, `config.attention`, dtypes."""

  config: ConfigDict
  attention: ConfigDict
  precision: Precision

  def setup(self):
    config, dtypes = self.config, self.precision
    check(config)
    first, second = depths(config)
    learned = lambda name, shape, axes: parameter(
      self, name, initializers.normal(config.width**-0.5), shape, axes, dtypes.param)
    self.embedder = Embed(config.vocab_size, config.width, dtypes, name="embed")
    self.positions = learned("positions", (config.positions + 1, config.width),
                             ("position", "embed"))
    self.class_token = learned("class_token", (config.width,), ("norm",))
    run = lambda layer, depth: stack.run(
      layer, depth, remat=config.remat, unroll=config.unroll, config=config,
      implementation=self.attention.implementation, precision=dtypes)
    self.first, self.second = run(vit.Block, first), run(Layer, second)
    self.class_norm = LayerNorm(config.norm_eps, dtypes)
    self.norm = LayerNorm(config.norm_eps, dtypes)
    if not config.tie_embeddings:
      self.head = Head(config.vocab_size, config.width, dtypes)

  def embed(self, tokens: Array, positions: Array, fill: Array) -> Array:
    """i32[B,T] each to f[B,T,D]: tokens, or where `fill` is LEARNED the class token."""
    x = self.embedder(tokens)
    x = jnp.where((fill == LEARNED)[..., None], self.class_token.astype(x.dtype), x)
    table = constrain(self.positions.astype(x.dtype), (None, None))
    return x + constrain(jnp.take(table, positions, axis=0), ("batch", None, None))

  def read(self, x: Array, mask: IntervalMask, cache: Cache | None = None) -> tuple[Array, Any]:
    """The first half.

    Args:
      x: f[B,T,D] of `embed`.
      mask: i32[B,T] queries and, with a cache of n columns, key fields and `k_index` i32[B,n].
      cache: keys and values so far.

    Returns:
      f[B,T,D] without a norm behind it, and the columns that `__call__` takes.
    """
    columns = None if cache is None else (cache.k[0], cache.v[0])
    return self.first(x, columns, self._plan(mask, cache))

  def summary(self, x: Array) -> Array:
    """What the first half made of class tokens, f[...,D], behind their norm."""
    return self.class_norm(x)

  def __call__(
    self, x: Array, memory: Array | None, mask: IntervalMask, cross: IntervalMask,
    cache: Cache | None = None, columns: Any = None,
  ) -> Output:
    """The second half.

    Args:
      x: f[B,T,D] of `read`.
      memory: f[B,S,D], the other stream; None when the cache has its keys and values.
      mask: as `read`'s.
      cross: queries i32[B,T], keys the other stream's slots i32[B,S].
      cache: keys and values so far; this call's are appended at column `cache.length`.
      columns: of `read` with this cache.

    Returns:
      hidden f[B,T,D], head f[D,V] and the longer cache (None without one).

    Raises:
      ValueError: neither memory nor a cache that has it.
    """
    if memory is None and (cache is None or cache.memory is None):
      raise ValueError("the second half needs the other stream, or a cache that an earlier call "
                       "with it returned")
    slots = jax.tree.leaves(cache.memory)[0].shape[-3] if memory is None else memory.shape[1]
    contexts = Contexts(self._plan(mask, cache), self._plan(cross, keys=slots), memory)
    given = None
    if cache is not None:
      given = (cache.k[1], cache.v[1]), cache.memory if memory is None else None
    hidden, found = self.second(x, given, contexts)
    if cache is not None:
      (k, v), kept = found
      cache = Cache((columns[0], k), (columns[1], v), cache.length + x.shape[1], kept)
    head = self.embedder.embedding.T if self.config.tie_embeddings else self.head()
    return Output(self.norm(hidden), constrain(head, (None, "vocab")), cache)

  def _plan(self, mask: IntervalMask, cache: Cache | None = None, **fields) -> Context:
    if cache is not None:
      fields |= dict(columns=cache.slots, length=cache.length)
    return make_context(mask, None, (self.attention.block_q, self.attention.block_k),
                        width=self.config.width // self.config.heads,
                        dtype=self.precision.compute, **fields)


CROSSES = ("inside", "behind")


def check(config: ConfigDict) -> None:
  """Raises UsageError for fields of `config.llm` that cannot be."""
  if config.cross not in CROSSES:
    raise UsageError(f"config.llm.cross is '{config.cross}'; {nearest(config.cross, CROSSES)}")
  if config.width % config.heads or config.kv_heads != config.heads:
    raise UsageError(f"config.llm.heads is {config.heads}; it must divide width, {config.width}, "
                     f"and kv_heads, {config.kv_heads}, must be as many")
  if config.positions < 1:
    raise UsageError("config.llm.positions is 0; 'two_halves' learns them, so give the length of "
                     "the longest text")
