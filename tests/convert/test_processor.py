"""Our pixels against the image processors of transformers: on Pillow and on torchvision.

Thirty pictures, one pixel to 4000 x 300, of every mode; both sides start from the file's bytes.
"""

import io
import json
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import pytest
import transformers
from PIL import Image, ImageOps

from vlm_jax.configs import base
from vlm_jax.convert import processor
from vlm_jax.core.errors import UsageError
from vlm_jax.data import images

# Processor, its settings. Small squares keep the test quick; the rounding is of all sizes.
CASES = {
  "clip": ("CLIPImageProcessor", dict(size={"shortest_edge": 56}, crop_size=56)),
  "siglip": ("SiglipImageProcessor", dict(size={"height": 56, "width": 56})),
  "siglip 2": ("SiglipImageProcessor", dict(size={"height": 56, "width": 56}, resample=2)),
  "paligemma": ("SiglipImageProcessor", dict(size={"height": 70, "width": 70})),
  "dinov2": ("BitImageProcessor", dict(
    size={"shortest_edge": 64}, crop_size=56, image_mean=[0.485, 0.456, 0.406],
    image_std=[0.229, 0.224, 0.225])),
  "llava-1.5": ("LlavaImageProcessor", dict(
    do_pad=True, size={"shortest_edge": 84}, crop_size=84)),
}
# Grey levels that a value may be off, in the mean of a picture and at most. Measured: nothing, on
# Pillow and, with the kernels of its own, on torchvision.
LIMITS = {"Pil": (1e-4, 1e-3), "": (1e-4, 1e-3)}


def picture(width, height, mode="RGB"):
  """Waves, so that resizing is no averaging of noise to grey, and noise on them."""
  rng = np.random.default_rng(width + height)
  x, y = np.linspace(0, 17, width), np.linspace(0, 13, height)[:, None]
  waves = np.stack([np.sin(x + y), np.cos(2 * x - y), np.sin(3 * y + 0 * x)], -1)
  pixels = np.clip(127 + 90 * waves + rng.normal(0, 30, waves.shape), 0, 255).astype(np.uint8)
  image = Image.fromarray(pixels)
  if mode in ("RGBA", "LA"):
    image.putalpha(Image.fromarray(pixels[..., 1]))
  return image if image.mode == mode else image.convert(mode)


def saved(image, format="png", **options):
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


def files():
  """Name to the bytes of a picture."""
  sizes = ((1, 1), (1, 3), (2, 1), (7, 5), (56, 56), (55, 57), (57, 56), (64, 64), (84, 83),
           (100, 150), (150, 100), (333, 500), (640, 427), (427, 640), (4000, 300), (300, 1201),
           (224, 225), (1000, 999))
  found = {f"{width} x {height}": saved(picture(width, height)) for width, height in sizes}
  for mode in ("L", "1", "P", "RGBA", "LA"):
    found[f"mode {mode}"] = saved(picture(90, 61, mode))
  found["cmyk jpeg"] = saved(picture(90, 61, "CMYK"), "jpeg", quality=95)
  found["grey jpeg"] = saved(picture(61, 90, "L"), "jpeg", quality=95)
  found["clear colour"] = saved(picture(90, 61, "P"), transparency=3)
  for orientation in (3, 6, 8):
    tags = Image.Exif()
    tags[0x0112] = orientation
    found[f"orientation {orientation}"] = saved(picture(90, 61), "jpeg", quality=95, exif=tags)
  found["webp with alpha"] = saved(picture(61, 90, "RGBA"), "webp", lossless=True, exact=True)
  return found


FILES = files()


def their_values(name, backend, overrides, data):
  """f32[H,W,3] as their processor makes of an upright picture."""
  made = getattr(transformers, name + backend)(**overrides)
  upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
  return np.asarray(made(upright, return_tensors="np")["pixel_values"])[0].transpose(1, 2, 0), made


def their_file(made):
  """What save_pretrained writes; of a processor on torchvision under the name of transformers 4."""
  theirs = json.loads(made.to_json_string())
  name = type(made).__name__.removesuffix("Pil")
  return theirs | {"image_processor_type": name + "Fast" * (name == type(made).__name__)}


def our_config(theirs):
  config = base.get_config()
  tower, decode = processor.read(theirs)
  config.tower.update(tower)
  config.data.decode.update(decode)
  return config


def our_values(config, data):
  """f32[H,W,3]: what a tower makes of its pixels."""
  pixels = images.square(data, config.tower.image_size, images.decoding(config))
  return (pixels / 255 - np.array(config.tower.mean)) / np.array(config.tower.std)


def levels_off(ours, theirs, std):
  """Differences in grey levels."""
  return np.abs(ours - theirs) * np.array(std) * 255


@pytest.mark.parametrize("backend", LIMITS)
@pytest.mark.parametrize("case", CASES)
def test_pixels(case, backend):
  name, overrides = CASES[case]
  assert len(FILES) == 30
  (mean, most), config, worst = LIMITS[backend], None, []
  for label, data in FILES.items():
    theirs, made = their_values(name, backend, overrides, data)
    config = config or our_config(their_file(made))
    ours = our_values(config, data)
    assert ours.shape == theirs.shape, label
    off = levels_off(ours, theirs, config.tower.std)
    assert off.mean() <= mean and off.max() <= most, (label, off.max())
    worst.append((off.mean(), off.max()))
  assert config.data.decode.kernel.startswith("torch_uint8_") == (not backend)
  print(f"{case} {backend or 'torchvision'}: mean {{:.1e}}, most {{:.1e}}".format(
    *np.max(worst, axis=0)))


@pytest.mark.parametrize("case, field, value", [
  ("clip", "fit", "stretch"), ("clip", "kernel", "bilinear"), ("siglip", "fit", "letterbox"),
  ("siglip 2", "kernel", "bicubic"), ("dinov2", "shorter", 0), ("llava-1.5", "fit", "letterbox"),
  ("llava-1.5", "border", (255, 255, 255)),
])
def test_twins_are_seen(case, field, value):
  name, overrides = CASES[case]
  data = FILES["333 x 500"]
  theirs, made = their_values(name, "Pil", overrides, data)
  config = our_config(their_file(made))
  config.data.decode[field] = value
  assert levels_off(our_values(config, data), theirs, config.tower.std).max() > 3


@pytest.mark.parametrize("kernel", ["bicubic", "torch_bicubic"])
def test_torchvision_is_an_arithmetic_of_its_own(kernel):
  """Any other kernel is a grey level off somewhere, a hundred times and more what ours is."""
  off = 0.0
  for label in ("55 x 57", "84 x 83", "333 x 500"):
    theirs, made = their_values("SiglipImageProcessor", "", CASES["siglip"][1], FILES[label])
    config = our_config(their_file(made))
    config.data.decode.kernel = kernel
    off = max(off, levels_off(our_values(config, FILES[label]), theirs, config.tower.std).max())
  assert off > 100 * LIMITS[""][1]


def test_a_fast_processor_is_written_as_one():
  config = our_config({"image_processor_type": "LlavaImageProcessorFast", "do_pad": True,
                       "size": {"shortest_edge": 84}, "crop_size": 84})
  assert config.data.decode.kernel == "torch_uint8_bicubic"
  written = processor.write(config)
  assert written["image_processor_type"] == "LlavaImageProcessorFast" and written["resample"] == 3
  assert our_config(written).to_json() == config.to_json()


@pytest.mark.parametrize("grid", [(2, 2), (1, 3), (3, 1)])
def test_tiles_are_llava_nexts(grid):
  rows, columns = grid
  how = images.Decoding(border=(0, 0, 0), grids=(grid,))
  made = transformers.LlavaNextImageProcessorPil(
    size={"shortest_edge": 56}, crop_size=56, image_grid_pinpoints=[[56 * rows, 56 * columns]])
  mean, std = np.array(made.image_mean), np.array(made.image_std)
  for label in ("333 x 500", "640 x 427", "4000 x 300", "1 x 1", "7 x 5", "84 x 83"):
    theirs = np.asarray(made(Image.open(io.BytesIO(FILES[label])), return_tensors="np")
                        ["pixel_values"])[0].transpose(0, 2, 3, 1)
    ours = (np.stack(images.picture(FILES[label], 56, how).squares) / 255 - mean) / std
    assert ours.shape == theirs.shape == (1 + rows * columns, 56, 56, 3)
    assert levels_off(ours, theirs, std).max() < 1e-3, label


@pytest.mark.parametrize("case", CASES)
def test_written_files_say_the_same(case):
  name, overrides = CASES[case]
  _, made = their_values(name, "Pil", overrides, FILES["7 x 5"])
  config = our_config(their_file(made))
  written = processor.write(config)
  again = our_config(written)
  assert again.to_json() == config.to_json()
  theirs = getattr(transformers, written["image_processor_type"] + "Pil")(**{
    k: v for k, v in written.items() if k != "image_processor_type"})
  data = FILES["100 x 150"]
  values = np.asarray(theirs(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"])[0]
  assert levels_off(our_values(config, data), values.transpose(1, 2, 0),
                    config.tower.std).max() < 1e-3


@pytest.mark.parametrize("theirs, fields", [
  ({"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224},
   dict(fit="center_crop", shorter=0, kernel="bicubic")),
  ({"image_processor_type": "SiglipImageProcessorFast", "size": 384, "resample": 2},
   dict(fit="stretch", kernel="torch_uint8_bilinear")),
  ({"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}},
   dict(fit="center_crop", shorter=256)),
  ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": False,
    "size": {"height": 336, "width": 336}}, dict(fit="stretch")),
])
def test_other_spellings(theirs, fields):
  tower, decode = processor.read(theirs)
  assert {name: decode[name] for name in fields} == fields
  assert tower["image_size"] in (224, 384, 336)


@pytest.mark.parametrize("change, sentence", [
  (dict(image_processor_type="CLIPSImageProcessor"), "'CLIPS' cannot be imported; did you mean"),
  (dict(image_processor_type="LlavaNextImageProcessor"), r"has \[336, 672\], which cannot be cut"),
  (dict(image_processor_type="Mask2FormerImageProcessor"), "'Mask2Former' cannot be imported"),
  (dict(do_resize=False), "do_resize is False; only True"),
  (dict(rescale_factor=1 / 127.5), "rescale_factor is 0.0078"),
  (dict(resample=9), "resample is 9; known: 0 to 5"),
  (dict(do_pad=True), "do_pad is true; only LlavaImageProcessor's"),
  (dict(crop_size={"height": 224, "width": 200}), "crop_size is .*; only a square"),
  (dict(do_center_crop=False), "the tower sees squares"),
  (dict(crop_size=300), "the tower sees squares"),
])
def test_what_cannot_be_read_is_named(change, sentence):
  with pytest.raises(UsageError, match=sentence):
    processor.read({"image_processor_type": "CLIPImageProcessor"} | change)


@pytest.mark.parametrize("fields, sentence", [
  (dict(grids=((1, 2),)), r"config.data.decode.border is \(255, 255, 255\)"),
  (dict(grids=((1, 2),), fit="pad"), "config.data.decode.fit is 'pad'"),
  (dict(fit="letterbox"), "config.data.decode.fit is 'letterbox'"),
  (dict(kernel="torch_bicubic"), "config.data.decode.kernel is 'torch_bicubic'"),
  (dict(background=(0, 0, 0)), "config.data.decode.background"),
  (dict(fit="pad"), "config.data.decode.border is .*, config.tower.mean in 8 bits"),
])
def test_what_cannot_be_written_is_named(fields, sentence):
  config = base.get_config()
  config.data.decode.update(fields)
  with pytest.raises(UsageError, match=sentence):
    processor.write(config)
