"""Encoded image files to u8[H,W,3], and the random changes training may make to them."""

import contextlib
import io
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.data.bad import BadExample

MAX_PIXELS = 64 * 1024 * 1024
# The limit above is lower than the one Pillow warns at. Set once: changing filters around every
# decode would race with other threads.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
# Formats that are pictures and decoded inside Pillow: never one that starts another program (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
KERNELS = {
  "nearest": Image.Resampling.NEAREST,
  "box": Image.Resampling.BOX,
  "bilinear": Image.Resampling.BILINEAR,
  "hamming": Image.Resampling.HAMMING,
  "bicubic": Image.Resampling.BICUBIC,
  "lanczos": Image.Resampling.LANCZOS,
}


def read(path: str) -> bytes:
  """The bytes of an image file; BadExample("missing_file") when there is none."""
  try:
    with open(path, "rb") as file:
      return file.read()
  except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
    raise BadExample("missing_file", str(path)) from error


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
  """Decodes an image file to u8[H,W,3].

  EXIF orientation is applied; transparency is laid on white; palette, grey, CMYK and 16-bit pixels
  become RGB; of an animation the first frame is taken. The size in the header is checked before any
  pixel is decoded.

  Raises:
    BadExample: "not_an_image", "truncated" or "decompression_bomb".
  """
  try:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
  except Image.DecompressionBombError as error:
    raise BadExample("decompression_bomb", str(error)) from error
  except UnidentifiedImageError as error:
    reason = "truncated" if data[:16].startswith(MAGIC) else "not_an_image"
    raise BadExample(reason, str(error)) from error
  except Exception as error:  # a broken header raises whatever the format's parser raises
    raise BadExample("truncated", str(error)) from error
  width, height = image.size
  if width * height > max_pixels:
    raise BadExample("decompression_bomb", f"{width} x {height} pixels, limit {max_pixels}")
  try:
    image.load()
  except Exception as error:
    raise BadExample("truncated", str(error)) from error
  with contextlib.suppress(Exception):  # unreadable EXIF data says nothing about the orientation
    image = ImageOps.exif_transpose(image)
  return _rgb(image)


def _rgb(image: Image.Image) -> np.ndarray:
  if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey: Pillow would clip, not scale
    grey = np.asarray(image, np.float64)
    grey = np.clip(np.round(grey / 257 if image.mode != "F" else grey), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, -1)
  if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    image = Image.alpha_composite(white, image)
  return np.array(image.convert("RGB"), np.uint8)


def resize(image: np.ndarray, size: int, kernel: str = "bicubic") -> np.ndarray:
  """Resizes u8[H,W,3] to u8[size,size,3] with an antialiased kernel of Pillow, named in `KERNELS`.

  An image that already has the size is returned as it is.
  """
  if kernel not in KERNELS:
    raise UsageError(f"no resize kernel '{kernel}'; {nearest(kernel, KERNELS)}")
  if image.shape[:2] == (size, size):
    return image
  return np.asarray(Image.fromarray(image).resize((size, size), KERNELS[kernel]), np.uint8)


# Augmentations: (u8[H,W,3], generator) -> u8[H,W,3] of the same size; each draws a fixed number of
# values, so that adding one never changes what another draws before it.


def flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Mirrors left and right, every second time."""
  return image[:, ::-1] if rng.random() < 0.5 else image


def vflip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Mirrors top and bottom, every second time."""
  return image[::-1] if rng.random() < 0.5 else image


def rot90(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Turns a square image by 0, 90, 180 or 270 degrees."""
  return np.rot90(image, int(rng.integers(4)))


def translate(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Shifts by up to a sixteenth of each side; the edge pixels fill the gap."""
  height, width = image.shape[:2]
  down = rng.integers(-(height // 16), height // 16 + 1)
  right = rng.integers(-(width // 16), width // 16 + 1)
  rows = np.clip(np.arange(height) - down, 0, height - 1)
  columns = np.clip(np.arange(width) - right, 0, width - 1)
  return image[rows][:, columns]


AUGMENTATIONS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
  function.__name__: function for function in (flip, vflip, rot90, translate)
}


def check_augmentations(names: Sequence[str], field: str) -> None:
  """Raises a UsageError that names `field` when an augmentation does not exist."""
  for name in names:
    if name not in AUGMENTATIONS:
      raise UsageError(f"{field}: no augmentation '{name}'; {nearest(name, AUGMENTATIONS)}")


def augment(image: np.ndarray, names: Sequence[str], rng: np.random.Generator) -> np.ndarray:
  """Applies augmentations in order; contiguous u8[H,W,3]."""
  for name in names:
    image = AUGMENTATIONS[name](image, rng)
  return np.ascontiguousarray(image)
