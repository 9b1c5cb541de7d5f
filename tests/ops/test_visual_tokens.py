"""Counts of visual tokens against the processors and models of transformers, over many sizes."""

import itertools
import re
import types
from pathlib import Path

import pytest
import torch

from vlm_jax import recipes
from vlm_jax.core.fusion import find_fusion
from vlm_jax.ops import visual_tokens
from vlm_jax.ops.visual_tokens import PINPOINTS, SYSTEMS, UNCOUNTED

SIDES = (7, 50, 100, 224, 333, 336, 427, 480, 640, 641, 672, 1000, 1080, 1344, 1920, 2500)
SIZES = list(itertools.product(SIDES, SIDES))  # (height, width)


def slots(name: str, height: int, width: int) -> int:
  return SYSTEMS[name].image(height, width).slots


def bare(cls, **attributes):
  """A processor without the tokenizer its constructor asks for."""
  made = cls.__new__(cls)
  vars(made).update(attributes)
  return made


@pytest.fixture(scope="module")
def llava_next():
  """(height, width) and a list of canvases to the count of transformers."""
  from transformers import LlavaNextProcessor

  def count(height, width, pinpoints):
    processor = bare(LlavaNextProcessor, patch_size=14, num_additional_image_tokens=1,
                     image_processor=types.SimpleNamespace(image_grid_pinpoints=pinpoints))
    # One less for the class token, which vision_feature_select_strategy "default" drops.
    return processor._get_number_of_features(height, width, 336, 336) - 1

  return count


def test_llava_next(llava_next):
  published = [list(canvas) for canvas in PINPOINTS]
  for size in SIZES:
    assert slots("LLaVA-NeXT", *size) == llava_next(*size, published), size


def test_llava_next_features_are_as_many(llava_next):
  from transformers.models.llava_next.modeling_llava_next import unpad_image
  for height, width in SIZES[::7]:
    canvas = visual_tokens.best_canvas(height, width, PINPOINTS)
    grid = torch.zeros(1, 24 * canvas[0] // 336, 24 * canvas[1] // 336)
    rows, columns = unpad_image(grid, (height, width)).shape[1:]
    assert slots("LLaVA-NeXT", height, width) == 576 + rows * (columns + 1)


def test_the_two_readings_of_llava_next_differ_where_a_tie_decides(llava_next):
  # The released config's numbers, which transformers takes for (height, width).
  hub = [[width, height] for height, width in PINPOINTS]
  differ = [size for size in SIZES
            if slots("LLaVA-NeXT", *size) != llava_next(*size, hub)]
  for size in SIZES:
    assert visual_tokens.llava_next(*size, [tuple(canvas) for canvas in hub]) == (
      llava_next(*size, hub))
  # The two canvases of two tiles are tied where the image is not larger in either.
  assert differ and all(max(size) <= 672 and min(size) <= 336 for size in differ)
  assert slots("LLaVA-NeXT", 50, 100) == 876 and llava_next(50, 100, hub) == 1752


@pytest.mark.parametrize("size,count", [
  ((336, 336), 1176), ((480, 640), 2340), ((640, 480), 2352), ((1080, 1920), 1948),
  ((1920, 1080), 1968), ((427, 640), 2144), ((333, 500), 1464), ((100, 1000), 1160),
  ((672, 672), 2928)])
def test_llava_next_by_hand(size, count):
  assert slots("LLaVA-NeXT", *size) == count


def test_the_sizes_tell_rules_apart(llava_next):
  """Twins: padding that stays, and padding cut to the last row; each is often wrong."""
  kept = tight = 0
  for height, width in SIZES:
    canvas = visual_tokens.best_canvas(height, width, PINPOINTS)
    rows, columns = (24 * side // 336 for side in canvas)
    theirs = llava_next(height, width, [list(canvas) for canvas in PINPOINTS])
    kept += theirs != 576 + rows * (columns + 1)
    rows = min(rows, -(-height * columns // width))
    columns = min(columns, -(-width * rows // height))
    tight += theirs != 576 + rows * (columns + 1)
  assert kept > len(SIZES) // 2 and tight > len(SIZES) // 10


def test_llava_and_paligemma_at_every_size():
  """Fixed counts are fixed there too; transformers computes them from pixels and patches."""
  from transformers import (
    CLIPImageProcessorPil,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaProcessor,
    SiglipVisionConfig,
  )
  count = lambda processor: processor._get_num_multimodal_tokens(SIZES)["num_image_tokens"]
  for name, side in (("LLaVA", 224), ("LLaVA-1.5", 336)):
    images = CLIPImageProcessorPil(crop_size=side)
    processor = bare(
      LlavaProcessor, image_processor=images, patch_size=14, num_additional_image_tokens=1,
      vision_feature_select_strategy="default",
      _merge_kwargs=lambda images=images: {"images_kwargs": {"crop_size": images.crop_size}})
    assert [slots(name, *size) for size in SIZES] == count(processor)
  for side in (224, 448, 896):
    config = PaliGemmaConfig(vision_config=SiglipVisionConfig(image_size=side, patch_size=14))
    processor = bare(PaliGemmaProcessor, image_seq_length=config.text_config.num_image_tokens)
    assert [slots(f"PaliGemma {side}", *size) for size in SIZES] == count(processor)


def test_fuyu():
  from transformers import FuyuImageProcessor, FuyuProcessor
  processor = bare(FuyuProcessor, image_processor=FuyuImageProcessor())
  sizes = [*SIZES[::31], (300, 300), (480, 640), (1080, 1920), (1234, 987), (4000, 1000)]
  theirs = processor._get_num_multimodal_tokens([list(size) for size in sizes])
  assert [slots("Fuyu", *size) for size in sizes] == theirs["num_image_tokens"]
  assert [slots("Fuyu", *size) for size in sizes[-5:-2]] == [110, 368, 2340]


def test_idefics3():
  from transformers import Idefics3ImageProcessor, Idefics3Processor
  # The tokenizer of Idefics3 has a token for two newlines: one id.
  tokenizer = lambda text, add_special_tokens: {"input_ids": [0]}
  processor = bare(Idefics3Processor, image_processor=Idefics3ImageProcessor(), image_seq_len=169,
                   tokenizer=tokenizer, _merge_kwargs=lambda: {"images_kwargs": {}})
  theirs = processor._get_num_multimodal_tokens(SIZES)["num_image_tokens"]
  assert [slots("pixel shuffle (Idefics3)", *size) for size in SIZES] == theirs
  assert len(set(theirs)) == 7, "one to four rows or columns of four tiles"


def test_internvl():
  from transformers import GotOcr2ImageProcessor, InternVLProcessor
  processor = bare(InternVLProcessor, image_seq_length=256, image_processor=GotOcr2ImageProcessor(),
                   _merge_kwargs=lambda: {"images_kwargs": {
                     "crop_to_patches": True, "patch_size": {"height": 448, "width": 448}}})
  theirs = processor._get_num_multimodal_tokens(SIZES)["num_image_tokens"]
  assert [slots("pixel shuffle (InternVL)", *size) for size in SIZES] == theirs
  assert len(set(theirs)) > 8


def test_ovis2():
  from transformers import Ovis2Processor
  from transformers.models.ovis2 import image_processing_ovis2 as theirs
  processor = bare(Ovis2Processor, image_seq_length=256)
  for size in SIZES[::2]:
    grid = theirs.get_min_tile_covering_grid(size, 448, 9)
    text = processor.replace_image_token({"grids": [torch.tensor(grid)]}, 0)
    assert slots("Ovis 2", *size) == len(re.findall("<IMG_[A-Z]+>", text)), size


@pytest.mark.parametrize("mode,view,tile,count", [
  ("tiny", 512, 0, 73), ("small", 640, 0, 111), ("base", 1024, 0, 273), ("large", 1280, 0, 421),
  ("gundam", 1024, 640, None)])
def test_deepseek_ocr(mode, view, tile, count):
  from transformers import UnlimitedOcrProcessor  # the same encoder and order of tokens
  from transformers.models.unlimited_ocr import image_processing_unlimited_ocr as images
  settings = types.SimpleNamespace(size={"height": view, "width": view}, tile_size=tile or 640)
  processor = bare(UnlimitedOcrProcessor, image_processor=settings, patch_size=16,
                   downsample_ratio=4, image_token="x")
  for size in SIZES:
    columns, rows = images.get_optimal_tiled_canvas(size, (640, 640), 2, 6)
    tiles = rows * columns if tile and max(size) > tile else 0
    theirs = processor.replace_image_token(
      {"patches_grid": [(columns, rows)], "num_local_patches": [tiles]}, 0)
    assert slots(f"DeepSeek-OCR {mode}", *size) == len(theirs), size
    assert count in (None, len(theirs))


@pytest.mark.parametrize("size,view,tile,most,count", [
  ((1280, 1280), 1024, 640, 6, 693), ((1920, 1280), 1024, 640, 6, 903),
  ((1920, 1920), 1024, 640, 9, 1203), ((2048, 2048), 1280, 1024, 6, 1477)])
def test_tiles_of_deepseek_ocr_by_hand(size, view, tile, most, count):
  assert visual_tokens.deepseek_ocr(*size, view=view, tile=tile, most=most) == count


def test_fixed_counts_are_those_of_the_configs():
  from transformers import (
    Blip2Config,
    ChameleonConfig,
    Idefics2Config,
    IdeficsConfig,
    InstructBlipConfig,
  )
  codes = ChameleonConfig().vq_config
  side = codes.resolution // 2 ** (len(codes.channel_multiplier) - 1)
  assert slots("Chameleon", 9, 9) == side**2 + 2
  assert slots("BLIP-2", 9, 9) == Blip2Config().num_query_tokens
  assert slots("InstructBLIP", 9, 9) == InstructBlipConfig().num_query_tokens
  assert slots("Perceiver Resampler", 9, 9) == Idefics2Config().perceiver_config.resampler_n_latents
  flamingo = SYSTEMS["Flamingo"].image(9, 9)
  assert flamingo.memory.rows == IdeficsConfig().perceiver_config.resampler_n_latents
  assert [slots(f"PaliGemma {size}", 9, 9) for size in (224, 448, 896)] == [256, 1024, 4096]


def test_patches_must_fill_the_image():
  assert visual_tokens.patches(1024, 16) == 4096
  with pytest.raises(ValueError, match="no whole number"):
    visual_tokens.patches(1024, 14)


@pytest.mark.parametrize("name,connector", [("LLaVA", "linear"), ("LLaVA-1.5", "mlp"),
                                            ("WiCo", "space_to_depth"),
                                            ("adaptive pooling", "pool")])
def test_connectors_have_the_slots_of_their_system(name, connector):
  config = recipes.load("configs/llava.py")
  config.connector.update(name=connector, factor=2)
  config.tower.update(image_size=224 if name == "LLaVA" else 336, patch=14)
  assert len(find_fusion(config).rows(config)) == slots(name, 9, 9)


def test_the_recipe_of_simvlm_has_its_slots():
  config = recipes.load("configs/simvlm.py:base")
  assert len(find_fusion(config).rows(config)) == slots("SimVLM", 9, 9)


def test_every_system_of_the_readme_is_counted_or_says_why_not():
  text = (Path(__file__).parents[2] / "README.md").read_text()
  table = text.split("## Systems")[1].split("## ")[0]
  rows = [line.split("|") for line in table.splitlines() if re.match(r"\| \d", line)]
  # Members of a row share their arithmetic: its first name stands for them.
  sources = {row[2].split(",")[0].strip(): row[3].strip() for row in rows}
  assert len(sources) > 40
  begins = lambda key, name: key == name or key.startswith(name + " ")
  for name, source in sources.items():
    counted = [key for key in SYSTEMS if begins(key, name)]
    assert bool(counted) != (name in UNCOUNTED), (name, counted)
    assert all(source.startswith(SYSTEMS[key].source) for key in counted), name
  known = [key for key in (*SYSTEMS, *UNCOUNTED) if any(begins(key, name) for name in sources)]
  assert known == [*SYSTEMS, *UNCOUNTED], "a system that the README does not list"
