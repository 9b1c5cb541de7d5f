"""LLaVA: image tokens take their places among the text tokens (arXiv:2304.08485, section 4.1).

One decoder-only language model reads both. `config.fusion.image_attention` says who sees whom
inside an image; text is causal (t text, i the four slots of one image).

    causal, as published:              bidirectional:

          t i i i i t t                      t i i i i t t
        t 1 . . . . . .                    t 1 . . . . . .
        i 1 1 . . . . .                    i 1 1 1 1 1 . .
        i 1 1 1 . . . .                    i 1 1 1 1 1 . .
        i 1 1 1 1 . . .                    i 1 1 1 1 1 . .
        i 1 1 1 1 1 . .                    i 1 1 1 1 1 . .
        t 1 1 1 1 1 1 .                    t 1 1 1 1 1 1 .
        t 1 1 1 1 1 1 1                    t 1 1 1 1 1 1 1

Fan-out documents (form "fan_out" of a source) ask several questions about one trunk; a branch sees
the trunk and itself (a, b the tokens of two branches):

          i i i i a a b b
        i 1 . . . . . . .
        i 1 1 . . . . . .
        i 1 1 1 . . . . .
        i 1 1 1 1 . . . .
        a 1 1 1 1 1 . . .
        a 1 1 1 1 1 1 . .
        b 1 1 1 1 . . 1 .
        b 1 1 1 1 . . 1 1
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core import mask as masks
from vlm_jax.core.batch import Batch, Media, Stream
from vlm_jax.core.document import Encoded, Pixels
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.fusion import Cache, Output, Stage, find_connector, find_llm, find_tower
from vlm_jax.core.layout import Field, Layout, Slots, image_fields, stream_fields, write_slots
from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.precision import precision
from vlm_jax.core.typing import Array
from vlm_jax.nn.model import Configured
from vlm_jax.ops import losses as loss_ops
from vlm_jax.ops.gather import take_rows

STAGES = (
  Stage("all", (".*",)),
  Stage("projector", ("connector/.*",)),  # LLaVA's first stage: aligns the features
  Stage("finetune", ("connector/.*", "llm/.*")),  # its second: the tower stays as it is
)
STREAM = "text"
IMAGE_ATTENTION = ("causal", "bidirectional")
FAN_OUT = "fan_out"  # the form of sources whose documents have branches


def axes(config: ConfigDict) -> dict[str, int]:
  """Capacities: text slots, images, rows of the media table, documents (as many as slots)."""
  images, tokens = config.data.images, config.data.tokens
  return {"text": tokens, "images": images, "table": images * len(rows(config)),
          "documents": tokens}


def fields(config: ConfigDict) -> dict[str, Field]:
  """One text stream with one objective, one image axis; classes if a source fans out."""
  side = config.tower.image_size
  return stream_fields(STREAM, ("lm",), has_classes(config)) | image_fields(side, side)


def rows(config: ConfigDict) -> np.ndarray:
  """i32[K], the connector's slots for the tower's grid.

  Raises:
    UsageError: a connector that names a row twice.
  """
  height, width = find_tower(config).grid(config.tower)
  slots = find_connector(config).slots(config.connector, 1, height, width)
  if len(np.unique(slots)) != len(slots):
    raise UsageError(f"config.connector.name '{config.connector.name}' names a feature row twice; "
                     f"'{config.fusion.name}' fills every slot from a row of its own")
  return slots


def order(config: ConfigDict, image: Pixels) -> np.ndarray:
  """i32[K], the fill of one image's slots: its rows.

  Raises:
    UsageError: an image in tiles, or with a grid of its own, or a video.
  """
  refuse_grid(config, image)
  refuse_tiles(config, image)
  refuse_video(config, image)
  return rows(config)


def refuse_grid(config: ConfigDict, image: Pixels) -> None:
  """Raises UsageError for an image with a grid of its own."""
  if image.grid:
    raise UsageError(f"config.data.decode.fit 'naflex' gives images grids of their own, which "
                     f"config.fusion.name '{config.fusion.name}' does not read; use another fit or "
                     "'siglip'")


def refuse_tiles(config: ConfigDict, image: Pixels) -> None:
  """Raises UsageError for an image in tiles."""
  if image.tiles:
    raise UsageError(f"config.data.decode.grids cuts images into tiles, which config.fusion.name "
                     f"'{config.fusion.name}' does not read; set it to () or use 'llava_next'")


def refuse_video(config: ConfigDict, image: Pixels) -> None:
  """Raises UsageError for a video."""
  if image.later is not None:
    raise UsageError(f"a document has a video, whose frames config.fusion.name "
                     f"'{config.fusion.name}' does not read together; give it frames as images of "
                     "their own, or use 'flamingo'")


def layout(encoded: Encoded, config: ConfigDict, rng: np.random.Generator) -> Layout:
  """Writes the document out in reading order under the mask of `image_attention`.

  Raises:
    UsageError: an unknown image_attention or source, or a fan-out document without its form.
  """
  del rng  # nothing here is random
  slots = write_slots(encoded, rows(config), lambda image: order(config, image))
  attends = config.fusion.image_attention
  if attends not in IMAGE_ATTENTION:
    raise UsageError(f"config.fusion.image_attention is '{attends}'; "
                     f"{nearest(attends, IMAGE_ATTENTION)}")
  mask = masks.causal(len(slots))
  if attends == "bidirectional":
    mask = masks.see_until(mask, image_ends(slots))
  return assemble(encoded, slots, mask, config)


def image_ends(slots: Slots) -> np.ndarray:
  """i32[T], the end of the image that a slot belongs to, 0 at tokens."""
  ends = np.zeros(len(slots), np.int32)
  for number in range(1, slots.image.max(initial=0) + 1):
    where = np.flatnonzero(slots.image == number)
    ends[where] = where[-1] + 1
  return ends


def assemble(encoded: Encoded, slots: Slots, mask: IntervalMask, config: ConfigDict) -> Layout:
  """The Layout of a document whose slots and mask (without classes) are known.

  Branches take the one class axis of the mask: a fusion that needs classes for something else
  cannot fan out.

  Raises:
    UsageError: a source that the config does not have, branches without a "fan_out" source, or more
      positions than the language model has learned.
    ValueError: a mask that already uses its classes, and branches.
  """
  check_positions(encoded, slots.positions, config)
  length, images = len(slots), encoded.squares
  text, mask_path = f"streams/{STREAM}", f"masks/{STREAM}"
  arrays = {
    f"{text}/tokens": slots.tokens,
    f"{text}/targets": slots.targets,
    f"{text}/fill": slots.fill,
    f"{text}/positions": slots.positions,
    f"{text}/segment_ids": np.ones(length, np.int32),
    f"{text}/source_ids": np.full(length, source_id(encoded, config), np.int32),
    f"{text}/loss_weights/lm": slots.weight,
    f"{mask_path}/lo": mask.lo,
    f"{mask_path}/hi": mask.hi,
  }
  if mask.q_class is not None or mask.k_class is not None:
    raise ValueError(f"config.fusion.name '{config.fusion.name}': the mask has one class axis, and "
                     "both the strategy's own classes and fan-out branches want it")
  if fans_out(encoded, config):
    arrays |= {f"{mask_path}/q_class": slots.branch, f"{mask_path}/k_class": slots.branch}
  arrays |= image_arrays(encoded, config)
  sizes = {"text": length, "images": len(images), "table": len(images) * len(rows(config)),
           "documents": 1}
  return Layout(arrays, sizes, encoded.source, encoded.key)


def check_positions(encoded: Encoded, positions: np.ndarray, config: ConfigDict) -> None:
  """Raises UsageError for positions i32[T] behind the last that the language model has learned."""
  longest = 1 + int(positions.max(initial=-1))
  if config.llm.positions and longest > config.llm.positions:
    raise UsageError(f"document {encoded.key} has {longest} positions but config.llm.positions is "
                     f"{config.llm.positions}; raise it or lower config.data.window")


def image_arrays(encoded: Encoded, config: ConfigDict) -> dict[str, np.ndarray]:
  """The arrays of the media axis "images"."""
  images, side = encoded.squares, config.tower.image_size
  values = np.stack(images) if images else np.zeros((0, side, side, 3), np.uint8)
  return {"media/images/values": values,
          "media/images/segment_ids": np.ones(len(images), np.int32)}


def losses(output: Output, batch: Batch, config: ConfigDict) -> dict[str, Array]:
  """lm: the next-token loss of predicted tokens, sums f32[sources]."""
  return lm_losses(output, batch.streams[STREAM], config)


def weights(batch: Batch, config: ConfigDict) -> dict[str, Array]:
  """lm: the number of predicted tokens, f32[sources]."""
  return lm_weights(batch.streams[STREAM], config)


def lm_losses(output: Output, stream: Stream, config: ConfigDict) -> dict[str, Array]:
  """lm: the next-token loss of the predicted tokens of the stream that speaks, f32[sources]."""
  return {"lm": loss_ops.cross_entropy_sums(
    output.hidden, output.head, stream.targets, stream.loss_weights["lm"], stream.source_ids,
    len(config.data.sources), soft_cap=output.soft_cap,
  )}


def lm_weights(stream: Stream, config: ConfigDict) -> dict[str, Array]:
  """lm: the number of predicted tokens of the stream that speaks, f32[sources]."""
  count = len(config.data.sources)
  return {"lm": loss_ops.source_sums(stream.loss_weights["lm"], stream.source_ids, count)}


class Model(Configured):
  """Vision tower, connector, and the language model that reads the result among its tokens."""

  @nn.compact
  def __call__(
    self, batch: Batch, *, rng: Array | None = None, cache: Cache | None = None
  ) -> Output:
    """Runs a packed batch.

    Args:
      batch: stream "text" and its mask; media "images" unless every slot is a token.
      rng: unused, the model has no randomness.
      cache: keys and values of the slots before these; see `llm.Model`.

    Returns:
      hidden f[B,T,D], one per slot, images included.

    Raises:
      UsageError: the language model cannot execute the mask.
    """
    del rng
    config, dtypes = self.config, precision(self.config)
    text, mask = batch.streams[STREAM], batch.masks[STREAM]
    language = find_llm(config, "decoder", {STREAM: mask})
    llm = language.Model(config.llm, config.attention, dtypes, name="llm")
    x = llm.embed(text.tokens)
    if "images" in batch.media:
      table = media_table(batch.media["images"], config)
      x = jnp.where((text.fill >= 0)[..., None], take_rows(table, text.fill), x)
    return llm(x, text.positions, mask, cache)


def media_table(media: Media, config: ConfigDict, width: int = 0) -> Array:
  """N images to the media table f[B,R,width], R = N * K; 0: as wide as text.

  Called inside a compact module, which then has the submodules "tower" and "connector".
  """
  dtypes, tower = precision(config), find_tower(config)
  features = tower.Model(config.tower, config.attention, dtypes, name="tower")(media.values)
  connector = find_connector(config).Model(config.connector, width or config.llm.width, dtypes,
                                           name="connector")
  told = {"words": media.words, "time": media.time}
  told = {name: values for name, values in told.items() if values is not None}
  table = connector(features.patches, tower.grid(config.tower), **told)
  batch, images, slots, width = table.shape
  if slots != len(rows(config)):
    raise ValueError(f"connector '{config.connector.name}': {slots} rows an image, but its slots "
                     f"name {len(rows(config))}")
  return table.reshape(batch, images * slots, width)


def fans_out(encoded: Encoded, config: ConfigDict) -> bool:
  """Whether the masks of this config have classes.

  Raises:
    UsageError: the document has branches and they have not.
  """
  if encoded.branched and not has_classes(config):
    raise UsageError(f"document {encoded.key} of '{encoded.source}' has branches, but no "
                     f"config.data.sources.*.form is '{FAN_OUT}'")
  return has_classes(config)


def has_classes(config: ConfigDict) -> bool:
  """Whether a source fans out, so that masks need classes."""
  return any(source.form == FAN_OUT for source in config.data.sources.values())


def source_id(encoded: Encoded, config: ConfigDict) -> int:
  """Index of the document's source; a prompt of nobody's (source "") counts as the first."""
  names = sorted(config.data.sources)
  if encoded.source and encoded.source not in names:
    raise UsageError(f"document {encoded.key}: config.data.sources has no '{encoded.source}'; "
                     f"{nearest(encoded.source, names)}")
  return names.index(encoded.source) if encoded.source else 0
