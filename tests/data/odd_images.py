"""A corpus of bad and odd image files, each with what must become of it.

`corpus()` maps a name to (bytes, expected): a reason of `vlm_jax.data.bad.REASONS`, or the pixels
u8[H,W,3] with the grey levels that a lossy format may be off.
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from tests.data.broken_source import bomb
from vlm_jax.data.images import Decoding

BACKGROUND = (10, 200, 90)
HOW = Decoding(background=BACKGROUND, max_pixels=1 << 20)
SHAPE = (24, 32)  # of every picture that does not say otherwise


def picture(height=SHAPE[0], width=SHAPE[1]):
  """Smooth and without any symmetry: a lossy codec keeps it, a turn or a swap shows."""
  rows, columns = np.mgrid[0:1:height * 1j, 0:1:width * 1j]
  channels = (220 * columns + 20, 200 * rows + 30, 120 * rows * columns + 60 * columns + 20)
  return np.stack(channels, -1).astype(np.uint8)


def saved(pixels, format, mode=None, **options):
  image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
  file = io.BytesIO()
  (image.convert(mode) if mode else image).save(file, format, **options)
  return file.getvalue()


def chunk(kind, data):
  return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png16(samples):
  """A PNG of 16-bit RGB, which Pillow can read but not write."""
  height, width = samples.shape[:2]
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
  header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
  return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
          + chunk(b"IEND", b""))


def exif(orientation):
  tags = Image.Exif()
  tags[0x0112] = orientation
  return tags


def flipped(data, where):
  out = bytearray(data)
  out[where] ^= 4
  return bytes(out)


def over(pixels, alpha):
  """`pixels` with opacity alpha / 255 on the background."""
  share = np.asarray(alpha, np.float64)[..., None] / 255
  return np.round(pixels * share + np.array(BACKGROUND) * (1 - share)).astype(np.uint8)


def bad():
  """Name to (bytes, reason)."""
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  png, jpeg, webp = (saved(noise, format) for format in ("png", "jpeg", "webp"))
  progressive = saved(noise, "jpeg", progressive=True, quality=95)
  scans = [at for at in range(len(progressive)) if progressive[at : at + 2] == b"\xff\xda"]
  eps = saved(picture(), "eps")
  return {
    "truncated png": (png[: len(png) // 2], "truncated"),
    "truncated jpeg": (jpeg[: len(jpeg) // 2], "truncated"),
    "truncated webp": (webp[: len(webp) // 2], "truncated"),
    "truncated gif": (saved(picture(), "gif")[:600], "truncated"),
    "truncated header": (png[:20], "truncated"),
    "progressive jpeg without its last scans": (progressive[: scans[len(scans) // 2]], "truncated"),
    "png with a bit flipped in its pixels": (flipped(png, len(png) // 2), "truncated"),
    "png with a bit flipped in its header": (flipped(png, 18), "truncated"),
    "png without pixels": (png16(np.zeros((0, 0, 3))), "truncated"),
    "zero bytes": (b"", "not_an_image"),
    "zeros": (bytes(1000), "not_an_image"),
    "html named .jpg": (b"<!DOCTYPE html><html><body>403</body></html>", "not_an_image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not_an_image"),
    "eps": (eps, "not_an_image"),
    "pdf": (b"%PDF-1.7\n1 0 obj\n", "not_an_image"),
    "wav": (b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0", "not_an_image"),
    "bomb by its header": (bomb(), "decompression_bomb"),
    "more pixels than the limit": (saved(Image.new("L", (1024, 1025)), "png"),
                                   "decompression_bomb"),
    "long and thin": (saved(Image.new("L", (1, 201)), "png"), "extreme_aspect"),
  }


def odd():
  """Name to (bytes, (pixels, grey levels it may be off))."""
  pixels = picture()
  grey = pixels[..., 0]
  grey3 = np.repeat(grey[..., None], 3, -1)
  alpha = np.linspace(0, 255, pixels.shape[1]).astype(np.uint8) * np.ones_like(grey)
  rgba = np.concatenate([pixels, alpha[..., None]], -1)
  image = Image.fromarray(pixels)
  palette = Image.fromarray(grey // 64).convert("P")
  palette.putpalette([0, 0, 0, 50, 60, 70, 90, 100, 110, 200, 210, 220])
  colours = np.array(palette.convert("RGB"))
  clear = np.where((grey // 64 == 0)[..., None], np.array(BACKGROUND, np.uint8), colours)
  frames = dict(save_all=True, append_images=[Image.fromarray(255 - pixels)], duration=50)
  deep = pixels.astype(np.uint16) * 257
  png = saved(pixels, "png")
  data = png.index(b"IDAT")
  crc = data + 4 + struct.unpack(">I", png[data - 4 : data])[0]
  files = {
    "one pixel": (saved(pixels[:1, :1], "png"), (pixels[:1, :1], 0)),
    "one line": (saved(pixels[:1], "png"), (pixels[:1], 0)),
    "jpeg": (saved(pixels, "jpeg", quality=95), (pixels, 10)),
    "progressive jpeg": (saved(pixels, "jpeg", quality=95, progressive=True), (pixels, 10)),
    "grey jpeg": (saved(grey, "jpeg", quality=95), (grey3, 4)),
    "cmyk jpeg, inverted as Adobe does": (saved(image, "jpeg", "CMYK", quality=98), (pixels, 10)),
    "cmyk tiff": (saved(image, "tiff", "CMYK"), (pixels, 0)),
    "16-bit grey png": (saved(grey.astype(np.uint16) * 257, "png"), (grey3, 0)),
    "16-bit rgb png": (png16(deep), (pixels, 0)),
    "16-bit grey tiff": (saved(grey.astype(np.uint16) * 257, "tiff"), (grey3, 0)),
    "float tiff": (saved(grey.astype(np.float32), "tiff"), (grey3, 0)),
    "grey with alpha": (saved(Image.fromarray(np.stack([grey, alpha], -1)), "png"),
                        (over(grey3, alpha), 1)),
    "rgb with alpha": (saved(rgba, "png"), (over(pixels, alpha), 1)),
    "webp with alpha": (saved(rgba, "webp", lossless=True, exact=True), (over(pixels, alpha), 1)),
    "palette": (saved(palette, "png"), (colours, 0)),
    "palette with a clear colour": (saved(palette, "png", transparency=0), (clear, 0)),
    "bits": (saved(grey > 100, "png"), (np.where(grey3 > 100, 255, 0), 0)),
    "animated gif": (saved(palette, "gif", save_all=True, duration=50,
                           append_images=[palette.point(lambda value: 3 - value)]), (colours, 0)),
    "animated webp": (saved(pixels, "webp", lossless=True, **frames), (pixels, 0)),
    "animated png": (saved(pixels, "png", **frames), (pixels, 0)),
    "broken exif": (saved(pixels, "png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), (pixels, 0)),
    "orientation that does not exist": (saved(pixels, "png", exif=exif(9)), (pixels, 0)),
    "png whose checksum alone is wrong": (flipped(png, crc), (pixels, 0)),
    "bmp": (saved(pixels, "bmp"), (pixels, 0)),
    "ppm": (saved(pixels, "ppm"), (pixels, 0)),
  }
  turned = {  # what a viewer shows: the tag names the sides that the file's rows and columns are
    1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1],
    5: pixels.transpose(1, 0, 2), 6: np.rot90(pixels, -1),
    7: pixels[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(pixels),
  }
  for number, shown in turned.items():
    files[f"orientation {number}"] = (saved(pixels, "png", exif=exif(number)), (shown, 0))
  files["orientation 6, jpeg"] = (saved(pixels, "jpeg", quality=95, exif=exif(6)), (turned[6], 10))
  files["orientation 6, tiff"] = (saved(pixels, "tiff", exif=exif(6)), (turned[6], 0))
  return files


def corpus():
  """All of them."""
  return bad() | odd()
