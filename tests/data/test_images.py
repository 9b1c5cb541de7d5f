"""Decoding: every mode to RGB, every kind of damage to a reason; augmentations stay in bounds."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.data.broken_source import BAD, png
from vlm_jax.core.errors import UsageError
from vlm_jax.data import images
from vlm_jax.data.bad import BadExample


def saved(image, format="png", **options):
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


def test_modes_become_rgb():
  ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
  grey = images.decode(saved(Image.fromarray(ramp)))
  assert grey.shape == (16, 16, 3) and (grey == ramp[..., None]).all()
  deep = Image.fromarray(ramp.astype(np.uint16) * 257)
  assert (images.decode(saved(deep)) == ramp[..., None]).all()
  assert (images.decode(saved(Image.fromarray(ramp), "gif")) == ramp[..., None]).all()
  cmyk = Image.new("CMYK", (4, 4), (255, 0, 0, 0))
  red, green, blue = images.decode(saved(cmyk, "jpeg", quality=100))[0, 0].tolist()
  assert red < 10 and green > 200 and blue > 200
  bits = images.decode(saved(Image.fromarray(ramp > 100)))
  assert set(np.unique(bits)) == {0, 255}


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_white(mode):
  clear = Image.new(mode, (4, 4), (0,) * len(mode))
  assert (images.decode(saved(clear)) == 255).all()
  half = Image.new(mode, (4, 4), (0,) * (len(mode) - 1) + (128,))
  assert (np.abs(images.decode(saved(half)).astype(int) - 127) <= 1).all()


def test_palette_transparency_is_white():
  image = Image.new("P", (4, 4), 0)
  image.putpalette([10, 20, 30] * 256)
  assert (images.decode(saved(image)) == [10, 20, 30]).all()
  assert (images.decode(saved(image, transparency=0)) == 255).all()


def test_exif_orientation():
  pixels = np.zeros((4, 8, 3), np.uint8)
  pixels[:, 4:] = 255
  exif = Image.Exif()
  exif[0x0112] = 6  # turn by 270 degrees
  turned = images.decode(saved(Image.fromarray(pixels), exif=exif))
  assert turned.shape == (8, 4, 3) and (turned[4:] == 255).all() and (turned[:4] == 0).all()


@pytest.mark.parametrize("reason", ["truncated", "not_an_image", "decompression_bomb"])
def test_damage(reason):
  with pytest.raises(BadExample) as caught:
    images.decode(BAD[reason]["image"])
  assert caught.value.reason == reason


def test_every_cut_of_a_file_is_bad_and_nothing_else():
  whole = png(size=16)
  for length in range(0, len(whole) - 12, 23):  # the last 12 bytes only say that the file ends
    with pytest.raises(BadExample):
      images.decode(whole[:length])


def test_limit_is_checked_before_decoding():
  with pytest.raises(BadExample, match="decompression_bomb"):
    images.decode(png(), max_pixels=64 * 64 - 1)
  assert images.decode(png(), max_pixels=64 * 64).shape == (64, 64, 3)
  with pytest.raises(BadExample, match="missing_file"):
    images.read("/nonexistent/file.png")


def test_resize():
  image = images.decode(png())
  assert images.resize(image, 64) is image
  assert images.resize(image, 32).shape == (32, 32, 3)
  exact = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))
  assert (images.resize(image, 32) == exact).all()
  assert (images.resize(image, 32, "box") != exact).any()
  with pytest.raises(UsageError, match="did you mean 'bicubic'"):
    images.resize(image, 32, "bicubik")


def test_augmentations():
  image = images.decode(png())
  draws = lambda name: [images.augment(image, [name], np.random.default_rng(i)) for i in range(20)]
  for name in images.AUGMENTATIONS:
    made = draws(name)
    assert all(one.shape == image.shape and one.flags.c_contiguous for one in made)
    assert all((one == other).all() for one, other in zip(made, draws(name), strict=True))
    assert any((one != image).any() for one in made), name
  flipped = {bool((one == image[:, ::-1]).all()) for one in draws("flip")}
  assert flipped == {True, False}
  edge = np.zeros((16, 16, 3), np.uint8)
  edge[:, 0] = 9  # the edge is repeated where the shift leaves a gap
  shifted = [images.translate(edge, np.random.default_rng(i)) for i in range(20)]
  assert {int((one[0, :, 0] == 9).sum()) for one in shifted} == {0, 1, 2}
