"""A source with every kind of bad record, for the tests of bad data."""

import io
import struct
import zlib

import numpy as np
from PIL import Image as PIL

from vlm_jax.core.document import Image, Text
from vlm_jax.data import files, images, turns

FORMS = ("all",)
LICENCE = "none"
PACKAGE = "none"
GOOD = 20


def png(seed=0, size=64, width=None):
  pixels = np.random.default_rng(seed).integers(0, 256, (size, width or size, 3), np.uint8)
  file = io.BytesIO()
  PIL.fromarray(pixels).save(file, "png")
  return file.getvalue()


def bomb():
  """A PNG whose header promises 100,000 x 100,000 pixels."""
  chunk = lambda kind, data: (struct.pack(">I", len(data)) + kind + data
                              + struct.pack(">I", zlib.crc32(kind + data)))
  header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
  return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
          + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))


BAD = {
  "truncated": dict(image=png()[:2000]),
  "not_an_image": dict(image=b"<html><body>404 Not Found</body></html>"),
  "decompression_bomb": dict(image=bomb()),
  "extreme_aspect": dict(image=png(size=1, width=201)),
  "missing_file": dict(path="/nonexistent/picture.png"),
  "empty_text": dict(question=" \n "),
  "unknown_role": dict(role="narrator"),
  "zero_loss": dict(loss=False),
  "does_not_fit": dict(question="why? " * 2000),
  "wrong_record": dict(row={"answers": "none"}),
  "image_count": dict(row={"text": "<image> and <image>", "images": [png()]}),
  "outside_root": dict(named="../picture.png"),
  "remote_image": dict(named="https://example.org/picture.png"),
}


def prepare():
  good = [dict(key=f"good{i}", image=png(i)) for i in range(GOOD)]
  bad = [dict(key=reason, image=png()) | entry for reason, entry in BAD.items()]
  return {"train": good[:10] + bad + good[10:], "good": good}


def texts(record):
  yield "what is the answer to this question?"


def parts(record, form):
  if "row" in record:
    return turns.documents(record["row"], ("text",))
  if "named" in record:
    files.ImageFolder("").read(record["named"])
  data = images.read(record["path"]) if "path" in record else record["image"]
  return [(Image(data), Text(record.get("question", "what is it?"), record.get("role", "user")),
           Text("noise", "assistant", loss=record.get("loss", True)))]
