"""What a model sees: a pytree of static shapes, B packed rows."""

import dataclasses
import functools

import jax
import numpy as np

from vlm_jax.core.layout import Field
from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.tree import unflatten
from vlm_jax.core.typing import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
  """One packed text axis, T slots a row.

  Attributes:
    tokens: i32[B,T].
    fill: i32[B,T], row of the media table that fills the slot, -1 the token embedding, -2 a row
      that the strategy learned.
    positions: i32[B,T] for position embeddings; restart per document.
    segment_ids: i32[B,T], 1.. per document of the row, 0 padding.
    source_ids: i32[B,T], index of the data source.
    targets: i32[B,T], the token each slot predicts; None in a stream that predicts nothing.
    loss_weights: objective to f32[B,T].
  """

  tokens: Array
  fill: Array
  positions: Array
  segment_ids: Array
  source_ids: Array
  targets: Array | None = None
  loss_weights: dict[str, Array] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Media:
  """One image axis of N slots.

  Attributes:
    values: u8[B,N,Height,Width,3].
    segment_ids: i32[B,N], 0: empty.
    grid: i32[B,N,2], rows and columns of the patches of each image, which then stand in `values`
      one behind the other, and padding behind them; None: every image fills its square.
    words: i32[B,N,L], what a connector that reads is told about each image, in ids of its own
      tokenizer, -1 behind the last; None: it is told nothing.
    time: i32[B,N], the number of each frame in its video, 0 of an image, -1 of an empty slot: every
      0 begins an item; None: every slot is an item.
  """

  values: Array
  segment_ids: Array
  grid: Array | None = None
  words: Array | None = None
  time: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Texts:
  """The texts of the M documents of a row, where documents are compared.

  Attributes:
    tokens: i32[B,M,L], texts of fixed length, 0 behind the end of one; None: they are in streams.
    segment_ids: i32[B,M], 1.. per document of the row, 0 where there is no text to compare.
    source_ids: i32[B,M], index of the data source.
    digests: i32[B,M,2], of the tokens: texts are equal where these are.
    slots: i32[B,M], the slot of a stream that stands for the text, -1: none; None: `tokens` do.
    images: i32[B,M], which image belongs to it, -1: none; None: the m-th to the m-th.
  """

  tokens: Array | None
  segment_ids: Array
  source_ids: Array
  digests: Array
  slots: Array | None = None
  images: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """Streams, media and masks by name, and what is one per document."""

  streams: dict[str, Stream]
  media: dict[str, Media]
  masks: dict[str, IntervalMask]
  documents: dict[str, Texts] = dataclasses.field(default_factory=dict)


def from_flat(flat: dict[str, Array]) -> Batch:
  """Builds a Batch from paths to arrays: "streams/text/tokens", "media/images/values", ..."""
  tree = unflatten(flat)
  make = lambda cls, nodes: {name: cls(**node) for name, node in nodes.items()}
  return Batch(
    streams=make(Stream, tree.get("streams", {})),
    media=make(Media, tree.get("media", {})),
    masks=make(IntervalMask, tree.get("masks", {})),
    documents=make(functools.partial(Texts, tokens=None), tree.get("documents", {})),
  )


def empty(fields: dict[str, Field], axes: dict[str, int], rows: int) -> dict[str, np.ndarray]:
  """Flat arrays of `rows` empty rows: every field at its pad value, [rows, capacity, ...]."""
  return {
    path: np.full((rows, axes[field.axis], *field.shape), field.pad, field.dtype)
    for path, field in fields.items()
  }
