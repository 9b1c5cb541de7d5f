"""Decoding: every mode to RGB, every kind of damage to a reason; augmentations stay in bounds."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from tests.data.broken_source import BAD, png
from vlm_jax.configs import base
from vlm_jax.core.errors import UsageError
from vlm_jax.data import augment, images
from vlm_jax.data.bad import BadExample
from vlm_jax.data.images import Decoding


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


@pytest.mark.parametrize("reason", ["truncated", "not_an_image", "decompression_bomb",
                                    "extreme_aspect"])
def test_damage(reason):
  with pytest.raises(BadExample) as caught:
    images.decode(BAD[reason]["image"])
  assert caught.value.reason == reason


def test_every_cut_of_a_file_is_bad_and_nothing_else():
  whole = png(size=16)
  for length in range(0, len(whole) - 12, 23):  # the last 12 bytes only say that the file ends
    with pytest.raises(BadExample):
      images.decode(whole[:length])


def test_limits_are_checked_before_decoding(monkeypatch):
  monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("decoded"))
  with pytest.raises(BadExample, match="decompression_bomb"):
    images.decode(png(), Decoding(max_pixels=64 * 64 - 1))
  with pytest.raises(BadExample, match="extreme_aspect"):
    images.decode(png(size=8, width=64), Decoding(max_aspect=7))
  monkeypatch.undo()
  assert images.decode(png(), Decoding(max_pixels=64 * 64)).shape == (64, 64, 3)
  assert images.decode(png(size=8, width=64), Decoding(max_aspect=8)).shape == (8, 64, 3)
  with pytest.raises(BadExample, match="missing_file"):
    images.read("/nonexistent/file.png")


def test_the_config_has_every_field_with_its_default():
  assert images.decoding(base.get_config()) == Decoding()


@pytest.mark.parametrize("fields, message", [
  (dict(max_pixels=0), "config.data.decode.max_pixels is 0; use 1 to 178,956,970"),
  (dict(max_pixels=10**9), "config.data.decode.max_pixels is 1000000000; use 1 to 178,956,970"),
  (dict(max_aspect=0), "config.data.decode.max_aspect is 0"),
  (dict(background=(255, 255)), r"config.data.decode.background is \(255, 255\)"),
  (dict(background=(0, 0, 256)), "red, green and blue from 0 to 255"),
  (dict(background=(0.5, 0.5, 0.5)), "red, green and blue from 0 to 255"),
  (dict(draft=-1), "config.data.decode.draft is -1"),
  (dict(border=(0, 0)), r"config.data.decode.border is \(0, 0\)"),
  (dict(shorter=-1), "config.data.decode.shorter is -1"),
  (dict(fit="centre_crop"), "did you mean 'center_crop'"),
  (dict(kernel="bicubik"), "did you mean 'bicubic'"),
])
def test_wrong_fields_are_named(fields, message):
  config = base.get_config()
  with config.data.decode.unlocked(), config.ignore_type():
    config.data.decode.update(fields)
  with pytest.raises(UsageError, match=message):
    images.decoding(config)


def test_a_background_from_json_is_a_list():
  config = base.get_config()
  with config.ignore_type():
    config.data.decode.background = [1, 2, 3]
  assert images.decoding(config).background == (1, 2, 3)


def noise(height, width, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


SIZES = [((97, 131), (64, 64)), ((30, 20), (64, 64)), ((240, 320), (56, 56)), ((300, 33), (48, 80))]


@pytest.mark.parametrize("name", images.PILLOW)
def test_kernels_are_pillows(name):
  for (height, width), (rows, columns) in SIZES:
    image = Image.fromarray(noise(height, width))
    made = np.array(images.resize(image, (columns, rows), name))
    exact = np.array(image.resize((columns, rows), getattr(Image.Resampling, name.upper())))
    assert made.shape == (rows, columns, 3) and (made == exact).all() and made.std() > 5
    assert images.resize(image, (width, height), name) is image


@pytest.mark.parametrize("name", images.TORCH)
def test_kernels_are_torchs(name):
  torch = pytest.importorskip("torch")
  off = []
  for (height, width), size in SIZES:
    pixels = noise(height, width)
    floats = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    theirs = torch.nn.functional.interpolate(
      floats, size, mode=name.removeprefix("torch_"), antialias=True, align_corners=False)
    theirs = theirs[0].permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels)
    ours = np.array(images.resize(image, size[::-1], name)).astype(int)
    # Half a level is the rounding, a hundredth what the docstring allows the sums.
    assert np.abs(ours - np.clip(theirs, 0, 255)).max() <= 0.51 and ours.std() > 5
    off.append(np.abs(ours - np.clip(np.rint(theirs), 0, 255)))
    other = np.array(images.resize(image, size[::-1], name.removeprefix("torch_"))).astype(int)
    assert (other != ours).any(), "8-bit and float arithmetic differ somewhere"
  assert max(map(np.max, off)) <= 1 and max(map(np.mean, off)) < 2e-3


def test_stretch():
  pixels = noise(40, 64)
  made = images.square(pixels, 32, Decoding())
  assert (made == np.array(Image.fromarray(pixels).resize((32, 32), Image.BICUBIC))).all()
  assert (images.square(pixels, 32, Decoding(kernel="box")) != made).any()


@pytest.mark.parametrize("height, width", [(51, 96), (96, 51), (64, 64), (20, 31)])
def test_center_crop(height, width):
  pixels = noise(height, width)
  made = images.square(pixels, 32, Decoding(fit="center_crop"))
  long = 32 * max(height, width) // min(height, width)
  size = (long, 32) if width > height else (32, long)
  left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
  whole = np.array(Image.fromarray(pixels).resize(size, Image.BICUBIC))
  assert (made == whole[top : top + 32, left : left + 32]).all()


def test_letterbox():
  how = Decoding(fit="letterbox", border=(1, 2, 3))
  pixels = noise(40, 80)
  wide = images.square(pixels, 32, how)
  assert (wide[:8] == (1, 2, 3)).all() and (wide[24:] == (1, 2, 3)).all()
  assert (wide[8:24] == np.array(Image.fromarray(pixels).resize((32, 16), Image.BICUBIC))).all()
  tall = images.square(np.ascontiguousarray(pixels.transpose(1, 0, 2)), 32, how)
  assert np.abs(tall.transpose(1, 0, 2).astype(int) - wide).max() <= 1
  assert images.square(noise(1, 150), 32, how).shape == (32, 32, 3)
  square = noise(64, 64)
  assert (images.square(square, 32, how) == images.square(square, 32, Decoding())).all()


@pytest.mark.parametrize("height, width", [(40, 81), (81, 40), (33, 33), (1, 150)])
def test_pad(height, width, monkeypatch):
  pixels, side = noise(height, width), max(height, width)
  whole = Image.new("RGB", (side, side), (1, 2, 3))
  whole.paste(Image.fromarray(pixels), ((side - width) // 2, (side - height) // 2))
  expected = np.array(whole.resize((32, 32), Image.BICUBIC))
  how = Decoding(fit="pad", border=(1, 2, 3))
  assert (images.square(pixels, 32, how) == expected).all()
  monkeypatch.setattr(images, "STRIP_PIXELS", 200)  # strips of a few rows
  assert (images.square(pixels, 32, how) == expected).all()
  letterboxed = images.square(pixels, 32, dataclasses.replace(how, fit="letterbox"))
  assert (letterboxed != expected).any() or height == width


def test_a_margin_before_the_cut():
  pixels = noise(60, 90)
  made = images.square(pixels, 32, Decoding(fit="center_crop", shorter=40))
  whole = np.array(Image.fromarray(pixels).resize((60, 40), Image.BICUBIC))
  assert (made == whole[4:36, 14:46]).all()
  with pytest.raises(UsageError, match="decode.shorter is 20, from which no square"):
    images.square(pixels, 32, Decoding(fit="center_crop", shorter=20))


@pytest.mark.parametrize("fit", sorted(set(images.FITS) - {"naflex"}))  # which decodes all
def test_draft_never_goes_below_the_target(fit, monkeypatch):
  rows = np.sin(np.arange(480) / 17)[:, None, None] + np.cos(np.arange(640) / 23)[None, :, None]
  pixels = (50 * rows + 128 + [0, 9, -9]).astype(np.uint8)
  data = saved(Image.fromarray(pixels), "jpeg", quality=90)
  sizes = []
  monkeypatch.setattr(images, "_rgb", lambda image, how, rgb=images._rgb: (
    sizes.append(image.size), rgb(image, how))[1])
  made = {draft: images.square(data, 64, Decoding(draft=draft, fit=fit)).astype(int)
          for draft in (0, 1, 2, 7, 100)}
  smallest = {"letterbox": max, "pad": max}.get(fit, min)
  for (draft, reduced), size in zip(made.items(), sizes, strict=True):
    whole = draft in (0, 7, 100)
    assert whole == (size == (640, 480)) and smallest(size) >= draft * 64 or draft == 100
    most = 40 if fit == "pad" else 6  # the seam mixes border and other pixels
    assert (reduced == made[0]).all() if whole else 0 < np.abs(reduced - made[0]).max() < most
    assert whole or smallest(size) < 2 * draft * 64 + 2, "could be smaller still"
  assert (images.decode(data, Decoding(draft=1)).shape) == (480, 640, 3)


def test_augmentations():
  image = images.decode(png())
  draws = lambda name: [augment.apply(image, [name], np.random.default_rng(i)) for i in range(20)]
  for name in augment.AUGMENTATIONS:
    made = draws(name)
    assert all(one.shape == image.shape and one.flags.c_contiguous for one in made)
    assert all((one == other).all() for one, other in zip(made, draws(name), strict=True))
    assert any((one != image).any() for one in made), name
  flipped = {bool((one == image[:, ::-1]).all()) for one in draws("flip")}
  assert flipped == {True, False}
  edge = np.zeros((16, 16, 3), np.uint8)
  edge[:, 0] = 9  # the edge is repeated where the shift leaves a gap
  shifted = [augment.translate(edge, np.random.default_rng(i)) for i in range(20)]
  assert {int((one[0, :, 0] == 9).sum()) for one in shifted} == {0, 1, 2}
