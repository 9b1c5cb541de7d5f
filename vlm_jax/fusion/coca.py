"""CoCa: a captioner whose first half also compares pictures with texts (arXiv:2205.01917).

    picture --> tower --> pooler of n queries ------------------.
                              '-> pooler of one --> projection   '-> second half --> caption
                                                       cosine         |
    text ---------------------> first half ---------------------------'
                                    '-> class token --> projection

The second half reads all pooled rows of the document's picture in every layer, the first half none
(section 3.2). So a class token that stands behind the text in the first half is a text's embedding.
It sees its text and itself, and nothing sees it (s text, > the class token):

          s s s s >
        s 1 . . . .
        s 1 1 . . .
        s 1 1 1 . .
        s 1 1 1 1 .
        > 1 1 1 1 1

`config.fusion.pooling` says what the one vector of a picture is: "cascade", of a second pooler that
reads the rows of the first, as published; "parallel", of one that reads the tower; "shared", the
first row itself, which captions then do not see. The last is what OpenCLIP released. Its mask is
moved by one slot as well, which `config.fusion.compat` "open_clip" repeats: of a text shorter than
config.llm.positions the class token sees one slot of padding (z) and not itself.

          s s s s z >
        s 1 . . . . .
        s 1 1 . . . .
        s 1 1 1 . . .
        s 1 1 1 1 . .
        z 1 1 1 1 1 .
        > 1 1 1 1 1 .

A caption that is too long keeps its last token, as CLIP's. Documents may be of text alone, or have
several pictures, which all their text sees; a pair to compare has one. What compares documents is
exempt from what strategies promise of sums (1, 2 and 7), as in `fusion/clip.py`.
"""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers
from ml_collections import ConfigDict

from vlm_jax.core import mask as masks
from vlm_jax.core.batch import Batch
from vlm_jax.core.document import Encoded, Pixels, Tokens
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.fusion import (
  Cache,
  Embeddings,
  Output,
  Stage,
  embeddings_of,
  find_connector,
  find_llm,
  find_tower,
)
from vlm_jax.core.layout import (
  IGNORE,
  LEARNED,
  Field,
  Layout,
  image_fields,
  mask_fields,
  stream_fields,
  text_fields,
)
from vlm_jax.core.mask import NEVER, IntervalMask
from vlm_jax.core.precision import precision
from vlm_jax.core.typing import Array
from vlm_jax.fusion import clip, concat
from vlm_jax.fusion.clip import CEILING, GLOBAL, TEXT, at_most, contrast, digest, unit
from vlm_jax.fusion.concat import STREAM
from vlm_jax.nn import pool
from vlm_jax.nn.linear import Linear, parameter
from vlm_jax.nn.model import Configured
from vlm_jax.nn.norms import LayerNorm
from vlm_jax.ops.contrastive import Pairs, softmax_losses
from vlm_jax.ops.gather import take_rows

__all__ = ["GLOBAL", "STREAM"]

STAGES = (Stage("all", (".*",)),)  # from scratch, in one stage (section 3.3)
EMBEDS = True
SUMMARY = "summary"  # the stream of what stands behind texts in the first half
POOLINGS = ("cascade", "parallel", "shared")
COMPATS = ("", "open_clip")


def axes(config: ConfigDict) -> dict[str, int]:
  """Capacities: text slots, what stands behind texts, pictures, their rows, documents."""
  images = config.data.images
  return {STREAM: config.data.tokens, SUMMARY: images * (2 if config.fusion.compat else 1),
          "images": images, "table": images * len(rows(config)), "documents": images}


def fields(config: ConfigDict) -> dict[str, Field]:
  """Text and what stands behind it, who reads what, pictures, and what is compared."""
  side = config.tower.image_size
  return (stream_fields(STREAM, ("lm",), False) | stream_fields(SUMMARY, (), False)
          | mask_fields("reads", SUMMARY, STREAM, False)
          | mask_fields("cross", STREAM, "table", False)
          | image_fields(side, side) | text_fields(TEXT, stream=SUMMARY))


def rows(config: ConfigDict) -> np.ndarray:
  """i32[K], the rows of one picture that captions see.

  Raises:
    UsageError: an unknown pooling, or one that leaves none.
  """
  check(config)
  height, width = find_tower(config).grid(config.tower)
  slots = find_connector(config).slots(config.connector, 1, height, width)
  return slots[: len(slots) - 1] if config.fusion.pooling == "shared" else slots


def uses(config: ConfigDict, path: str) -> dict[str, int] | None:
  """A second pooler has one query; the second half has no summaries, and reads pooled rows."""
  top, _, inner = path.partition("/")
  image, pooled = "images/images", len(rows(config))
  if top == "contrast_pool":
    patches = math.prod(find_tower(config).grid(config.tower))
    features = pooled if config.fusion.pooling == "cascade" else patches
    return {image: pool.uses(inner, 1, features)}
  if top == "pooled_norm":
    return {image: pooled + 1}
  if top == "llm" and inner.startswith("second/"):
    read = {"key", "value", "memory_norm"} & set(inner.split("/")) and "attention" not in inner
    return {image: pooled} if read else {f"tokens/{STREAM}": 1}
  return clip.uses(config, path)


def check(config: ConfigDict) -> None:
  """Raises UsageError for fields of `config.fusion` and `config.tower` that cannot be."""
  for field, known in (("pooling", POOLINGS), ("compat", COMPATS)):
    if config.fusion[field] not in known:
      raise UsageError(f"config.fusion.{field} is '{config.fusion[field]}'; "
                       f"{nearest(config.fusion[field], known)}")
  if config.tower.pool != "none":
    raise UsageError(f"config.tower.pool is '{config.tower.pool}', but config.fusion.name "
                     f"'{config.fusion.name}' pools by config.connector; set it to 'none'")


def order(config: ConfigDict, image: Pixels) -> np.ndarray:
  """i32[K], as `rows`.

  Raises:
    UsageError: an image in tiles, or with a grid of its own, or a video.
  """
  concat.refuse_grid(config, image)
  concat.refuse_tiles(config, image)
  concat.refuse_video(config, image)
  return rows(config)


def layout(encoded: Encoded, config: ConfigDict, rng: np.random.Generator) -> Layout:
  """The text in its stream, its class token in another, and all rows of its pictures before it.

  Raises:
    UsageError: branches, a text alone that is too long, an image in tiles or with a grid of its
      own, or a source that the config does not have.
  """
  del rng  # nothing here is random
  ids, predicted = caption(encoded, config)
  length, images = len(ids), len(encoded.images)
  seen = sum(len(order(config, part)) for part in encoded.parts if isinstance(part, Pixels))
  source, causal = concat.source_id(encoded, config), masks.causal(length)
  many = lambda count, value: np.full(count, value, np.int32)
  behind = tail(length, config)
  token = np.flatnonzero(behind["fill"] == LEARNED)
  pair = images == 1 and length > 0
  arrays = concat.image_arrays(encoded, config) | {
    f"streams/{STREAM}/tokens": ids,
    f"streams/{STREAM}/targets": np.append(ids, many(1, 0))[1:],
    f"streams/{STREAM}/loss_weights/lm": np.append(predicted, False)[1:].astype(np.float32),
    f"streams/{STREAM}/fill": many(length, IGNORE),
    f"streams/{STREAM}/positions": np.arange(length, dtype=np.int32),
    f"masks/{STREAM}/lo": causal.lo, f"masks/{STREAM}/hi": causal.hi,
    "masks/cross/lo": many(length, 0), "masks/cross/hi": many(length, seen),
    **{f"streams/{SUMMARY}/{name}": behind[name] for name in ("tokens", "fill", "positions")},
    **{f"masks/{SUMMARY}/{name}": behind[name] for name in ("lo", "hi")},
    "masks/reads/lo": many(len(behind["fill"]), 0),
    "masks/reads/hi": many(len(behind["fill"]), length),
    f"documents/{TEXT}/slots": token if len(token) else many(1, -1),
    f"documents/{TEXT}/images": many(1, 0 if images == 1 else -1),
    f"documents/{TEXT}/segment_ids": many(1, pair),
    f"documents/{TEXT}/source_ids": many(1, source),
    f"documents/{TEXT}/digests": digest(ids)[None],
  }
  for stream, count in ((STREAM, length), (SUMMARY, len(behind["fill"]))):
    arrays |= {f"streams/{stream}/segment_ids": many(count, 1),
               f"streams/{stream}/source_ids": many(count, source)}
  sizes = {STREAM: length, SUMMARY: len(behind["fill"]), "images": images, "table": seen,
           "documents": 1}
  return Layout(arrays, sizes, encoded.source, encoded.key)


def caption(encoded: Encoded, config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
  """All text of a document: ids i32[n], n at most config.llm.positions, and what is predicted."""
  texts = [part for part in encoded.parts if isinstance(part, Tokens)]
  if encoded.branched:
    raise UsageError(f"document {encoded.key} has branches, which config.fusion.name "
                     f"'{config.fusion.name}' does not read; set the form of source "
                     f"'{encoded.source}' to one without, as 'caption'")
  join = lambda name, dtype: np.concatenate(
    [np.zeros(0, dtype), *(getattr(part, name) for part in texts)]).astype(dtype)
  ids, predicted, most = join("ids", np.int32), join("loss", bool), config.llm.positions
  if len(ids) > most:
    if not encoded.images:
      raise UsageError(f"document {encoded.key} has {len(ids)} tokens but config.llm.positions is "
                       f"{most}; raise it or lower config.data.window")
    ids, predicted = (np.append(part[: most - 1], part[-1]) for part in (ids, predicted))
  return ids, predicted


def tail(length: int, config: ConfigDict) -> dict[str, np.ndarray]:
  """What stands behind a text of so many tokens in the first half, nothing if there are none.

  Its last slot is the class token; its first is the one that `lo` and `hi` let all of it see.
  """
  padded = bool(config.fusion.compat) and length < config.llm.positions
  count = 0 if not length else 2 if padded else 1
  of = lambda *values: np.array(values[len(values) - count :], np.int32)
  return {"tokens": of(0, 0), "fill": of(IGNORE, LEARNED),
          "positions": of(length, config.llm.positions), "lo": of(0, 0), "hi": of(1, 1)}


def losses(output: Output | Embeddings, batch: Batch, config: ConfigDict) -> dict[str, Array]:
  """Sums f32[sources], equations 1 and 2 of section 3.2.

  contrast: as CLIP's over the global batch. lm: the caption's; not where embeddings alone are
  given.
  """
  found, texts = embeddings_of(output), batch.documents[TEXT]
  flat = lambda array: array.reshape(-1, *array.shape[2:])
  pairs = Pairs(flat(found.image), flat(found.text), flat(texts.segment_ids > 0),
                flat(texts.digests))
  sums = contrast(softmax_losses(pairs, found.scale), batch, config)
  if isinstance(output, Embeddings):
    return sums
  return sums | concat.lm_losses(output, batch.streams[STREAM], config)


def weights(batch: Batch, config: ConfigDict) -> dict[str, Array]:
  """contrast: the number of pairs; lm: of predicted tokens; f32[sources]."""
  there = batch.documents[TEXT].segment_ids > 0
  return (contrast(there.astype(jnp.float32).reshape(-1), batch, config)
          | concat.lm_weights(batch.streams[STREAM], config))


class Model(Configured):
  """Tower, poolers, and a language model of two halves."""

  @nn.compact
  def __call__(
    self, batch: Batch, *, rng: Array | None = None, cache: Cache | None = None
  ) -> Output:
    """Runs a packed batch.

    Args:
      batch: stream "text" with its masks, unless only pictures are embedded; media "images", unless
        there are none; stream "summary" and documents "captions" where texts are embedded.
      rng: unused, the model has no randomness.
      cache: keys and values of the slots before these, see `llm.two_halves.Model`; with one, no
        text is embedded.

    Returns:
      hidden f[B,T,D] of the text (None without), and embeddings of E = config.fusion.width: with
      documents one each, else one per picture.

    Raises:
      UsageError: fields that cannot be, or a language model of another kind.
    """
    del rng
    config, dtypes = self.config, precision(self.config)
    check(config)
    project = lambda name, x: unit(
      Linear((config.fusion.width,), ("embed", "norm"), False, dtypes, name=name)(x))
    llm = find_llm(config, "two halves").Model(config.llm, config.attention, dtypes, name="llm")
    scale = parameter(self, "logit_scale", initializers.constant(math.log(1 / 0.07)), (), (),
                      dtypes.param)
    scale = jnp.exp(at_most(scale.astype(jnp.float32), CEILING))
    texts, image, table = batch.documents.get(TEXT), None, None
    if "images" in batch.media:
      table, image = self._see(batch.media["images"].values)
      image = image if texts is None else take_rows(image, texts.images)
      image = project("image_projection", image)
    if STREAM not in batch.streams:
      return Output(None, None, embeddings=Embeddings(image, None, scale))
    x, mask, text = self._embed(llm, batch.streams[STREAM]), batch.masks[STREAM], None
    if cache is None and SUMMARY in batch.streams:
      slots, behind = x.shape[1], self._embed(llm, batch.streams[SUMMARY])
      both = joined(mask, batch.masks["reads"], batch.masks[SUMMARY])
      x, columns = llm.read(jnp.concatenate([x, behind], axis=1), both)
      text = project("text_projection", llm.summary(take_rows(x[:, slots:], texts.slots)))
      x = x[:, :slots]
    else:
      x, columns = llm.read(x, mask, cache)
    if table is None and (cache is None or cache.memory is None):
      table = jnp.zeros((x.shape[0], 1, x.shape[2]), x.dtype)  # which nothing sees
    output = llm(x, table, mask, batch.masks["cross"], cache, columns)
    return dataclasses.replace(output, embeddings=Embeddings(image, text, scale))

  def _embed(self, llm: nn.Module, stream) -> Array:
    return llm.embed(stream.tokens, stream.positions, stream.fill)

  def _see(self, values: Array) -> tuple[Array, Array]:
    """Pixels u8[B,N,Height,Width,3] to the rows that captions see f[B,R,D], and one f[B,N,D]."""
    config, dtypes, tower = self.config, precision(self.config), find_tower(self.config)
    width, poolers = config.llm.width, config.connector
    features = tower.Model(config.tower, config.attention, dtypes, name="tower")(values)
    x = features.patches
    table = find_connector(config).Model(poolers, width, dtypes, name="connector")(
      x, tower.grid(config.tower))
    if config.fusion.pooling == "shared":
      table = LayerNorm(poolers.norm_eps, dtypes, name="pooled_norm")(table)
      image, table = table[:, :, 0], table[:, :, 1:]
    else:
      pooler = pool.AttentionPool(1, width, poolers.heads, poolers.norm_eps, dtypes,
                                  name="contrast_pool")
      image = pooler(table if config.fusion.pooling == "cascade" else x)[:, :, 0]
    return table.reshape(table.shape[0], -1, width), image


def joined(text: IntervalMask, reads: IntervalMask, own: IntervalMask) -> IntervalMask:
  """The mask of T text slots and, behind them, what stands behind texts.

  Text keys have the even indices. The one slot of a tail that is seen has the odd index behind the
  last of its text, so its own tail sees it and no text does.

  Args:
    text: of text with itself.
    reads: of tails with text.
    own: of tails with tails, at most one slot each.
  """
  slots = jnp.arange(own.num_queries, dtype=jnp.int32)
  seen = (own.lo[..., :, None] <= slots) & (slots < own.hi[..., :, None])
  index = jnp.where(seen, 2 * reads.hi[..., :, None] - 1, NEVER).min(axis=-2)
  even = 2 * jnp.arange(text.num_queries, dtype=jnp.int32)
  behind = lambda first, second: jnp.concatenate(
    [jnp.broadcast_to(first, (*second.shape[:-1], first.shape[-1])), second], axis=-1)
  return IntervalMask(behind(2 * text.lo, 2 * reads.lo), behind(2 * text.hi - 1, 2 * reads.hi),
                      k_index=behind(even, index))
