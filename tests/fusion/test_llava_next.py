"""LLaVA-NeXT: how many slots an image takes, as transformers counts them, and which they are."""

import dataclasses
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import pytest
import transformers
from transformers.models.llava_next import modeling_llava_next as theirs

from tests.fusion import testing as t
from vlm_jax.core.document import Pixels, Tiles
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.layout import LEARNED
from vlm_jax.data import images
from vlm_jax.data.draw import Draw
from vlm_jax.fusion import llava_next
from vlm_jax.generate import maps

SIDE, PATCH = 336, 14
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
PINPOINTS = [[rows * SIDE, columns * SIDE] for rows, columns in GRIDS]
# Written down from running theirs, (height, width) to slots.
GOLDEN = {(336, 336): 1176, (480, 640): 2340, (640, 480): 2352, (1080, 1920): 1948,
          (1920, 1080): 1968, (427, 640): 2144, (333, 500): 1464, (100, 1000): 1160,
          (672, 672): 2928}


def config():
  made = t.get_config("llava_next", "causal")
  made.tower.update(image_size=SIDE, patch=PATCH)
  return made


def picture(size, side=SIDE, grids=GRIDS) -> Pixels:
  """An image of this height and width, without its pixels."""
  grid = images.choose_grid(size, side, grids)
  blank = np.zeros((1, 1, 1, 3), np.uint8)
  return Pixels(blank[0], tiles=Tiles(np.repeat(blank, grid[0] * grid[1], 0), grid, size))


def sizes(count: int) -> list[tuple[int, int]]:
  """Random heights and widths of all proportions, and exact multiples of tiles and patches."""
  rng = np.random.default_rng(0)
  found = [tuple(int(side) for side in np.exp(rng.uniform(2.5, 8.3, 2))) for _ in range(count)]
  return found + [(a, b) for a in (14, 168, 336, 504, 672, 1008) for b in (28, 336, 672, 1344)]


def their_count(size) -> int:
  processor = transformers.LlavaNextProcessor.__new__(transformers.LlavaNextProcessor)
  processor.patch_size, processor.num_additional_image_tokens = PATCH, 1
  processor.image_processor = type("P", (), {"image_grid_pinpoints": PINPOINTS})
  return processor._get_number_of_features(*size, SIDE, SIDE) - 1  # without the class token


def test_counts_are_their_processors():
  made = config()
  for size, count in GOLDEN.items():
    assert len(llava_next.order(made, picture(size))) == count, size
  wrong = 0
  for size in sizes(600):
    shape = images.choose_grid(size, SIDE, GRIDS)
    assert (shape[0] * SIDE, shape[1] * SIDE) == theirs.select_best_resolution(size, PINPOINTS)
    expected = their_count(size)
    assert len(llava_next.order(made, picture(size))) == expected, size
    turned = dataclasses.replace(picture(size).tiles, size=size[::-1])
    wrong += len(llava_next.order(made, Pixels(np.zeros((1, 1, 3)), tiles=turned))) != expected
  assert wrong > 400  # twin: height and width exchanged


def test_slots_are_read_row_by_row():
  """Every patch carries its place; what is read out is theirs, and in the order of reading."""
  torch = pytest.importorskip("torch")
  made = config()
  for size in ((700, 300), (300, 700), (500, 500), (90, 1000)):
    image = picture(size)
    order = llava_next.order(made, image)
    squares = len(image.squares)
    features = torch.arange(squares * 576.0).reshape(squares, 576, 1)
    model = type("M", (), {"config": transformers.LlavaNextConfig(
      image_grid_pinpoints=PINPOINTS, vision_config={"image_size": SIDE, "patch_size": PATCH,
                                                     "model_type": "clip_vision_model"})})
    packed, _ = theirs.LlavaNextModel.pack_image_features(
      model, [features], torch.tensor([size]), "default", torch.tensor([float(LEARNED)]))
    np.testing.assert_array_equal(order, packed[0][:, 0].numpy())
    assert (order[:576] == np.arange(576)).all() and order[-1] == LEARNED


def test_an_image_without_tiles_ends_in_a_newline():
  order = llava_next.order(config(), Pixels(np.zeros((SIDE, SIDE, 3), np.uint8)))
  np.testing.assert_array_equal(order, [*range(576), LEARNED])


def test_what_cannot_be_is_refused():
  made = t.get_config("llava_next", "causal")
  document = t.documents(0)[-1]
  made.connector.name = "pool"
  with pytest.raises(UsageError, match="'pool' does not keep the tower's 2 x 2 grid"):
    t.lay_out([document], made)
  made = t.get_config("llava_next", "bidirectional")
  with pytest.raises(UsageError, match="image_attention is 'bidirectional'; 'llava_next' is"):
    t.lay_out([document], made)
  for name in ("concat", "prefix_lm", "simvlm"):
    made = t.get_config(name)
    made.data.decode.grids = ((1, 2),)
    with pytest.raises(UsageError, match=f"grids cuts images into tiles, which .* '{name}' does"):
      t.lay_out([document], made)


def test_what_does_not_know_tiles_refuses_them():
  made = t.get_config("llava_next", "causal")
  with pytest.raises(UsageError, match="--attention-map: config.data.decode.grids cuts pictures"):
    maps.check(made, 1, ())
  made.data.sources.pairs.augment = ("flip",)
  with pytest.raises(UsageError, match="config.data.sources.pairs.augment changes a picture but"):
    Draw(made, "pairs")
  for grids in (((1,),), ((0, 2),), ((1, 2, 3),)):
    made.data.decode.grids = grids
    with pytest.raises(UsageError, match="config.data.decode.grids is .*; use pairs"):
      images.decoding(made)


def test_tiles_fill_the_image_axis_and_the_newline_does_not_move():
  made = t.get_config("llava_next", "causal")
  layouts = t.lay_out(t.documents(0)[2:4], made)
  flat, where = t.pack(layouts, made)
  assert [layout.sizes["images"] for layout in layouts] == [3, 3]
  (row, first), (other, second) = where.values()
  assert row == other and second.start == first.stop
  fill = flat["streams/text/fill"][row]
  mine = layouts[1].arrays["streams/text/fill"]
  np.testing.assert_array_equal(fill[second][mine >= 0], mine[mine >= 0] + 3 * t.K)
  np.testing.assert_array_equal(fill[second][mine < 0], mine[mine < 0])
  assert (mine == LEARNED).sum() == 2
  assert find_fusion(made).axes(made)["table"] == made.data.images * t.K
