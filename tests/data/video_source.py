"""Documents that show images and videos of several lengths, their frames named as files."""

from vlm_jax.core.document import Image, Text, Video

FORMS = ("captions",)
EXPECTS = "nothing"
SHOWN = ((3,), (1, 2), (), (4,), (1,), (2, 1, 3))  # frames of what a document shows, 1: an image


def name(record: int, frame: int) -> str:
  """The file of a frame of a record."""
  return f"{record}-{frame}.png"


def level(record: int, frame: int) -> int:
  """The grey level of that frame, found nowhere else."""
  return 20 * (record + 1) + frame


def reader(entry, split):
  return [{"key": str(number)} for number in range(len(SHOWN))]


def parts(record, form):
  number, at, found = int(record["key"]), 0, []
  for count in SHOWN[number]:
    frames = tuple(Image(name(number, at + frame)) for frame in range(count))
    found.append(frames[0] if count == 1 else Video(frames))
    at += count
  return [(*found, Text("a caption of some words", loss=True))]
