"""Encoded image files to u8[H,W,3].

A file is opened, its size checked, decoded to RGB and fitted to the square that the tower sees, as
`config.data.decode` says. Resizing has three families of names:

  nearest, box, bilinear, hamming, bicubic, lanczos
      Pillow's own filters on 8-bit pixels, exactly; what processors built on Pillow do.
  torch_bilinear, torch_bicubic
      the same filters in floating point, rounded once at the end: what
      `torch.nn.functional.interpolate(antialias=True)` makes of float pixels. The sums agree to
      0.01 grey levels, so after rounding a pixel is equal or, rarely, one level off.
  torch_uint8_bilinear, torch_uint8_bicubic
      the same filters in the 16-bit arithmetic that torch has for uint8 pixels, exactly; what
      processors built on torchvision do.
"""

import contextlib
import dataclasses
import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageOps, UnidentifiedImageError

from vlm_jax.core.document import Pixels, Tiles
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.data import fixed_point
from vlm_jax.data.bad import BadExample

# What Pillow warns of (large images, broken metadata) is counted or harmless here. Set once:
# changing filters around every decode would race with other threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
# Formats that are pictures and decoded inside Pillow: never one that starts another program (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
COLOURS = ("background", "border")
MOST_PIXELS = 2 * 89_478_485  # Pillow refuses more by itself
PILLOW = {
  "nearest": Image.Resampling.NEAREST,
  "box": Image.Resampling.BOX,
  "bilinear": Image.Resampling.BILINEAR,
  "hamming": Image.Resampling.HAMMING,
  "bicubic": Image.Resampling.BICUBIC,
  "lanczos": Image.Resampling.LANCZOS,
}
STRIP_PIXELS = 1 << 24  # of a padded image, held at a time
TORCH = {"torch_bilinear": PILLOW["bilinear"], "torch_bicubic": PILLOW["bicubic"]}
UINT8 = {f"torch_uint8_{name}": name for name in fixed_point.FILTERS}
KERNELS = (*PILLOW, *TORCH, *UINT8)


@dataclasses.dataclass(frozen=True)
class Decoding:
  """How files become pixels: the fields of `config.data.decode`, with the same defaults.

  Attributes:
    max_pixels: larger images are bad records; read from the header, before any pixel is decoded.
    max_aspect: images whose longer side is more than so many times the shorter are bad records.
    background: the colour (red, green, blue) under transparency.
    border: the colour around a letterboxed or padded image.
    draft: 0 decodes every pixel. n > 0 lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its size, but
      never to less than n times the target: faster, and not the same pixels. How far they are off
      depends on what is left to the kernel: of noise with the spectrum of photographs, 640 x 480,
      n = 1 is 0.9 grey levels off in the mean and 6 at most at 64 pixels, 4 and 27 at 224 (where
      benchmarks/loader.py measures it); n = 2 is 0.4 and 3 off at 64 and decodes all for 224.
    fit: how an image becomes a square, one of `FITS`.
    shorter: center_crop: what the shorter side becomes before the cut, 0: the side of the square.
    kernel: how it is resized, one of `KERNELS`.
    grids: (rows, columns) of squares, into one of which an image is cut besides; (): none.
    patch: naflex: side of the tower's patches, `config.tower.patch`.
  """

  max_pixels: int = 64 * 1024 * 1024
  max_aspect: int = 200
  background: tuple[int, int, int] = (255, 255, 255)
  border: tuple[int, int, int] = (255, 255, 255)
  draft: int = 0
  fit: str = "stretch"
  shorter: int = 0
  kernel: str = "bicubic"
  grids: tuple[tuple[int, int], ...] = ()
  patch: int = 0

  def __post_init__(self):
    """Raises a UsageError that names the field when a value cannot be."""
    wrong = lambda field, why: UsageError(
      f"config.data.decode.{field} is {getattr(self, field)!r}; {why}")
    whole = lambda value, least, most: isinstance(value, int) and least <= value <= most
    if not whole(self.max_pixels, 1, MOST_PIXELS):
      raise wrong("max_pixels", f"use 1 to {MOST_PIXELS:,}, above which Pillow decodes nothing")
    if not whole(self.max_aspect, 1, MOST_PIXELS):
      raise wrong("max_aspect", "use a whole number, at least 1")
    for field in COLOURS:
      colour = getattr(self, field)
      if len(colour) != 3 or not all(whole(value, 0, 255) for value in colour):
        raise wrong(field, "use red, green and blue from 0 to 255, as in (255, 255, 255)")
    if not whole(self.shorter, 0, MOST_PIXELS):
      raise wrong("shorter", "use 0 (the side of the square) or a number of pixels")
    if not whole(self.draft, 0, MOST_PIXELS):
      raise wrong("draft", "use 0 (decode everything) or how often the target must fit, at least 1")
    if self.fit not in FITS:
      raise wrong("fit", nearest(self.fit, FITS))
    if any(len(grid) != 2 or not all(whole(side, 1, 64) for side in grid) for grid in self.grids):
      raise wrong("grids", "use pairs (rows, columns), as in ((1, 2), (2, 1))")
    if self.kernel not in KERNELS:
      raise wrong("kernel", nearest(self.kernel, KERNELS))
    if self.fit == "naflex" and (self.grids or self.patch < 1):
      raise wrong("fit", "it needs config.tower.patch, and config.data.decode.grids to be ()")


def decoding(config: ConfigDict) -> Decoding:
  """`config.data.decode`, checked; a UsageError names the field that cannot be."""
  fields = dict(config.data.decode)
  fields |= {name: tuple(fields[name]) for name in COLOURS}
  fields |= {"patch": config.tower.patch} if fields["fit"] == "naflex" else {}
  return Decoding(**fields | {"grids": tuple(map(tuple, fields["grids"]))})


def read(path: str) -> bytes:
  """The bytes of an image file; BadExample("missing_file") when there is none."""
  try:
    with open(path, "rb") as file:
      return file.read()
  except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
    raise BadExample("missing_file", str(path)) from error


def square(data: bytes | np.ndarray, size: int, how: Decoding) -> np.ndarray:
  """An image file (or pixels u8[H,W,3]) as the tower sees it, u8[size,size,3].

  Raises:
    BadExample: as in `decode`.
  """
  image = Image.fromarray(data) if isinstance(data, np.ndarray) else _open(data, how, size)
  return np.array(FITS[how.fit](image, size, how), np.uint8)


def picture(data: bytes | np.ndarray, size: int, how: Decoding) -> Pixels:
  """An image file (or pixels u8[H,W,3]) as the tower sees it, in tiles too if `how` has grids.

  Raises:
    BadExample: as in `decode`.
  """
  if not how.grids and how.fit != "naflex":
    return Pixels(square(data, size, how))
  image = Image.fromarray(data) if isinstance(data, np.ndarray) else _open(data, how, 0)
  shape, whole = (image.height, image.width), np.array(FITS[how.fit](image, size, how), np.uint8)
  if how.fit == "naflex":
    return Pixels(whole, grid=naflex_grid(shape, size, how.patch))
  grid = choose_grid(shape, size, how.grids)
  return Pixels(whole, tiles=Tiles(cut(image, size, grid, how), grid, shape))


def video(frames: Sequence[bytes | np.ndarray], size: int, how: Decoding) -> Pixels:
  """The frames of a video as the tower sees them; one frame is an image.

  Raises:
    BadExample: as in `decode`, or "wrong_record": there is no frame.
  """
  if not frames:
    raise BadExample("wrong_record", "a video has no frames")
  first = picture(frames[0], size, how)
  later = [square(frame, size, how) for frame in frames[1:]]
  return dataclasses.replace(first, later=np.stack(later)) if later else first


def decode(data: bytes, how: Decoding | None = None) -> np.ndarray:
  """Decodes an image file to u8[H,W,3], every pixel of it.

  EXIF orientation is applied; transparency is laid on the background; palette, grey, CMYK and
  16-bit pixels become RGB; of an animation the first frame is taken. The size in the header is
  checked before any pixel is decoded.

  Raises:
    BadExample: "not_an_image", "truncated", "decompression_bomb" or "extreme_aspect".
  """
  return np.array(_open(data, how or Decoding(), 0), np.uint8)


def _open(data: bytes, how: Decoding, size: int) -> Image.Image:
  """As `decode`, but a Pillow image in mode RGB; reduced as `how.draft` allows when size > 0."""
  try:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
  except Image.DecompressionBombError as error:
    raise BadExample("decompression_bomb", str(error)) from error
  except UnidentifiedImageError as error:
    raise BadExample("truncated" if _begins(data) else "not_an_image", str(error)) from error
  except Exception as error:  # a broken header raises whatever the format's parser raises
    raise BadExample("truncated", str(error)) from error
  _check(image.size, how)
  return _loaded(image, how, size)


def _loaded(image: Image.Image, how: Decoding, size: int) -> Image.Image:
  """Every pixel of an image whose header was checked, upright and in RGB."""
  try:
    if how.draft and size:
      _reduce(image, how, size)
    image.load()
  except Exception as error:
    raise BadExample("truncated", str(error)) from error
  with contextlib.suppress(Exception):  # unreadable EXIF data says nothing about the orientation
    ImageOps.exif_transpose(image, in_place=True)
  return _rgb(image, how)


def of_pillow(image: Image.Image, how: Decoding) -> np.ndarray:
  """The pixels u8[H,W,3] of an image that somebody opened, every one of them, as `decode` makes
  them of its file; the image itself stays as it is.

  Raises:
    BadExample: as in `decode`.
  """
  _check(image.size, how)
  try:
    own = image.copy()
  except Exception as error:
    raise BadExample("truncated", str(error)) from error
  return np.array(_loaded(own, how, 0), np.uint8)


def _begins(data: bytes) -> bool:
  """Whether the bytes begin like a picture: what is not understood then is damage."""
  return data.startswith(MAGIC) and (data[:4] != b"RIFF" or data[8:12] in (b"WEBP", b""))


def _check(size: tuple[int, int], how: Decoding) -> None:
  width, height = size
  if not width or not height:
    raise BadExample("truncated", f"{width} x {height} pixels")
  if width * height > how.max_pixels:
    raise BadExample("decompression_bomb", f"{width} x {height} pixels, limit {how.max_pixels}")
  if max(size) > how.max_aspect * min(size):
    raise BadExample("extreme_aspect", f"{width} x {height} pixels, limit {how.max_aspect}:1")


def _reduce(image: Image.Image, how: Decoding, size: int) -> None:
  """Lets a JPEG be decoded smaller; of other formats nothing changes."""
  least = how.draft * max(size, how.shorter)
  width, height = image.size
  if how.fit == "naflex":  # whose grid is that of the whole file
    return
  if how.fit in ("stretch", "center_crop"):  # the shorter side fills the square
    image.draft("RGB", (least, least))
  else:
    image.draft("RGB", (least, 1) if width >= height else (1, least))


def _rgb(image: Image.Image, how: Decoding) -> Image.Image:
  if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey: Pillow would clip, not scale
    grey = np.nan_to_num(np.asarray(image, np.float64))
    grey = np.clip(np.round(grey / 257 if image.mode != "F" else grey), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
  if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
    image = image.convert("RGBA")
    background = Image.new("RGBA", image.size, (*how.background, 255))
    image = Image.alpha_composite(background, image)
  return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def resize(image: Image.Image, size: tuple[int, int], kernel: str) -> Image.Image:
  """Resizes an RGB image to (width, height), antialiased, with a kernel named in `KERNELS`.

  An image that already has the size is returned as it is.
  """
  if image.size == size:
    return image
  if kernel in PILLOW:
    return image.resize(size, PILLOW[kernel])
  if kernel in UINT8:
    return Image.fromarray(fixed_point.resize(np.asarray(image), size, UINT8[kernel]))
  floats = [band.convert("F").resize(size, TORCH[kernel]) for band in image.split()]
  rounded = np.clip(np.rint(np.stack([np.asarray(band) for band in floats], -1)), 0, 255)
  return Image.fromarray(rounded.astype(np.uint8))


# Fits: (RGB image, side of the square, how) -> RGB image of that size.


def stretch(image: Image.Image, size: int, how: Decoding) -> Image.Image:
  """Resizes both sides: everything is there, and not in proportion."""
  return resize(image, (size, size), how.kernel)


def center_crop(image: Image.Image, size: int, how: Decoding) -> Image.Image:
  """Resizes the shorter side and cuts the middle out, as the processors of CLIP and DINOv2 do.

  The longer side is rounded down, and so is the margin before the cut.
  """
  least, shorter = how.shorter or size, min(image.size)
  if least < size:
    raise UsageError(f"config.data.decode.shorter is {how.shorter}, from which no square of "
                     f"config.tower.image_size {size} can be cut; use 0 or at least {size}")
  width, height = (least if side == shorter else least * side // shorter for side in image.size)
  left, top = (width - size) // 2, (height - size) // 2
  return resize(image, (width, height), how.kernel).crop((left, top, left + size, top + size))


def letterbox(image: Image.Image, size: int, how: Decoding) -> Image.Image:
  """Resizes the longer side and fills up the shorter with the border, the image centred."""
  longer = max(image.size)
  width, height = (max(1, round(size * side / longer)) for side in image.size)
  canvas = Image.new("RGB", (size, size), how.border)
  canvas.paste(resize(image, (width, height), how.kernel),
               ((size - width) // 2, (size - height) // 2))
  return canvas


def pad(image: Image.Image, size: int, how: Decoding) -> Image.Image:
  """Fills up the shorter side with the border, then resizes the square (LLaVA-1.5).

  What a letterbox is but for the seam, where border and image mix. Resizing goes by rows first and
  then by columns, so the square, which may be large, is made and narrowed a strip of rows at a
  time: the same pixels as of the whole.
  """
  side, (width, height) = max(image.size), image.size
  left, top = (side - width) // 2, (side - height) // 2
  canvas = Image.new("RGB", (size, side), how.border)
  rows = max(1, STRIP_PIXELS // side)
  for start in range(0, height, rows):
    part = image.crop((0, start, width, min(start + rows, height)))
    strip = Image.new("RGB", (side, part.height), how.border)
    strip.paste(part, (left, 0))
    canvas.paste(resize(strip, (size, part.height), how.kernel), (0, top + start))
  return resize(canvas, (size, size), how.kernel)


def naflex(image: Image.Image, size: int, how: Decoding) -> Image.Image:
  """Resizes in proportion to whole patches, as many as the square has at most (SigLIP 2's NaFlex).

  They follow one another in the reading order of the square's, black behind them.
  """
  p = how.patch
  rows, columns = naflex_grid((image.height, image.width), size, p)
  cells = np.asarray(resize(image, (columns * p, rows * p), how.kernel))
  cells = cells.reshape(rows, p, columns, p, 3).swapaxes(1, 2).reshape(-1, p, p, 3)
  side = size // p
  square = np.zeros((side * side, p, p, 3), np.uint8)
  square[: len(cells)] = cells
  square = square.reshape(side, side, p, p, 3).swapaxes(1, 2).reshape(side * p, side * p, 3)
  rest = (0, size - side * p)
  return Image.fromarray(np.pad(square, (rest, rest, (0, 0))))


def naflex_grid(shape: tuple[int, int], size: int, patch: int) -> tuple[int, int]:
  """Rows and columns of patches of an image (height, width): at most those of a square of `size`.

  The largest scale that has no more, sides rounded up, in the brackets of the published processor.
  """
  most, low, high = (size // patch) ** 2, 1e-6, 100.0
  sides = lambda scale: tuple(max(1, math.ceil(side * scale / patch)) for side in shape)
  while high - low >= 1e-5:
    middle = (low + high) / 2
    low, high = (middle, high) if math.prod(sides(middle)) <= most else (low, middle)
  return sides(low)


FITS: Mapping[str, Callable[[Image.Image, int, Decoding], Image.Image]] = {
  function.__name__: function for function in (stretch, center_crop, letterbox, pad, naflex)
}


def choose_grid(shape: tuple[int, int], size: int, grids: Sequence[tuple[int, int]]
                ) -> tuple[int, int]:
  """The grid (rows, columns) of squares that an image fits best (LLaVA-NeXT's AnyRes).

  That in which most of its own pixels are kept, then that with the least border, then the first.

  Args:
    shape: height and width of the image.
    size: side of a square.
    grids: to choose from.
  """
  height, width = shape

  def rank(grid: tuple[int, int]) -> tuple[int, int]:
    down, across = grid[0] * size, grid[1] * size
    scale = min(across / width, down / height)
    kept = min(int(width * scale) * int(height * scale), width * height)
    return kept, kept - down * across

  return max(grids, key=rank)


def cut(image: Image.Image, size: int, grid: tuple[int, int], how: Decoding) -> np.ndarray:
  """An image as a grid of squares, u8[rows * columns, size, size, 3] in reading order (LLaVA-NeXT).

  It is resized in proportion to fit `grid` (rows, columns) of squares, the shorter side rounded up,
  and centred on the border (llava-vl.github.io/blog/2024-01-30-llava-next).
  """
  rows, columns = grid
  width, height = image.size
  across, down = columns * size, rows * size
  if across * height < down * width:
    fitted = across, min(math.ceil(height * (across / width)), down)
  else:
    fitted = min(math.ceil(width * (down / height)), across), down
  canvas = Image.new("RGB", (across, down), how.border)
  canvas.paste(resize(image, fitted, how.kernel),
               ((across - fitted[0]) // 2, (down - fitted[1]) // 2))
  cells = np.asarray(canvas).reshape(rows, size, columns, size, 3).swapaxes(1, 2)
  return cells.reshape(rows * columns, size, size, 3)
