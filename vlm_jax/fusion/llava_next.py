"""LLaVA-NeXT: large images are read in tiles (llava-vl.github.io/blog/2024-01-30-llava-next).

AnyRes: the whole image is one square; besides, it is cut into the tiles of the grid that fits it
best (`config.data.decode.grids`). Tower and connector see every square alone; then the features of
the tiles are put together again to one large grid, the border around the image is left out, and a
learned newline ends every row. Causal, as LLaVA is (t text, i the four slots of the whole, n a
newline; an image without tiles has one):

          t i i i i n t t
        t 1 . . . . . . .
        i 1 1 . . . . . .
        i 1 1 1 . . . . .
        i 1 1 1 1 . . . .
        i 1 1 1 1 1 . . .
        n 1 1 1 1 1 1 . .
        t 1 1 1 1 1 1 1 .
        t 1 1 1 1 1 1 1 1

Fan-out documents as in `concat` (a, b the tokens of two branches):

          i i i i n a a b b
        i 1 . . . . . . . .
        i 1 1 . . . . . . .
        i 1 1 1 . . . . . .
        i 1 1 1 1 . . . . .
        n 1 1 1 1 1 . . . .
        a 1 1 1 1 1 1 . . .
        a 1 1 1 1 1 1 1 . .
        b 1 1 1 1 1 . . 1 .
        b 1 1 1 1 1 . . 1 1

Tiles lie on the image axis behind their image: an image of g tiles takes 1 + g of
`config.data.images`. The slots of a square image in 2 x 2 tiles of 24 x 24 patches:
576 + 48 * (48 + 1) = 2928.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers
from ml_collections import ConfigDict

from vlm_jax.core import mask as masks
from vlm_jax.core.batch import Batch
from vlm_jax.core.document import Encoded, Pixels, Tiles
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import Cache, Output, Stage, find_llm, find_tower
from vlm_jax.core.layout import LEARNED, Layout, write_slots
from vlm_jax.core.precision import precision
from vlm_jax.core.typing import Array
from vlm_jax.fusion import concat
from vlm_jax.fusion.concat import (
  STREAM,
  assemble,
  axes,
  fields,
  losses,
  media_table,
  refuse_grid,
  refuse_video,
  weights,
)
from vlm_jax.nn.linear import parameter
from vlm_jax.nn.model import Configured
from vlm_jax.ops.gather import take_rows

__all__ = ["STAGES", "STREAM", "Model", "axes", "fields", "layout", "losses", "order", "rows",
           "weights"]

STAGES = (
  Stage("all", (".*",)),  # its second stage: the tower trains too, at a rate of its own
  Stage("projector", ("connector/.*", "newline")),
  Stage("finetune", ("connector/.*", "newline", "llm/.*")),  # the tower stays as it is
)


def rows(config: ConfigDict) -> np.ndarray:
  """i32[K], the places of the tower's grid in reading order.

  Raises:
    UsageError: a connector that does not keep the grid.
  """
  height, width = find_tower(config).grid(config.tower)
  places = concat.rows(config)
  if not np.array_equal(places, np.arange(height * width)):
    raise UsageError(f"config.connector.name '{config.connector.name}' does not keep the tower's "
                     f"{height} x {width} grid, which '{config.fusion.name}' puts together from "
                     "tiles; use 'linear' or 'mlp'")
  return places


def order(config: ConfigDict, image: Pixels) -> np.ndarray:
  """i32[k], the fill of one image's slots: the whole, then the rows of the tiles' grid.

  Raises:
    UsageError: an image with a grid of its own, or a video.
  """
  refuse_grid(config, image)
  refuse_video(config, image)
  whole = rows(config)
  if image.tiles is None:
    return np.append(whole, LEARNED).astype(np.int32)
  large = unpad(stitch(image.tiles, find_tower(config).grid(config.tower)), image.tiles.size)
  lines = np.concatenate([large, np.full((len(large), 1), LEARNED)], axis=1)
  return np.concatenate([whole, lines.ravel()]).astype(np.int32)


def stitch(tiles: Tiles, grid: tuple[int, int]) -> np.ndarray:
  """i32[height, width], the feature row at every place of the large grid.

  Args:
    tiles: of an image, whose whole has the first rows.
    grid: rows and columns of the features of one square.
  """
  (down, across), (height, width) = tiles.grid, grid
  first = height * width
  index = np.arange(first, first * (1 + down * across), dtype=np.int32)
  index = index.reshape(down, across, height, width).swapaxes(1, 2)
  return index.reshape(down * height, across * width)


def unpad(large: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """The large grid without the border that an image of `size` (height, width) has there.

  Half of the border is left out on either side, rounded down; products that miss a whole number by
  an error of floats count as that number.
  """
  (height, width), (down, across) = size, large.shape
  if width / height > across / down:
    border = (down - int(round(height * (across / width), 7))) // 2
    return large[border : down - border]
  border = (across - int(round(width * (down / height), 7))) // 2
  return large[:, border : across - border]


def layout(encoded: Encoded, config: ConfigDict, rng: np.random.Generator) -> Layout:
  """Writes the document out in reading order; everything is causal.

  Raises:
    UsageError: as `concat.layout`, or another image_attention.
  """
  del rng  # nothing here is random
  if config.fusion.image_attention != "causal":
    raise UsageError(f"config.fusion.image_attention is '{config.fusion.image_attention}'; "
                     f"'{config.fusion.name}' is 'causal'")
  slots = write_slots(encoded, rows(config), lambda image: order(config, image))
  return assemble(encoded, slots, masks.causal(len(slots)), config)


class Model(Configured):
  """Vision tower, connector, newline, and the language model that reads them among its tokens."""

  @nn.compact
  def __call__(
    self, batch: Batch, *, rng: Array | None = None, cache: Cache | None = None
  ) -> Output:
    """Runs a packed batch; arguments, result and errors as of `concat.Model`."""
    del rng
    config, dtypes = self.config, precision(self.config)
    text, mask = batch.streams[STREAM], batch.masks[STREAM]
    language = find_llm(config, "decoder", {STREAM: mask})
    llm = language.Model(config.llm, config.attention, dtypes, name="llm")
    x = llm.embed(text.tokens)
    if "images" in batch.media:
      width = config.llm.width
      newline = parameter(self, "newline", initializers.normal(width**-0.5), (width,), ("norm",),
                          dtypes.param)
      fill = text.fill[..., None]
      table = media_table(batch.media["images"], config)
      x = jnp.where(fill >= 0, take_rows(table, text.fill), x)
      x = jnp.where(fill == LEARNED, newline.astype(x.dtype), x)
    return llm(x, text.positions, mask, cache)
