"""SimVLM: an encoder reads image and prefix, a decoder writes the suffix (arXiv:2108.10904).

Slots of the encoder see each other; slots of the decoder see all of the encoder and what was
written before them. Rows and columns of the encoder come first (i image, p prefix text, > the start
of the decoder, s suffix, predicted):

          i i i i p p > s s
        i 1 1 1 1 1 1 . . .
        i 1 1 1 1 1 1 . . .
        i 1 1 1 1 1 1 . . .
        i 1 1 1 1 1 1 . . .
        p 1 1 1 1 1 1 . . .
        p 1 1 1 1 1 1 . . .
        > 1 1 1 1 1 1 1 . .
        s 1 1 1 1 1 1 1 1 .
        s 1 1 1 1 1 1 1 1 1

The prefix (section 3.1, equation 3) always holds the images. After a prompt it ends where the first
predicted token stands; text that is all to be predicted, alone or behind an image, is cut at a
random length T_p, uniform over the text, a new one every epoch.

In fan-out documents every branch has its own prompt in the encoder and its own start in the
decoder (a, b prompts of two branches; c, d their answers):

          i i i i a a b b > c > d
        i 1 1 1 1 . . . . . . . .
        i 1 1 1 1 . . . . . . . .
        i 1 1 1 1 . . . . . . . .
        i 1 1 1 1 . . . . . . . .
        a 1 1 1 1 1 1 . . . . . .
        a 1 1 1 1 1 1 . . . . . .
        b 1 1 1 1 . . 1 1 . . . .
        b 1 1 1 1 . . 1 1 . . . .
        > 1 1 1 1 1 1 . . 1 . . .
        c 1 1 1 1 1 1 . . 1 1 . .
        > 1 1 1 1 . . 1 1 . . 1 .
        d 1 1 1 1 . . 1 1 . . 1 1

Positions are learned, for text and for the places of an image apart; attention between two places
of one image also has a learned bias for their offset in rows and columns. As published there is one
image: of several, the encoder is not told which came first.

No weights were published, so there is nothing to import (contract, 11): the stem is held to timm's
ResNet and the blocks to T5's.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers
from ml_collections import ConfigDict

from vlm_jax.core.batch import Batch, Media, Stream
from vlm_jax.core.document import Encoded
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import Cache, Output, Stage, find_llm, find_tower
from vlm_jax.core.layout import (
  Field,
  Layout,
  Slots,
  image_fields,
  mask_fields,
  stream_fields,
  write_slots,
)
from vlm_jax.core.precision import precision
from vlm_jax.core.typing import Array
from vlm_jax.fusion import concat
from vlm_jax.fusion.concat import order
from vlm_jax.fusion.prefix_lm import prefix_ends
from vlm_jax.nn.linear import parameter
from vlm_jax.nn.model import Configured
from vlm_jax.nn.relative import GridBias
from vlm_jax.ops.gather import take_rows

STAGES = (Stage("all", (".*",)),)  # trained from scratch, in one stage
ENCODER, STREAM = "encoder", "decoder"
BIASED = (ENCODER,)
START = 0  # the decoder's first token: padding, which no text contains


def axes(config: ConfigDict) -> dict[str, int]:
  """Capacities: slots of both sides, images, rows of the media table, documents."""
  return capacities(config, len(rows(config)))


def capacities(config: ConfigDict, places: int) -> dict[str, int]:
  """Those of `axes`, with so many rows of the media table an image."""
  data, decoder = config.data, decoder_capacity(config)
  return {ENCODER: data.tokens, STREAM: decoder, "images": data.images,
          "table": data.images * places, "documents": decoder}


def decoder_capacity(config: ConfigDict) -> int:
  """Slots of a row's decoder axis; as many as a text that fits the encoder takes, if not said."""
  return config.data.decoder_tokens or config.data.tokens + 1


def fields(config: ConfigDict) -> dict[str, Field]:
  """Two streams, the mask between them, one image axis; classes if a source fans out."""
  side, classes = config.tower.image_size, concat.has_classes(config)
  return (stream_fields(ENCODER, (), classes) | stream_fields(STREAM, ("lm",), classes)
          | mask_fields("cross", STREAM, ENCODER, classes) | image_fields(side, side))


def rows(config: ConfigDict) -> np.ndarray:
  """i32[K], the places of the tower's grid in reading order.

  Raises:
    UsageError: a connector that does not keep the grid.
  """
  height, width = find_tower(config).grid(config.tower)
  slots = concat.rows(config)
  if not np.array_equal(slots, np.arange(height * width)):
    raise UsageError(f"config.connector.name '{config.connector.name}' does not keep the tower's "
                     f"{height} x {width} grid, whose rows and columns '{config.fusion.name}' "
                     "compares; use 'linear' or 'mlp'")
  return slots


def layout(encoded: Encoded, config: ConfigDict, rng: np.random.Generator) -> Layout:
  """Gives the prefix to the encoder and the suffix to the decoder.

  Raises:
    UsageError: a source that the config does not have, branches without a "fan_out" source, or more
      tokens than there are slots or positions.
  """
  places = rows(config)
  slots = write_slots(encoded, places, lambda image: order(config, image))
  suffix = np.arange(len(slots)) >= cuts(slots, rng)
  return assemble(encoded, encoder_slots(slots, suffix), decoder_slots(slots, suffix), config,
                  len(places))


def assemble(encoded: Encoded, read: "Side", written: "Side", config: ConfigDict, places: int
             ) -> Layout:
  """The Layout of a document whose sides are known.

  Args:
    encoded: the document.
    read, written: the slots of the encoder and of the decoder.
    config: the whole config.
    places: rows of the media table an image.

  Raises:
    UsageError: as `layout`.
  """
  _check(encoded, read, written, config)
  source = concat.source_id(encoded, config)
  arrays = concat.image_arrays(encoded, config)
  for name, side in ((ENCODER, read), (STREAM, written)):
    length = len(side)
    arrays |= {f"streams/{name}/{field}": getattr(side, field)
               for field in ("tokens", "fill", "positions")}
    arrays |= {f"streams/{name}/segment_ids": np.ones(length, np.int32),
               f"streams/{name}/source_ids": np.full(length, source, np.int32)}
  arrays |= {f"streams/{STREAM}/targets": written.targets,
             f"streams/{STREAM}/loss_weights/lm": written.weight}
  # Branches are in order behind the trunk: what a branch may see of the encoder ends with its own.
  end = lambda side: np.searchsorted(read.branch, side.branch, side="right").astype(np.int32)
  after = np.arange(1, len(written) + 1, dtype=np.int32)
  for name, queries, keys, hi in ((ENCODER, read, read, end(read)),
                                  ("cross", written, read, end(written)),
                                  (STREAM, written, written, after)):
    arrays |= {f"masks/{name}/lo": np.zeros(len(queries), np.int32), f"masks/{name}/hi": hi}
    if concat.fans_out(encoded, config):
      arrays |= {f"masks/{name}/q_class": queries.branch, f"masks/{name}/k_class": keys.branch}
  images = len(encoded.images)
  sizes = {ENCODER: len(read), STREAM: len(written), "images": images,
           "table": images * places, "documents": 1}
  return Layout(arrays, sizes, encoded.source, encoded.key)


def cuts(slots: Slots, rng: np.random.Generator) -> np.ndarray:
  """i32[T], the first suffix slot of the slot's branch.

  Args:
    slots: the document in reading order.
    rng: draws T_p of a document whose text, behind its images, is all to be predicted.
  """
  length, index = len(slots), np.arange(len(slots))
  text = int(np.flatnonzero(slots.image)[-1]) + 1 if slots.image.any() else 0
  alone = not slots.branch.any() and length - text > 1 and not (slots.image[:text] == 0).any()
  if alone and slots.predicted[text + 1 :].all():  # the token that opens a text never is
    return np.full(length, rng.integers(text, length), np.int32)
  ends = prefix_ends(slots)
  cut = np.zeros(length, np.int32)
  for branch in np.unique(slots.branch):
    mine = slots.branch == branch
    first = index[mine][0]
    # A branch that begins with its answer has no prefix, and prefix_ends marks nothing.
    cut[mine] = max(ends[mine].max(), first, 0 if branch else text)
  return cut


@dataclasses.dataclass(frozen=True)
class Side:
  """The slots of one side: as `core.layout.Slots`, whose fields these are."""

  tokens: np.ndarray
  fill: np.ndarray
  positions: np.ndarray
  branch: np.ndarray
  targets: np.ndarray
  weight: np.ndarray

  def __len__(self) -> int:
    return len(self.tokens)


def encoder_slots(slots: Slots, suffix: np.ndarray) -> Side:
  """The prefix of every branch; positions count tokens and go on from the trunk in each branch."""
  keep = np.flatnonzero(~suffix)
  token, branch = slots.image[keep] == 0, slots.branch[keep]
  positions = np.zeros(len(keep), np.int32)
  trunk = int(token[branch == 0].sum())
  for number in np.unique(branch):
    mine = token & (branch == number)
    positions[mine] = np.arange(mine.sum()) + (trunk if number else 0)
  nothing = np.zeros(len(keep), np.int32)
  return Side(slots.tokens[keep], slots.fill[keep], positions, branch, nothing,
              nothing.astype(np.float32))


def decoder_slots(slots: Slots, suffix: np.ndarray) -> Side:
  """The start and the suffix of every branch; a trunk that only asks has neither."""
  tokens, branch, positions, weight, targets = [], [], [], [], []
  trunk = 0
  for number in np.unique(slots.branch):
    mine = np.flatnonzero(suffix & (slots.branch == number))
    if number == 0 and slots.branch.any() and not len(mine):
      continue
    first = trunk if number else 0
    tokens.append(np.append(START, slots.tokens[mine]))
    # What stands first in a document has nothing before it to be predicted from.
    weight.append(np.append(slots.predicted[mine] & (mine > 0), False))
    targets.append(np.append(slots.tokens[mine], 0))
    branch.append(np.full(len(mine) + 1, number))
    positions.append(first + np.arange(len(mine) + 1))
    trunk = trunk if number else len(mine) + 1
  tokens, branch, positions, targets = (
    np.concatenate(part).astype(np.int32) for part in (tokens, branch, positions, targets))
  fill = np.full(len(tokens), -1, np.int32)
  return Side(tokens, fill, positions, branch, targets, np.concatenate(weight).astype(np.float32))


def losses(output: Output, batch: Batch, config: ConfigDict) -> dict[str, Array]:
  """lm: the next-token loss of the suffix, sums f32[sources]; equation 3."""
  return concat.lm_losses(output, batch.streams[STREAM], config)


def weights(batch: Batch, config: ConfigDict) -> dict[str, Array]:
  """lm: the number of predicted tokens, f32[sources]."""
  return concat.lm_weights(batch.streams[STREAM], config)


class Model(Configured):
  """Convolutional stem, linear connector, and an encoder-decoder language model."""

  @nn.compact
  def __call__(
    self, batch: Batch, *, rng: Array | None = None, cache: Cache | None = None
  ) -> Output:
    """Runs a packed batch.

    Args:
      batch: streams "encoder" (not again once `cache` has its keys) and "decoder", their masks and
        "cross"; media "images" unless every slot is a token.
      rng: unused, the model has no randomness.
      cache: keys and values of the slots before these; see `llm.encoder_decoder.Model`.

    Returns:
      hidden f[B,T,D], one per slot of the decoder.

    Raises:
      UsageError: the language model is not an encoder-decoder, or cannot execute a mask.
    """
    del rng
    config, dtypes = self.config, precision(self.config)
    language = find_llm(config, "encoder-decoder", batch.masks)
    llm = language.Model(config.llm, config.attention, dtypes, name="llm")
    memory = None
    if ENCODER in batch.streams:
      stream = batch.streams[ENCODER]
      x, bias = llm.embed(stream.tokens, stream.positions, ENCODER), None
      if "images" in batch.media:
        x, bias = self._see(x, stream, batch.media["images"])
      memory = llm.encode(x, stream.positions, batch.masks[ENCODER], bias)
    stream = batch.streams[STREAM]
    x = llm.embed(stream.tokens, stream.positions, STREAM)
    return llm(x, stream.positions, memory, batch.masks[STREAM], batch.masks["cross"], cache)

  def _see(self, x: Array, stream: Stream, media: Media) -> tuple[Array, Array]:
    """Puts image rows with their positions into x f[B,S,D]; and the bias f32[B,H,S,S]."""
    config, dtypes = self.config, precision(self.config)
    grid = find_tower(config).grid(config.tower)
    table = concat.media_table(media, config)
    places, width = grid[0] * grid[1], config.llm.width
    positions = parameter(self, "image_positions", initializers.normal(width**-0.5),
                          (places, width), ("position", "embed"), dtypes.param)
    table += jnp.tile(positions.astype(table.dtype), (table.shape[1] // places, 1))
    there = stream.fill >= 0
    x = jnp.where(there[..., None], take_rows(table, stream.fill), x)
    image = jnp.where(there, stream.fill // places, -1)
    place = jnp.where(there, stream.fill % places, -1)
    return x, GridBias(config.llm.heads, grid, dtypes, name="image_bias")(image, place)


def _check(encoded: Encoded, read: Side, written: Side, config: ConfigDict) -> None:
  """Refuses a document that is longer than a side, before packing looks for room."""
  capacity = decoder_capacity(config)
  if len(written) > capacity:
    raise UsageError(f"document {encoded.key} takes {len(written)} slots of the decoder, which has "
                     f"{capacity} in a row; raise config.data.decoder_tokens or lower "
                     "config.data.window")
  for side in (read, written):
    concat.check_positions(encoded, side.positions, config)
