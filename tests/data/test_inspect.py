"""What is shown is what is trained on."""

import jax
import numpy as np
import pytest

from vlm_jax.core.batch import from_flat
from vlm_jax.core.errors import UsageError
from vlm_jax.data import inspect, pipeline


def test_describes_and_draws(config, tmp_path):
  picture = str(tmp_path / "rows.png")
  text = inspect.inspect(config, steps=2, examples=50, rows=2, picture=picture)
  for part in ("fill: images", "documents: easy_vqa", "slots of a document, pydoc", "0 bad",
               "<image:16><user>", "[[yes<eos>]]", "<bos>", picture):
    assert part in text, part
  from PIL import Image

  drawn = np.asarray(Image.open(picture))
  batch, _ = next(pipeline.make(config))
  mask = from_flat(batch).masks["text"]
  for row in range(2):
    left = row * (256 + 12 + 16) + 12
    dark = (drawn[12 : 12 + 256, left : left + 256] == inspect.SEEN).all(-1)
    one = type(mask)(mask.lo[row], mask.hi[row], mask.q_class[row], mask.k_class[row])
    assert (dark == one.dense(256)).all()
    kinds = inspect.kinds_of(batch, "text", row)
    assert {"image", "prompt", "predicted"} <= set(kinds)
    for slot in range(0, 256, 5):
      assert tuple(drawn[3, left + slot]) == inspect.COLOURS[kinds[slot]]


def test_two_streams_are_written_and_drawn(two_streams, tmp_path):
  config = two_streams
  picture = str(tmp_path / "rows.png")
  text = inspect.inspect(config, steps=1, examples=50, rows=1, picture=picture)
  for part in ("documents: easy_vqa", "slots of a document, pydoc", "<image:16><user>",
               " | <pad>[["):
    assert part in text, part
  from PIL import Image

  drawn = np.asarray(Image.open(picture))
  masks = from_flat(next(pipeline.make(config))[0]).masks
  left = 0
  for name, queries, keys in (("encoder", 256, 256), ("decoder", 257, 257), ("cross", 257, 256)):
    panel = drawn[12 : 12 + queries, left + 12 : left + 12 + keys]
    one = jax.tree.map(lambda field: field[0], masks[name])
    assert ((panel == inspect.SEEN).all(-1) == one.dense(keys)).all(), name
    left += 12 + keys + 16


def test_rebuilds_the_batch_of_a_step(config, tmp_path):
  loader = pipeline.make(config)
  batches, states = [], []
  for _ in range(5):
    states.append(loader.state())
    batches.append(next(loader)[0])
  same = lambda one, other: all(np.array_equal(one[path], other[path]) for path in one)
  assert same(inspect.batch_at(config, 5)[0], batches[4])
  assert same(inspect.batch_at(config, 5, states[2], 3)[0], batches[4])
  assert not same(inspect.batch_at(config, 4)[0], batches[4])
  with pytest.raises(UsageError, match="earlier checkpoint"):
    inspect.batch_at(config, 2, states[2], 3)
  (tmp_path / "config.json").write_text(config.to_json_best_effort())
  text = inspect.inspect_step(str(tmp_path), 5, examples=1)
  assert "step 5 of" in text and "row 0, document 1" in text


def test_histogram():
  assert inspect.histogram([]) == ["  nothing"]
  lines = inspect.histogram([1, 1, 1, 2, 9, 40], bins=4)
  assert [int(line.split()[-1]) for line in lines] == [5, 0, 0, 1]
  assert lines[0].count("#") == inspect.BAR
