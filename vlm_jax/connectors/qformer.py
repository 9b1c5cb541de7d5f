"""Q-Former: learned queries read a picture, and words beside them (arXiv:2301.12597, section 3.1).

BERT (arXiv:1810.04805) whose slots are queries and then words, normalised together at the bottom.
In a layer, each step being x = norm(x + f(x)):

    all slots   attention to one another, who sees whom being a mask
    queries     attention to the features of the picture, in layers 0, n, 2n, ... of n = cross_every
    queries     an MLP of their own
    words       another MLP

So words never see the picture but through queries, and without words nothing of the words' side
exists: the connector of a language model, whose slots are what its queries became, projected. It
may be told words about each picture, which all of its queries and words see (InstructBLIP,
arXiv:2305.06500); what became of them is dropped.
Everything but that projection computes in f32, whatever `config.precision.compute` says, as
published. There is no dropout.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers
from ml_collections import ConfigDict

from vlm_jax.core.errors import UsageError
from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array
from vlm_jax.nn import pool, stack
from vlm_jax.nn.attention import Attention, Columns, Context, CrossAttention, make_context
from vlm_jax.nn.linear import Linear, parameter
from vlm_jax.nn.mlp import MLP
from vlm_jax.nn.norms import LayerNorm
from vlm_jax.towers.vit import see_all

STD = 0.02  # of queries and words at first


def _layer_keys(ours: str, theirs: str, crosses: bool) -> tuple:
  rows = []
  attentions = (("attention", "attention"), *((("cross", "crossattention"),) if crosses else ()))
  for name, published in attentions:
    for part in ("query", "key", "value"):
      rows += [(f"{ours}/{name}/{part}/kernel", f"{theirs}.{published}.attention.{part}.weight",
                "in"),
               (f"{ours}/{name}/{part}/bias", f"{theirs}.{published}.attention.{part}.bias",
                "flat")]
    rows += [(f"{ours}/{name}/out/kernel", f"{theirs}.{published}.output.dense.weight", "out"),
             (f"{ours}/{name}/out/bias", f"{theirs}.{published}.output.dense.bias", "copy"),
             *norm_keys(f"{ours}/{name}_norm", f"{theirs}.{published}.output.LayerNorm")]
  for name, published in (("query", "_query"), ("text", "")):
    for part, step in (("up", "intermediate"), ("down", "output")):
      key = f"{theirs}.{step}{published}.dense"
      rows += [(f"{ours}/{name}_mlp/{part}/kernel", f"{key}.weight", "in"),
               (f"{ours}/{name}_mlp/{part}/bias", f"{key}.bias", "copy")]
    rows += norm_keys(f"{ours}/{name}_norm", f"{theirs}.output{published}.LayerNorm")
  return tuple(rows)


def norm_keys(ours: str, theirs: str) -> tuple:
  """The rows of a LayerNorm."""
  return ((f"{ours}/scale", f"{theirs}.weight", "copy"), (f"{ours}/bias", f"{theirs}.bias", "copy"))


@functools.cache
def keys(every: int) -> tuple:
  """The rows of a Q-Former with cross-attention in every n-th layer (`convert/table.py`)."""
  layers = [_layer_keys(f"layers/layer{number}",
                        f"qformer.encoder.layer.{{{every}*layer+{number}}}", number == 0)
            for number in range(every)]
  return (
    ("queries", "query_tokens", "lead"),
    ("words", "embeddings.word_embeddings.weight", "copy"),
    ("positions", "embeddings.position_embeddings.weight", "copy"),
    *norm_keys("norm", "qformer.layernorm"),
    *(row for layer in layers for row in layer),
    ("project/kernel", "language_projection.weight", "in"),
    ("project/bias", "language_projection.bias", "copy"),
  )


KEYS = keys(2)  # the published ones
# Parameters of one stage of BLIP-2 alone, which starts from another (`config.connector.init`).
STAGED = ("project/.*", "words", "positions", "layers/.*/text_(mlp|norm)/.*")


def slots(config: ConfigDict, frames: int, height: int, width: int) -> np.ndarray:
  """i32[k]: the queries, whatever the size of the picture; those of each frame behind another."""
  del height, width
  return np.arange(frames * config.latents, dtype=np.int32)


def uses(config: ConfigDict, path: str, features: int, words: int = 0) -> int:
  """To how many places of one image a parameter is applied, with so many words beside the queries.
  """
  if path == "words":  # rows of it are read
    return 0
  if "/text_" in path:
    return words
  if "/cross" in path:
    return pool.uses(path, config.latents, features)
  alone = "/query_" in path or path.startswith("project/")
  return config.latents + (0 if alone else words)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Contexts:
  """What all layers share.

  Attributes:
    own: of attention among slots.
    cross: of the queries' attention to features; None: there are no queries, all slots are words.
    memory: the features f[n,P,D'], None as `cross`.
  """

  own: Context
  cross: Context | None
  memory: Array | None

  @property
  def queries(self) -> int:
    """K, how many slots are queries; they come first."""
    return 0 if self.cross is None else self.cross.mask.num_queries


class Layer(nn.Module):
  """One layer; attributes: `config.connector`, whether its queries see the picture, dtypes."""

  config: ConfigDict
  crosses: bool
  precision: Precision

  @nn.compact
  def __call__(self, x: Array, columns: Columns | None, contexts: Contexts
               ) -> tuple[Array, Columns | None]:
    """See `nn.stack`; columns are those of the attention among slots."""
    count = contexts.queries
    y, columns = self._attention(Attention, "attention")(x, columns, contexts.own)
    x = self._norm("attention_norm")(x + y)
    queries, words, out = x[:, :count], x[:, count:], []
    if count:
      if self.crosses:
        y, _ = self._attention(CrossAttention, "cross")(
          queries, contexts.memory, None, contexts.cross)
        queries = self._norm("cross_norm")(queries + y)
      out.append(self._feed(queries, "query"))
    if words.shape[1]:
      out.append(self._feed(words, "text"))
    return jnp.concatenate(out, axis=1), columns

  def _attention(self, kind: type[nn.Module], name: str) -> nn.Module:
    config = self.config
    return kind(heads=config.heads, groups=config.heads, head_dim=config.slot_width // config.heads,
                bias=True, implementation="auto", precision=self.precision, name=name)

  def _norm(self, name: str) -> nn.Module:
    return LayerNorm(self.config.norm_eps, self.precision, name=name)

  def _feed(self, x: Array, kind: str) -> Array:
    config = self.config
    y = MLP(config.slot_width, config.hidden or 4 * config.slot_width, config.activation, True,
            self.precision, name=f"{kind}_mlp")(x)
    return self._norm(f"{kind}_norm")(x + y)


class Model(nn.Module):
  """The Q-Former and the projection of what its queries became to the width of a language model.

  Attributes:
    config: `config.connector`; it reads words if `vocab_size` is not 0.
    width: of a slot of the language model.
    precision: dtypes; but for the projection it computes in f32.
  """

  config: ConfigDict
  width: int
  precision: Precision

  def setup(self):
    config = self.config
    check(config)
    exact = dataclasses.replace(self.precision, compute=jnp.float32)
    make = lambda name, rows, axis: parameter(
      self, name, initializers.normal(STD), (rows, config.slot_width), (axis, "embed"), exact.param)
    self.queries = make("queries", config.latents, "position")
    if config.vocab_size:
      self.words = make("words", config.vocab_size, "vocab")
      self.positions = make("positions", config.positions, "position")
    self.norm = LayerNorm(config.norm_eps, exact)
    every = config.cross_every
    self.layers = stack.run(
      stack.Period, config.depth // every, remat=config.remat, unroll=config.unroll,
      layers=tuple((f"layer{number}", functools.partial(Layer, config, number == 0, exact))
                   for number in range(every)))
    self.project = Linear((self.width,), ("embed", "mlp"), True, self.precision)

  def __call__(self, features: Array, grid: tuple[int, int], words: Array | None = None) -> Array:
    """f[B,N,P,D'] to f[B,N,K,width], told words i32[B,N,L] of `Media`; the grid does not matter."""
    del grid
    batch, images, places, width = features.shape
    features = features.reshape(batch * images, places, width)
    if words is None:
      x, _ = self.read(self.ask(batch * images), None, features)
    else:
      words = words.reshape(batch * images, -1)
      x = self.hear(jnp.maximum(words, 0), (words >= 0).sum(1), features)
    return self.project(x).reshape(batch, images, -1, self.width)

  def hear(self, words: Array, lengths: Array, features: Array) -> Array:
    """What the queries f32[n,K,D] became that were told words.

    Args:
      words: i32[n,L].
      lengths: i32[n], how many of them there are; the others are padding.
      features: f[n,P,D'] of the pictures.
    """
    places = jnp.broadcast_to(jnp.arange(words.shape[1]), words.shape)
    x = jnp.concatenate([self.ask(len(words)), self.spell(words, places)], axis=1)
    x, _ = self.read(x, mask_of_told(lengths, self.config.latents, words.shape[1]), features)
    return x[:, : self.config.latents]

  def ask(self, rows: int) -> Array:
    """The queries f32[rows,K,D]."""
    return jnp.broadcast_to(self.queries.astype(jnp.float32), (rows, *self.queries.shape))

  def spell(self, tokens: Array, positions: Array) -> Array:
    """Words i32[n,L] at positions i32[n,L] to f32[n,L,D]."""
    look = lambda table, index: jnp.take(table.astype(jnp.float32), index, axis=0)
    return look(self.words, tokens) + look(self.positions, positions)

  def read(self, x: Array, mask: IntervalMask | None, features: Array | None,
           cache: tuple[Any, Array] | None = None) -> tuple[Array, Any]:
    """Runs the layers.

    Args:
      x: f32[n,T,D], queries (if there are features) and words behind them.
      mask: who sees whom among them; None: all. With a cache, `k_index` is i32[n,S].
      features: f[n,P,D'] of the pictures; None: all slots are words.
      cache: columns of S slots as an earlier call returned them (or `columns`), and how many are
        written, i32[].

    Returns:
      f32[n,T,D], and the columns (None without a cache).
    """
    rows, length, width = x.shape
    plan = functools.partial(make_context, rotation=None, blocks=(0, 0), dtype=jnp.float32,
                             width=width // self.config.heads)
    columns, written = (None, {}) if cache is None else (
      cache[0], dict(columns=jax.tree.leaves(cache[0])[0].shape[-3], length=cache[1]))
    own = plan(see_all(length, length, rows) if mask is None else mask, **written)
    cross = None
    if features is not None:
      count, places = self.config.latents, features.shape[1]
      cross = plan(see_all(count, places, rows), keys=places)
    x, columns = self.layers(self.norm(x), columns, Contexts(own, cross, features))
    return x, None if cache is None else columns


def columns(config: ConfigDict, rows: int, slots: int) -> tuple[Columns, ...]:
  """Columns of S = `slots` slots with nothing in them, one pair for every layer of a period.

  `config` is `config.connector`.
  """
  shape = (config.depth // config.cross_every, rows, slots, config.heads,
           config.slot_width // config.heads)
  return tuple((jnp.zeros(shape), jnp.zeros(shape)) for _ in range(config.cross_every))


def mask_of_told(lengths: Array, queries: int, length: int) -> IntervalMask:
  """All queries and the words of a text see one another.

  Args:
    lengths: i32[n], of the texts.
    queries, length: K, and L slots of a text.
  """
  hi = jnp.broadcast_to(queries + lengths[:, None], (len(lengths), queries + length))
  return IntervalMask(jnp.zeros_like(hi), hi.astype(jnp.int32))


def check(config: ConfigDict) -> None:
  """Raises UsageError for a `config.connector` that no Q-Former has."""
  if config.slot_width % config.heads:
    raise UsageError(f"config.connector.slot_width is {config.slot_width}, which must be a "
                     f"multiple of config.connector.heads, {config.heads}")
  if config.cross_every < 1 or config.depth % config.cross_every:
    raise UsageError(f"config.connector.depth is {config.depth}, which must be a multiple of "
                     f"config.connector.cross_every, {config.cross_every}")
