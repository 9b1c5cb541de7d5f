"""A source of made-up photographs for loader.py: JPEGs of 640 x 480 with captions of 4 to 60 words.

Brightness and colour have the amplitude spectrum of photographs, 1 / frequency, so that the files
have their size and take their time to decode (quality 90, 4:2:0, about 150 kB).
"""

import functools
import io
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image as Picture

from vlm_jax.core.document import Image, Text
from vlm_jax.data.sources import Parts, Record

FORMS = ("caption",)
LICENCE = "generated"
PACKAGE = "vlm-jax"
COUNT = 1000  # loader.py sets it
HEIGHT, WIDTH = 480, 640
WORDS = "a red old small dog boat tree man with on under near the house road blue bird".split()


@functools.cache
def photo(number: int) -> bytes:
  """JPEG number `number`."""
  rng = np.random.default_rng(number)
  frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
  spectrum = np.fft.rfft2(rng.standard_normal((3, HEIGHT, WIDTH))) / np.maximum(frequency, 1e-3)
  bright, *colour = np.fft.irfft2(spectrum, (HEIGHT, WIDTH))
  scaled = lambda field, deviation: deviation * (field - field.mean()) / field.std()
  planes = (128 + scaled(bright, 50), *(128 + scaled(field, 20) for field in colour))
  pixels = np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8)
  file = io.BytesIO()
  Picture.fromarray(pixels, "YCbCr").save(file, "jpeg", quality=90)
  return file.getvalue()


def caption(number: int) -> str:
  """Its caption; lengths vary as in web data, most short, some long."""
  rng = np.random.default_rng([number, 1])
  return " ".join(rng.choice(WORDS, int(4 * 15 ** rng.random())))


def prepare() -> dict[str, Iterable[Record]]:
  """Records {key, image: JPEG, text} of one split."""
  return {"train": ({"key": str(number), "image": photo(number), "text": caption(number)}
                    for number in range(COUNT))}


def texts(record: Record) -> Iterator[str]:
  """The caption."""
  yield record["text"]


def parts(record: Record, form: str) -> list[Parts]:
  """The picture and its caption."""
  del form
  return [(Image(record["image"]), Text(record["text"], loss=True))]
