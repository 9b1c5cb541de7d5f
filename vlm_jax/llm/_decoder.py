"""The decoder that published families share; what makes one of them its family is a `Parts`.

    x + attention(norm x), then x + mlp(norm x)     repeated, norm, vocabulary

Positions turn queries and keys, or are learned and added to whatever stands in a slot.

Layers may be of several kinds, local and global ones. They have the same parameters, so a kind is
data: who sees whom, and how positions turn. All layers stay one run, whatever their order, and
layer 30 is index 30 of every array.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

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
from vlm_jax.nn import stack
from vlm_jax.nn.attention import Attention, Columns, Context, make_context
from vlm_jax.nn.linear import parameter
from vlm_jax.nn.mlp import MLP, GatedMLP
from vlm_jax.nn.norms import RMSNorm
from vlm_jax.ops.rope import Pairs, rotation, sequence, stretched, stretched_llama3

KIND = "decoder"
RUNS = ("layers",)
ROPE_SCALINGS = ("none", "linear", "llama3")

# Rows that all families have; ours, theirs, operation: see vlm_jax/convert/table.py.
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
# With QK-norm.
QK_NORM_KEYS = (
  ("layers/attention/query_norm/scale", "model.layers.{layer}.self_attn.q_norm.weight", "copy"),
  ("layers/attention/key_norm/scale", "model.layers.{layer}.self_attn.k_norm.weight", "copy"),
)


class Kind(NamedTuple):
  """A kind of layer.

  Attributes:
    theta: base of the wavelengths of its rotary positions, None: it has none.
    scaled: whether `config.llm.rope_scaling` is of its positions.
    window: how many slots back it sees, itself counted; 0: all that the mask shows.
  """

  theta: float | None
  scaled: bool = True
  window: int = 0


@dataclasses.dataclass(frozen=True)
class Parts:
  """What differs between families.

  Attributes:
    kinds: the kinds of layers.
    order: the kind of every layer, an index of `kinds`; (): there is one kind.
    norm: of layers and behind the last one.
    qkv_bias: whether queries, keys and values have biases.
    bias: whether what attention returns has one, and a plain MLP.
    gated: whether the MLP is gated, which has no biases.
    positions: how many learned ones there are, 0: none.
    positions_unread: rows of their table before the first.
    qk_norm: a name of `nn.norms.QK_NORMS`, or None.
    post_norms: whether what attention and MLP return is normalised before it is added.
    scale: of the attention logits, None: C ** -0.5.
    attention_soft_cap, final_soft_cap: of the logits of attention and vocabulary, or None.
    embedding_scale: what embedded tokens are multiplied with, or None.
  """

  kinds: tuple[Kind, ...]
  order: tuple[int, ...] = ()
  norm: type[nn.Module] = RMSNorm
  qkv_bias: bool = False
  bias: bool = False
  gated: bool = True
  positions: int = 0
  positions_unread: int = 0
  qk_norm: str | None = None
  post_norms: bool = False
  scale: float | None = None
  attention_soft_cap: float | None = None
  final_soft_cap: float | None = None
  embedding_scale: float | None = None


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


def pairs(config: ConfigDict, kind: Kind) -> Pairs:
  """How the positions of a kind of layer turn the channels of a head.

  Raises:
    UsageError: an unknown rope_scaling.
  """
  turning, scaling = sequence(head_dim(config), kind.theta), config.rope_scaling
  if scaling not in ROPE_SCALINGS:
    raise UsageError(f"config.llm.rope_scaling is '{scaling}'; {nearest(scaling, ROPE_SCALINGS)}")
  if not kind.scaled or scaling == "none":
    return turning
  if scaling == "linear":
    return stretched(turning, config.rope_factor)
  return stretched_llama3(turning, config.rope_factor, config.rope_low, config.rope_high,
                          config.rope_length)


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


def place(table: Array, positions: Array, precision: Precision) -> Array:
  """Learned positions i32[B,T] to f[B,T,D] by their table f[P,D]; NaN behind the last there is."""
  table = constrain(table.astype(precision.compute), (None, None))
  return constrain(jnp.take(table, positions, axis=0), ("batch", None, None))


class Block(nn.Module):
  """One layer: attention and an MLP, normalised before and perhaps after."""

  config: ConfigDict
  parts: Parts
  implementation: str
  precision: Precision

  @nn.compact
  def __call__(self, x: Array, columns: Any, context: Context) -> tuple[Array, Columns | None]:
    """See `nn.stack`; with kinds, `columns` is (columns, kind) and `context` of all of them."""
    config, parts = self.config, self.parts
    if parts.order:
      columns, kind = columns
      context = jax.tree.map(lambda leaf: leaf[kind], context)
    norm = lambda name: parts.norm(config.norm_eps, self.precision, name=name)
    after = norm if parts.post_norms else lambda name: lambda y: y
    x = constrain(x, ("batch", None, None))
    y, columns = Attention(
      heads=config.heads,
      groups=config.kv_heads,
      head_dim=head_dim(config),
      bias=parts.qkv_bias,
      out_bias=parts.bias,
      implementation=self.implementation,
      precision=self.precision,
      qk_norm=parts.qk_norm,
      qk_norm_eps=config.norm_eps,
      scale=parts.scale,
      soft_cap=parts.attention_soft_cap,
      name="attention",
    )(norm("attention_norm")(x), columns, context)
    x = x + after("attention_post_norm")(y)
    sizes = config.width, config.mlp, config.activation
    mlp = (GatedMLP(*sizes, self.precision, name="mlp") if parts.gated
           else MLP(*sizes, parts.bias, self.precision, name="mlp"))
    # Two names: theirs calls this norm without post-norms as it calls attention's with them.
    y = mlp(norm("mlp_pre_norm" if parts.post_norms else "mlp_norm")(x))
    return x + after("mlp_post_norm")(y), columns


class Decoder(nn.Module):
  """The decoder. Attributes: `config.llm`, `config.attention`, dtypes. A family says its parts."""

  config: ConfigDict
  attention: ConfigDict
  precision: Precision

  @staticmethod
  def parts(config: ConfigDict) -> Parts:
    """What makes it the family."""
    raise NotImplementedError

  def setup(self):
    config, parts = self.config, self.parts(self.config)
    self.embedder = Embed(config.vocab_size, config.width, self.precision, name="embed")
    if parts.positions:
      self.positions = parameter(
        self, "positions", initializers.normal(config.width**-0.5),
        (parts.positions_unread + parts.positions, config.width), ("position", "embed"),
        self.precision.param)
    self.layers = stack.run(
      Block,
      config.depth,
      remat=config.remat,
      unroll=config.unroll,
      config=config,
      parts=parts,
      implementation=self.attention.implementation,
      precision=self.precision,
    )
    self.norm = parts.norm(config.norm_eps, self.precision)
    if not config.tie_embeddings:
      self.head = Head(config.vocab_size, config.width, self.precision)

  def embed(self, tokens: Array) -> Array:
    """i32[B,T] to f[B,T,D] in the compute dtype, to which an embedding scale is rounded too."""
    x, scale = self.embedder(tokens), self.parts(self.config).embedding_scale
    return x if scale is None else x * jnp.asarray(scale, x.dtype)

  def __call__(
    self, x: Array, positions: Array, mask: IntervalMask, cache: Cache | None = None,
    visitors: stack.Visitors | None = None,
  ) -> Output:
    """Runs the decoder.

    Args:
      x: f[B,T,D], embedded tokens and media rows.
      positions: i32[B,T], rotary or learned.
      mask: query fields i32[B,T]; with a cache of S columns, key fields and `k_index` i32[B,S].
      cache: keys and values so far; this call's are appended at column `cache.length`.
      visitors: layers of a strategy between these; what they cache is `cache.memory`.

    Returns:
      hidden f[B,T,D], head f[D,V], its soft cap, and the longer cache (None without one).

    Raises:
      UsageError: a window that bites in rows whose documents have branches.
      ValueError: a cache with a mask that has no k_index for its columns.
    """
    parts, columns = self.parts(self.config), None if cache is None else (cache.k, cache.v)
    contexts = [self._context(kind, positions, mask, cache) for kind in parts.kinds]
    context = contexts[0]
    if parts.order:
      context = jax.tree.map(lambda *leaves: jnp.stack(leaves), *contexts)
      apart = cache is not None and isinstance(cache.k, list)
      columns = columns, list(parts.order) if apart else jnp.asarray(parts.order, jnp.int32)
    x, kept = x.astype(self.precision.compute), None
    if parts.positions:
      x = x + place(self.positions, parts.positions_unread + positions, self.precision)
    if visitors is None:
      x, columns = self.layers(x, columns, context)
    else:
      x, columns, kept = stack.visit(self.layers, visitors, x, columns, context)
    if cache is not None:
      cache = Cache(*columns, length=cache.length + x.shape[1], memory=kept)
    head = self.embedder.embedding.T if self.config.tie_embeddings else self.head()
    return Output(self.norm(x), constrain(head, (None, "vocab")), cache, parts.final_soft_cap)

  def _context(self, kind: Kind, positions: Array, mask: IntervalMask, cache: Cache | None
               ) -> Context:
    """What the layers of a kind share."""
    config, written = self.config, {}
    if cache is not None:
      written = dict(columns=cache.slots, length=cache.length)
    slots = mask.num_queries if cache is None else cache.slots
    if kind.window and slots > kind.window:
      if mask.q_class is not None:
        raise UsageError(
          f"config.llm.window is {kind.window}, less than the {slots} slots of a row, and a source "
          "of form 'fan_out' puts branches into documents, whose slots a window cannot count; "
          "choose another form, or config.data.tokens of at most the window")
      mask = mask.within(_own_index(mask, cache), kind.window)
    turn = None if kind.theta is None else rotation(positions, pairs(config, kind))
    return make_context(
      mask, turn,
      (self.attention.block_q, self.attention.block_k), sharing=config.heads // config.kv_heads,
      width=head_dim(config), dtype=self.precision.compute, **written)


def _own_index(mask: IntervalMask, cache: Cache | None) -> Array:
  """i32[T] or i32[B,T], the `k_index` of every query's own key."""
  if mask.k_index is None:
    return jnp.arange(mask.num_queries, dtype=jnp.int32)
  if cache is None:
    return mask.k_index
  take = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=mask.num_queries, axis=1)
  return take(mask.k_index, cache.length)
