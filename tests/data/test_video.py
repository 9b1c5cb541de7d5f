"""Videos from a source's files to packed rows: every frame a place, every video one image."""

import dataclasses

import numpy as np
import pytest
from PIL import Image as PIL

from tests.data import written
from vlm_jax.configs import base
from vlm_jax.core.document import Document, Image, Pixels, Text, Tokens, Video
from vlm_jax.core.errors import UsageError
from vlm_jax.core.layout import TIME
from vlm_jax.data import draw, images, inspect, pipeline, template, tokenizer
from vlm_jax.data.bad import BadExample
from vlm_jax.data.images import Decoding

K, SIDE = 3, 8
SHOWN = ((3,), (1, 2), (), (4,), (1,), (2, 1, 3))  # frames of what a document shows, 1: an image
FRAMES = [sum(counts) for counts in SHOWN]


def name(record: int, frame: int) -> str:
  """The file of a frame of a record."""
  return f"{record}-{frame}.png"


def level(record: int, frame: int) -> int:
  """The grey level of that frame, found nowhere else."""
  return 20 * (record + 1) + frame


def page(record: int) -> dict:
  """A record of source "messages": what it shows, then a text."""
  names, content = [name(record, frame) for frame in range(FRAMES[record])], []
  for count in SHOWN[record]:
    shown, names = names[:count], names[count:]
    content.append({"type": "image", "image": shown[0]} if count == 1
                   else {"type": "video", "video": shown})
  return {"content": [*content, {"type": "text", "text": "a caption of some words"}]}


@pytest.fixture
def config(tmp_path):
  """Flamingo on six documents, two rows for all of them."""
  for record, count in enumerate(FRAMES):
    for frame in range(count):
      pixels = np.full((12, 10, 3), level(record, frame), np.uint8)
      PIL.fromarray(pixels).save(tmp_path / name(record, frame))
  path = written.jsonl(tmp_path / "pages.jsonl", map(page, range(len(SHOWN))))
  tokenizer.train(["a caption of some words"] * 10, 270).inner.save(str(tmp_path / "t.json"))
  config = base.get_config()
  config.fusion.update(name="flamingo", image_attention="last")
  config.tower.update(image_size=SIDE, patch=4)
  config.connector.update(name="perceiver", latents=K)
  config.data.update(rows=2, tokens=120, images=10, frames=4, prefetch=0,
                     tokenizer=str(tmp_path / "t.json"))
  config.data.sources.shown = base.source(
    name="messages", path=path, image_root=str(tmp_path), ratio=len(SHOWN))
  return config


def seen(config, batch) -> dict[int, list[list[int]]]:
  """Record to the grey levels of the frames of each item that one of its texts reads.

  Only by what a model has: the mask of the table, whose rows are the items in order, and the times.
  """
  found = {}
  for row in range(config.data.rows):
    time, values = batch[TIME][row], batch["media/images/values"][row]
    item = np.cumsum(time == 0) - 1
    segments = batch["streams/text/segment_ids"][row]
    for segment in range(1, segments.max() + 1):
      lo, hi = (batch[f"masks/media/{end}"][row][segments == segment] for end in ("lo", "hi"))
      assert ((hi - lo == K) | (hi == lo)).all() and (lo % K == 0).all()
      levels = [values[(item == number) & (time >= 0)][:, 0, 0, 0].tolist()
                for number in np.unique(lo[hi > lo]) // K]
      if levels:
        found[levels[0][0] // 20 - 1] = levels
  return found


def expected() -> dict[int, list[list[int]]]:
  made = {}
  for record, counts in enumerate(SHOWN):
    ends = np.cumsum([0, *counts])
    made[record] = [[level(record, frame) for frame in range(start, stop)]
                    for start, stop in zip(ends[:-1], ends[1:], strict=True)]
  return {record: levels for record, levels in made.items() if levels}


def test_every_text_reads_the_frames_of_its_own_videos(config):
  loader = pipeline.make(config)
  batch, info = next(loader)
  assert info["documents"] == {"shown": 6} and not info["bad"]
  assert sorted(batch[TIME].ravel().tolist()) == [-1] * (20 - sum(FRAMES)) + sorted(
    frame for counts in SHOWN for count in counts for frame in range(count))
  assert (batch[TIME] >= 0).tolist() == (batch["media/images/segment_ids"] > 0).tolist()
  assert seen(config, batch) == expected()
  # Several videos and images of different lengths share a row, or the test says nothing.
  assert ((batch[TIME] == 0).sum(1) > 2).all() and ((batch[TIME] > 0).sum(1) > 1).all()
  # Twin: were every frame an item, the rows of the table would be of others.
  assert seen(config, batch | {TIME: np.minimum(batch[TIME], 0)}) != expected()


def test_the_picture_of_a_row_colours_items(config):
  batch, _ = next(pipeline.make(config))
  image = np.asarray(inspect.draw_rows(config, batch, 1))
  left = 12 + config.data.tokens + 16  # two panels
  blue = (image[0, left + 12 :][: 10 * K] == inspect.COLOURS["image"]).all(-1)
  items = (batch[TIME][0] == 0).sum()
  assert blue.tolist() == [True] * items * K + [False] * (10 - items) * K


def test_without_videos_there_is_no_time(config):
  config.data.frames = 0
  assert TIME not in draw.find_fusion(config).fields(config)
  with pytest.raises(UsageError, match="a video of 3 frames but config.data.frames is 0; raise it"):
    next(pipeline.make(config))
  config.data.frames = 3
  with pytest.raises(UsageError, match="a video of 4 frames but config.data.frames is 3"):
    list(map(draw.Draw(config, "shown"), ((0, index) for index in range(6))))


@pytest.mark.parametrize("name, frames, words", [
  ("mlp", 0, "config.connector.name 'mlp' reads images one by one; use 'perceiver', or 0"),
  ("perceiver", 3, "config.data.frames is 4 but config.connector.frames 3: later frames have no")])
def test_connectors_that_cannot_are_refused(config, name, frames, words):
  config.connector.update(name=name, frames=frames)
  with pytest.raises(UsageError, match=words):
    next(pipeline.make(config))


def test_a_video_that_has_no_room_is_a_bad_record(config):
  config.data.images = 3
  found = draw.Draw(config, "shown")((0, 3))
  assert found.reason == "does_not_fit"


def test_controls_take_and_swap_videos(config):
  """"none" shows nothing; "shuffled" frames of another record, all of them together."""
  of = lambda document: [part for part in document.parts if not isinstance(part, Text)]
  records = lambda policy: draw.Records(config, "shown", "train", policy=policy)
  assert not any(of(records("none")[index][0]) for index in range(6))
  real, shuffled = records("real"), records("shuffled")
  assert [len(part.frames) for part in of(real[0][0])] == [3]
  assert all(isinstance(frame.data, bytes) for frame in of(real[0][0])[0].frames)
  for index in (0, 1, 3, 4, 5):
    assert of(real[index][0]) != of(shuffled[index][0])[: len(of(real[index][0]))]
    assert of(shuffled[index][0])


def test_frames_are_changed_alike(config):
  config.data.sources.shown.augment = ("rot90", "flip", "translate")
  drawn = draw.Draw(config, "shown")
  rng = np.random.default_rng(0)
  frame = rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
  document = Document((Video((Image(frame),) * 3), Text("a caption", loss=True)), "shown", "x")
  kinds = set()
  for seed in range(8):
    piece, = drawn._pieces(document, np.random.default_rng(seed))
    first, *rest = next(part for part in piece.parts if isinstance(part, Pixels)).squares
    assert len(rest) == 2 and all(np.array_equal(first, other) for other in rest)
    kinds.add(first.tobytes())
  assert len(kinds) > 4


def test_a_video_is_one_part_and_an_image_a_video_of_one_frame():
  rng = np.random.default_rng(1)
  frames = [rng.integers(0, 256, (9, 7, 3)).astype(np.uint8) for _ in range(3)]
  made = images.video(frames, SIDE, Decoding())
  assert made.later.shape == (2, SIDE, SIDE, 3)
  for one, frame in zip(made.squares, frames, strict=True):
    np.testing.assert_array_equal(one, images.square(frame, SIDE, Decoding()))
  alone = images.video(frames[:1], SIDE, Decoding())
  assert alone.later is None and len(alone.squares) == 1
  with pytest.raises(BadExample, match="wrong_record: a video has no frames"):
    images.video([], SIDE, Decoding())
  words = tokenizer.train(["what is it? a cat is here"] * 10, 270)
  decode = lambda part: made if isinstance(part, Video) else Pixels(part.data)
  parts = (Image(frames[0]), Text("hi", "user"), Text("yo", "assistant", True),
           Video(tuple(map(Image, frames))), Text("so", "user"), Text("no", "assistant", True))
  encoded = template.encode(Document(parts, "s", "key"), words, decode)
  kinds = [part.turn if isinstance(part, Tokens) else len(part.squares) for part in encoded.parts]
  assert kinds == [1, 0, 0, 3, 1, 1]  # as an image would stand, with its turn
  same = template.encode(Document(
    (*parts[:3], Image(frames[0]), *parts[4:]), "s", "key"), words, decode)
  assert [part.turn for part in same.parts] == [part.turn for part in encoded.parts]
  assert len(encoded.squares) == 4 and len(encoded.images) == 2
  assert dataclasses.replace(encoded.parts[3], later=None).squares[0] is made.values
