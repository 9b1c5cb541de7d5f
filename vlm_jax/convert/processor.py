"""preprocessor_config.json of Hugging Face: how an image becomes the pixels that a tower sees.

Eight image processors are read, under the names of transformers 4 and 5 (CLIPImageProcessor,
CLIPImageProcessorFast, CLIPFeatureExtractor); they are ways of `config.data.decode.fit`:

  stretch      SigLIP, SigLIP 2 at one resolution, PaliGemma, IDEFICS, BLIP; any that resizes so
  center_crop  CLIP, DINOv2 (Bit): the shorter side, then a cut
  pad          LLaVA-1.5: a square with the mean colour around, then resized
  stretch      LLaVA-NeXT, and tiles besides (`config.data.decode.grids`)
  naflex       SigLIP 2: every image its own grid of at most so many patches

Processors on Pillow give the pixels of `config.data.decode.kernel` "bicubic" and the like, those on
torchvision those of "torch_uint8_bicubic" and "torch_uint8_bilinear". A file whose processor is
called "Fast" was written by the latter; one without may be read by either (transformers 4 takes
Pillow, 5 torchvision), and is Pillow's here, as it was when most were published.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.data import images

FILE = "preprocessor_config.json"
WHOLE, NODE = "processor_config.json", "image_processor"  # where transformers 5 has the same
CLIP = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True, "resample": 3,
        "image_mean": (0.48145466, 0.4578275, 0.40821073),
        "image_std": (0.26862954, 0.26130258, 0.27577711)}
SIGLIP = {"size": {"height": 224, "width": 224}, "do_center_crop": False, "resample": 3,
          "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
# Heights and widths that a LLaVA-NeXT's image may be resized to.
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
# What a file that leaves something out means.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
  "CLIP": CLIP, "Bit": CLIP, "Llava": CLIP, "Siglip": SIGLIP,
  "Blip": {**CLIP, "size": {"height": 384, "width": 384}, "do_center_crop": False},
  "Idefics": {**SIGLIP, "image_mean": CLIP["image_mean"], "image_std": CLIP["image_std"]},
  "LlavaNext": {**CLIP, "image_grid_pinpoints": PINPOINTS},
  "Siglip2": {**SIGLIP, "resample": 2, "patch_size": 16, "max_num_patches": 256}}
KERNELS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers
FAST, TORCH = "Fast", "torch_uint8_"
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def _name(theirs: Mapping[str, Any]) -> str:
  return theirs.get("image_processor_type") or theirs.get("feature_extractor_type", "")


def _family(theirs: Mapping[str, Any]) -> str:
  name = _name(theirs)
  for end in (FAST, "Pil", "ImageProcessor", "FeatureExtractor"):
    name = name.removesuffix(end)
  if name not in DEFAULTS:
    raise UsageError(f"{FILE}: the image processor '{name}' cannot be imported; "
                     f"{nearest(name, DEFAULTS)}")
  return name


def _square(size: Any, field: str) -> int:
  """The side of a size that is a square, in any of their spellings."""
  sides = {size} if isinstance(size, int) else {size.get("height"), size.get("width")}
  if len(sides) > 1 or None in sides:
    raise UsageError(f"{FILE}: {field} is {size}; only a square can be imported")
  return int(sides.pop())


def mean_colour(mean: tuple[float, ...]) -> tuple[int, ...]:
  """The mean of normalised pixels as LLaVA paints it: rounded down to 8 bits."""
  return tuple(int(value * 255) for value in mean)


def read(theirs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """The fields of `config.tower` and of `config.data.decode` that a file says.

  Args:
    theirs: the content of preprocessor_config.json.

  Raises:
    UsageError: an image processor or a step that we do not have; the sentence names it.
  """
  family = _family(theirs)
  theirs = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "do_pad": False, **DEFAULTS[family], **theirs}
  if family == "Idefics":  # which sees its own square, whatever `size` says beside it
    theirs["size"] = theirs.get("image_size", theirs["size"])
  for name, needed in (("do_resize", True), ("do_rescale", True)):
    if theirs[name] != needed:
      raise UsageError(f"{FILE}: {name} is {theirs[name]!r}; only {needed!r} can be imported")
  if abs(theirs["rescale_factor"] * 255 - 1) > 1e-6:
    raise UsageError(f"{FILE}: rescale_factor is {theirs['rescale_factor']}; only 1 / 255 can be "
                     "imported")
  if theirs["resample"] not in range(len(KERNELS)):
    raise UsageError(f"{FILE}: resample is {theirs['resample']!r}; known: 0 to {len(KERNELS) - 1}")
  normal = theirs["do_normalize"]
  mean = tuple(theirs["image_mean"]) if normal else (0.0, 0.0, 0.0)
  std = tuple(theirs["image_std"]) if normal else (1.0, 1.0, 1.0)
  ways = {"LlavaNext": _tiles, "Siglip2": _patches}
  side, fit = ways[family](theirs) if family in ways else _fit(theirs, family)
  tower = {"image_size": side, "mean": mean, "std": std}
  kernel = KERNELS[theirs["resample"]]
  if _name(theirs).endswith(FAST) and TORCH + kernel in images.UINT8:
    kernel = TORCH + kernel
  decode = {"kernel": kernel, "background": WHITE, "draft": 0, "shorter": 0,
            "grids": (), "border": mean_colour(mean) if fit["fit"] == "pad" else WHITE}
  return tower, decode | fit


def _tiles(theirs: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
  """The side of LLaVA-NeXT's squares, and how an image becomes them."""
  size = theirs["size"]
  side = size.get("shortest_edge") if isinstance(size, dict) else size
  side = side or _square(size, "size")
  if theirs["do_center_crop"] and (cut := _square(theirs["crop_size"], "crop_size")) != side:
    raise UsageError(f"{FILE}: crop_size is {cut} but size {side}; a tile is not cut")
  found = grids(theirs["image_grid_pinpoints"], side)
  return side, {"fit": "stretch", "border": BLACK, "grids": found}


def _patches(theirs: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
  """The side of the square with as many patches as an image has at most."""
  count = theirs["max_num_patches"]
  if math.isqrt(count) ** 2 != count:
    raise UsageError(f"{FILE}: max_num_patches is {count}; only a square number can be imported")
  return math.isqrt(count) * theirs["patch_size"], {"fit": "naflex"}


def grids(sizes: Iterable, side: int) -> tuple[tuple[int, int], ...]:
  """(rows, columns) of squares of `side` pixels, of their image_grid_pinpoints in pixels.

  Raises:
    UsageError: one of them is no number of squares.
  """
  for one in sizes:
    if any(pixels % side for pixels in one):
      raise UsageError(f"image_grid_pinpoints has {list(one)}, which cannot be cut into tiles of "
                       f"{side} pixels")
  return tuple((height // side, width // side) for height, width in sizes)


def pinpoints(config: ConfigDict) -> list[list[int]]:
  """Their image_grid_pinpoints of `config.data.decode.grids`."""
  return [[side * config.tower.image_size for side in grid] for grid in config.data.decode.grids]


def _fit(theirs: Mapping[str, Any], family: str) -> tuple[int, dict[str, Any]]:
  """The side of the square, and how an image becomes it."""
  size, crop = theirs["size"], theirs["do_center_crop"]
  # A number is the shorter side where a cut follows, both sides where none does.
  shorter = size.get("shortest_edge") if isinstance(size, dict) else size if crop else None
  cut = _square(theirs["crop_size"], "crop_size") if crop else shorter
  if theirs["do_pad"]:
    if family != "Llava":
      raise UsageError(f"{FILE}: do_pad is true; only LlavaImageProcessor's can be imported")
    side = shorter or _square(size, "size")
    if crop and cut != side:
      raise UsageError(f"{FILE}: crop_size is {cut} but size {side}; a padded image is not cut")
    return side, {"fit": "pad"}
  if shorter is None:
    side = _square(size, "size")
    if crop and cut != side:
      raise UsageError(f"{FILE}: crop_size is {cut} but size {side}; a stretched image is not cut")
    return side, {"fit": "stretch"}
  if not crop or cut > shorter:
    raise UsageError(f"{FILE}: do_center_crop is {crop}, crop_size {theirs.get('crop_size')}, size "
                     f"{size}; the tower sees squares, cut one of at most the shorter side")
  return cut, {"fit": "center_crop", "shorter": 0 if shorter == cut else shorter}


def write(config: ConfigDict) -> dict[str, Any]:
  """The content of preprocessor_config.json that says what `config` does to an image.

  Raises:
    UsageError: their processors cannot do it; the sentence names the field.
  """
  side, how, mean = config.tower.image_size, config.data.decode, tuple(config.tower.mean)
  wrong = lambda field, why: UsageError(
    f"config.data.decode.{field} is {how[field]!r}; an image processor can only say {why}")
  kernel = how.kernel.removeprefix(TORCH)
  if kernel not in KERNELS or how.kernel not in (kernel, *images.UINT8):
    raise wrong("kernel", ", ".join((*KERNELS, *images.UINT8)))
  if tuple(how.background) != WHITE:
    raise wrong("background", WHITE)
  square = {"height": side, "width": side}
  if how.grids:
    if how.fit != "stretch":
      raise wrong("fit", "stretch where there are grids")
    if tuple(how.border) != BLACK:
      raise wrong("border", f"{BLACK} where there are grids")
    fit = {"image_processor_type": "LlavaNextImageProcessor", "do_pad": True,
           "do_center_crop": True, "size": {"shortest_edge": side}, "crop_size": square,
           "image_grid_pinpoints": pinpoints(config)}
  elif how.fit == "stretch":
    fit = {"image_processor_type": "SiglipImageProcessor", "size": square, "do_center_crop": False}
  elif how.fit == "center_crop":
    fit = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True,
           "size": {"shortest_edge": how.shorter or side}, "crop_size": square}
  elif how.fit == "naflex":
    fit = {"image_processor_type": "Siglip2ImageProcessor", "patch_size": config.tower.patch,
           "max_num_patches": (side // config.tower.patch) ** 2}
  elif how.fit == "pad":
    if tuple(how.border) != mean_colour(mean):
      raise wrong("border", f"{mean_colour(mean)}, config.tower.mean in 8 bits")
    fit = {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_center_crop": True,
           "size": {"shortest_edge": side}, "crop_size": square}
  else:
    raise wrong("fit", "stretch, center_crop, pad or naflex")
  if how.kernel in images.UINT8:
    fit["image_processor_type"] += FAST
  return fit | {
    "do_convert_rgb": True, "do_resize": True, "resample": KERNELS.index(kernel),
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": list(mean), "image_std": list(config.tower.std),
  }
