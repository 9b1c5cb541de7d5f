"""BLIP-2, first stage: queries learn to read what a text says of its picture (arXiv:2301.12597).

One Q-Former (`connectors/qformer.py`), three objectives in one step, three masks (section 3.2).
Pictures and texts are compared (itc) by their nearest query, so neither may see the other; a text
is said (itg) behind the queries, which may not see it. Queries see the same in both: one pass does
all (t text, q query, d the text again, said; it opens with a mark of its own):

          t t t q q d d d
        t 1 1 1 . . . . .
        t 1 1 1 . . . . .
        t 1 1 1 . . . . .
        q . . . 1 1 . . .
        q . . . 1 1 . . .
        d . . . 1 1 1 . .
        d . . . 1 1 1 1 .
        d . . . 1 1 1 1 1

Whether a picture and a text belong together (itm) is told by queries that see all of the text, and
it them, in a second pass, because it needs the similarities of the first:

          q q t t t
        q 1 1 1 1 1
        q 1 1 1 1 1
        t 1 1 1 1 1
        t 1 1 1 1 1
        t 1 1 1 1 1

That pass has three pairs a document: picture and text, another picture with the text, the picture
with another text. The others are drawn from the whole batch, the more similar the likelier (the
most similar, where nothing is random), never the own nor one whose text is equal. What itg has
taught is said by `blip2_itg.py`.

What does not apply of what strategies promise: as of CLIP (`fusion/clip.py`), because a document is
a picture with a text of fixed length, of which Q-Former sees one alone, in no packed row. "itm"
compares inside the model, so a step of it cannot be accumulated.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import initializers
from ml_collections import ConfigDict

from vlm_jax.connectors import qformer
from vlm_jax.core.batch import Batch
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import Cache, Embeddings, Stage, find_tower
from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.precision import Precision, precision
from vlm_jax.core.typing import Array
from vlm_jax.fusion import clip
from vlm_jax.fusion.clip import TEXT, axes, fields, layout, order, pairs, rows, there, unit
from vlm_jax.nn.linear import Linear, parameter
from vlm_jax.nn.mlp import activation
from vlm_jax.nn.model import Configured
from vlm_jax.nn.norms import LayerNorm
from vlm_jax.ops import contrastive
from vlm_jax.ops.losses import source_sums, token_losses

__all__ = ["GLOBAL", "KEYS", "STAGES", "STREAM", "UNDIVIDED", "Model", "axes", "fields", "layout",
           "losses", "order", "rows", "uses", "voice", "weights"]

STAGES = (
  Stage("all", (".*",)),
  # As published: of the tower only the norm behind it, which is the bridge's.
  Stage("bridge", ("(connector|tower/post_norm|caption|match|.*_projection)/.*", "temperature")),
)
STREAM = ""  # nothing speaks in a packed row
GLOBAL = ("itc",)
UNDIVIDED = ("itm",)
SMOOTHING = 0.1  # of labels, in itc and itg
PAIRS = 3  # that itm tells apart for a document, the first of which belongs together

# What is neither the tower's nor the Q-Former's: ours, theirs, operation.
KEYS = (
  ("image_projection/kernel", "vision_projection.weight", "in"),
  ("image_projection/bias", "vision_projection.bias", "copy"),
  ("text_projection/kernel", "text_projection.weight", "in"),
  ("text_projection/bias", "text_projection.bias", "copy"),
  ("match/kernel", "itm_head.weight", "in"),
  ("match/bias", "itm_head.bias", "copy"),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bridged(Embeddings):
  """Embeddings, and what the other objectives read; image f32[B,M,K,E], one for every query.

  Attributes:
    matches: f32[B,M,3,2], logits of not belonging together and of doing so; None: not asked for.
    hidden: f32[B,M*L,D], of the slots that say a text; None: not asked for.
    head: f32[D,V], of the vocabulary.
  """

  matches: Array | None = None
  hidden: Array | None = None
  head: Array | None = None


def uses(config: ConfigDict, path: str) -> dict[str, int] | None:
  """Queries and words go through the Q-Former once, and three times more to be told apart."""
  top, _, inner = path.partition("/")
  image, text, wanted = "images/images", f"texts/{TEXT}", config.fusion.objectives
  length, count = config.llm.positions, config.connector.latents
  others, says = PAIRS * ("itm" in wanted), int("itg" in wanted)
  if path == "connector/words":  # which are also what a said word is chosen by
    return {text: length * says}
  if top == "connector":
    grid = math.prod(find_tower(config).grid(config.tower))
    seen, read = (qformer.uses(config.connector, inner, grid, words) for words in (0, length))
    return {image: seen * (1 + others), text: (read - seen) * (1 + says + others)}
  if top in ("caption", "match"):
    return {text: length} if top == "caption" else {image: count * others}
  return clip.uses(config, path) if top != "image_projection" else {image: count}


def losses(output: Embeddings, batch: Batch, config: ConfigDict) -> dict[str, Array]:
  """itc, itm and itg (those of config.fusion.objectives), sums f32[sources]; itc alone of plain
  embeddings.
  """
  source_ids, wanted = batch.documents[TEXT].source_ids, config.fusion.objectives
  sources = len(config.data.sources)
  found = {}
  if "itc" in wanted:
    values = contrastive.softmax_losses(pairs(output, batch), output.scale, SMOOTHING)
    found["itc"] = source_sums(values.reshape(source_ids.shape), source_ids, sources)
  if not isinstance(output, Bridged):
    return found
  if "itm" in wanted:
    told = jax.nn.log_softmax(output.matches)
    values = -jnp.where(jnp.arange(PAIRS) == 0, told[..., 1], told[..., 0])
    found["itm"] = source_sums((values * _told(batch)).sum(-1), source_ids, sources)
  if "itg" in wanted:
    tokens, weight = _said(batch)
    hidden, head = output.hidden, output.head  # BERT's, whose logits have no soft cap
    values = token_losses(hidden, head, tokens, weight > 0, smoothing=SMOOTHING)
    found["itg"] = source_sums(values.cross_entropy, _each(source_ids, batch), sources)
  return found


def weights(batch: Batch, config: ConfigDict) -> dict[str, Array]:
  """itc: pairs; itm: pairs that are told apart; itg: predicted tokens; f32[sources]."""
  source_ids, sources = batch.documents[TEXT].source_ids, len(config.data.sources)
  count = {"itc": there(batch).astype(jnp.float32), "itm": _told(batch).sum(-1)}
  found = {name: source_sums(values, source_ids, sources) for name, values in count.items()}
  found["itg"] = source_sums(_said(batch)[1], _each(source_ids, batch), sources)
  return {name: found[name] for name in found if name in config.fusion.objectives}


def _told(batch: Batch) -> Array:
  """f32[B,M,3], which pairs of a document there are: without a stranger in the batch, the own."""
  whole = there(batch)
  strange = contrastive.strangers(_pairs_of(batch)).any(1).reshape(whole.shape)
  return jnp.stack([whole, strange, strange], axis=-1).astype(jnp.float32)


def _pairs_of(batch: Batch) -> contrastive.Pairs:
  """Which of the N = B M documents are pairs, and their texts' digests."""
  whole = there(batch).reshape(-1)
  return contrastive.Pairs(None, None, whole, batch.documents[TEXT].digests.reshape(len(whole), -1))


def _said(batch: Batch) -> tuple[Array, Array]:
  """i32[B,M*L] what every slot of the texts says, and f32[B,M*L] whether it is asked to."""
  tokens = batch.documents[TEXT].tokens
  after = jnp.pad(tokens[..., 1:], ((0, 0), (0, 0), (0, 1)))
  weight = ((after > 0) & there(batch)[..., None]).astype(jnp.float32)
  return after.reshape(len(tokens), -1), weight.reshape(len(tokens), -1)


def _each(values: Array, batch: Batch) -> Array:
  """[B,M] to [B,M*L]."""
  return jnp.repeat(values, batch.documents[TEXT].tokens.shape[-1], axis=1)


def mask_of_both(lengths: Array, queries: int, length: int, says: bool) -> IntervalMask:
  """Who sees whom among queries, a text and (if it `says`) the text again: itc and itg.

  Args:
    lengths: i32[n], of the texts.
    queries, length: K, and L slots of a text.
    says: whether the text stands there again.
  """
  read, slots = jnp.arange(length), jnp.arange(length)
  parts = [  # in the order of slots, each with its place among keys, which are t q d
    (length + jnp.arange(queries), length, length + queries),
    (read, 0, lengths[:, None]),
    (length + queries + slots, length, length + queries + slots + 1)]
  parts = parts if says else parts[:2]
  row = lambda part, size: jnp.broadcast_to(part, (*lengths.shape, size)).astype(jnp.int32)
  index, lo, hi = (
    jnp.concatenate([row(part[field], len(part[0])) for part in parts], axis=1)
    for field in range(3))
  return IntervalMask(lo, hi, k_index=index)


def voice(config: ConfigDict) -> str:
  """The strategy that says what itg has taught, "" without it."""
  return "blip2_itg" if "itg" in config.fusion.objectives else ""


def check(config: ConfigDict) -> None:
  """Raises UsageError for a connector that reads no words."""
  if config.connector.name != "qformer" or not config.connector.vocab_size:
    raise UsageError(f"config.fusion.name '{config.fusion.name}' has a Q-Former that reads words; "
                     "set config.connector.name='qformer' and config.connector.vocab_size")


class Model(Configured):
  """Tower, Q-Former and the heads of its three objectives."""

  def setup(self):
    config, dtypes = self.config, precision(self.config)
    check(config)
    self.exact = dataclasses.replace(dtypes, compute=jnp.float32)
    project = lambda size: Linear((size,), ("embed", "norm"), True, self.exact)
    self.tower = find_tower(config).Model(config.tower, config.attention, dtypes)
    self.connector = qformer.Model(config.connector, config.fusion.width, dtypes)
    self.image_projection = project(config.fusion.width)
    self.text_projection = project(config.fusion.width)
    self.match = project(2)
    if "itg" in config.fusion.objectives:
      self.caption = Caption(config.connector, self.exact)
    self.temperature = parameter(self, "temperature", initializers.constant(0.07), (), (),
                                 dtypes.param)

  def __call__(self, batch: Batch, *, rng: Array | None = None, cache: Cache | None = None
               ) -> Bridged:
    """Embeds the pictures of a batch, its texts or both, and asks of both what is to be learned.

    Args:
      batch: media "images", documents "captions", or one of them.
      rng: draws the strangers of itm; None: the most similar.
      cache: unused, nothing is cached.

    Returns:
      Embeddings of E = config.fusion.width.
    """
    del cache
    wanted = self.config.fusion.objectives
    both = "images" in batch.media and TEXT in batch.documents
    features, x = self._features(batch), None
    image = text = matches = hidden = head = None
    if features is not None:
      queries = x = self.connector.ask(features.shape[0])
    if TEXT in batch.documents:
      tokens = batch.documents[TEXT].tokens
      words = jnp.asarray(tokens).reshape(-1, tokens.shape[-1])
      x, text = self._read(queries if both else None, words, features, both and "itg" in wanted)
      outer = tokens.shape[:2]
      text = unit(self.text_projection(text)).reshape(*outer, -1)
    else:
      x, _ = self.connector.read(x, None, features)
      outer = batch.media["images"].values.shape[:2]
    if features is not None:
      seen = x[:, : queries.shape[1]]
      image = unit(self.image_projection(seen)).reshape(*outer, *seen.shape[1:2], -1)
    scale = 1 / self.temperature.astype(jnp.float32)
    output = Bridged(image, text, scale)
    if both and "itm" in wanted:
      matches = self._compare(output, batch, features, words, rng).reshape(*outer, PAIRS, 2)
    if both and "itg" in wanted:
      hidden, head = self.caption(x[:, -tokens.shape[-1] :], self.connector.words)
      hidden = hidden.reshape(outer[0], -1, hidden.shape[-1])
    return dataclasses.replace(output, matches=matches, hidden=hidden, head=head)

  def matching(self, batch: Batch) -> Array:
    """The logits of not belonging together and of doing so of every pair as it is, f32[B,M,2].

    A batch of one picture shows it with every text.
    """
    tokens = batch.documents[TEXT].tokens
    words = jnp.asarray(tokens).reshape(-1, tokens.shape[-1])
    return self._match(self._features(batch), words).reshape(*tokens.shape[:2], 2)

  def _features(self, batch: Batch) -> Array | None:
    """The features f[N,P,D] of the pictures, if there are any."""
    if "images" not in batch.media:
      return None
    patches = self.tower(batch.media["images"].values).patches
    return patches.reshape(-1, *patches.shape[2:])

  def _read(self, queries: Array | None, words: Array, features: Array | None, says: bool
            ) -> tuple[Array, Array]:
    """The pass of itc and itg: f32[N,T,D], and of the texts the slot that stands for each."""
    length, lengths = words.shape[1], (words > 0).sum(1)
    places = jnp.broadcast_to(jnp.arange(length), words.shape)
    parts = [self.connector.spell(words, places)]
    count = 0 if queries is None else queries.shape[1]
    if queries is not None:
      parts.insert(0, queries)
    if says:
      start = self.config.fusion.start
      parts.append(self.connector.spell(words.at[:, 0].set(start), places))
    x = jnp.concatenate(parts, axis=1)
    x, _ = self.connector.read(x, mask_of_both(lengths, count, length, says), features)
    return x, x[:, count]

  def _match(self, features: Array, words: Array) -> Array:
    """f32[n,2], the logits of pairs of pictures f[n,P,D] and texts i32[n,L]."""
    features = jnp.broadcast_to(features, (*words.shape[:1], *features.shape[1:]))
    return self.match(self.connector.hear(words, (words > 0).sum(1), features)).mean(axis=1)

  def _compare(self, output: Bridged, batch: Batch, features: Array, words: Array,
               rng: Array | None) -> Array:
    """f32[N*3,2], the logits of every document's pairs."""
    text, image = strangers(output, batch, rng)
    row = jnp.arange(len(words))
    shown, told = jnp.stack([row, image, row], 1), jnp.stack([row, row, text], 1)
    return self._match(features[shown.reshape(-1)], words[told.reshape(-1)])


def strangers(output: Embeddings, batch: Batch, rng: Array | None) -> tuple[Array, Array]:
  """i32[N] the stranger among the texts for every picture, and among the pictures for every text.

  Drawn from the softmax of their logits (rng None: the largest). Where all texts are equal there is
  none, and what is returned counts for nothing (`weights`).
  """
  known = pairs(jax.lax.stop_gradient(output), batch)
  logits = jax.lax.stop_gradient(output.scale) * contrastive.cosines(known.image, known.text)
  logits = jnp.where(contrastive.strangers(known), logits, contrastive.NONE)
  if rng is None:
    return jnp.argmax(logits, axis=1), jnp.argmax(logits, axis=0)
  first, second = jax.random.split(rng)
  return jax.random.categorical(first, logits, axis=1), jax.random.categorical(
    second, logits, axis=0)


class Caption(nn.Module):
  """BERT's head (arXiv:1810.04805): a layer, a norm, the words' embedding, a bias for each.

  Attributes: `config.connector`, dtypes.
  """

  config: ConfigDict
  precision: Precision

  @nn.compact
  def __call__(self, x: Array, words: Array) -> tuple[Array, Array]:
    """f32[n,L,D] and the embedding f[V,D] to f32[n,L,D+1] and a head f32[D+1,V].

    The bias is a row of the head, read from a channel that is 1.
    """
    config = self.config
    y = Linear((config.slot_width,), ("embed", "mlp"), True, self.precision, name="linear")(x)
    y = LayerNorm(config.norm_eps, self.precision, name="norm")(activation(config.activation)(y))
    bias = parameter(self, "bias", initializers.zeros, (config.vocab_size,), ("vocab",),
                     self.precision.param)
    head = jnp.concatenate([words.T, bias[None]]).astype(jnp.float32)
    return jnp.concatenate([y, jnp.ones_like(y[..., :1])], axis=-1), head
