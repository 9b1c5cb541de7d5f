"""The packer: no overlap, nothing lost, every cycle whole, and every pointer still points."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_jax.core.errors import UsageError
from vlm_jax.core.layout import Field, Layout, image_fields, stream_fields
from vlm_jax.data.pack import Packer, padded

K = 3  # slots of an image
FIELDS = stream_fields("text", ("lm",), classes=True) | image_fields(1, 1)


def layout(number, words, images, source="a"):
  """A document of images and words, whose tokens are its number: wherever it lies it is found."""
  n = words + K * images
  fill = np.concatenate([np.arange(K * images), np.full(words, -1)]).astype(np.int32)
  index = np.arange(n, dtype=np.int32)
  branch = np.where(index < K * images, 0, 1 + index % 2).astype(np.int32)
  arrays = {
    "streams/text/tokens": np.full(n, number, np.int32),
    "streams/text/targets": index,
    "streams/text/fill": fill,
    "streams/text/positions": index,
    "streams/text/segment_ids": np.ones(n, np.int32),
    "streams/text/source_ids": np.full(n, ord(source) - ord("a"), np.int32),
    "streams/text/loss_weights/lm": np.ones(n, np.float32),
    "masks/text/lo": np.zeros(n, np.int32),
    "masks/text/hi": index + 1,
    "masks/text/q_class": branch,
    "masks/text/k_class": branch,
    "media/images/values": np.full((images, 1, 1, 3), number % 251, np.uint8),
    "media/images/segment_ids": np.ones(images, np.int32),
  }
  sizes = {"text": n, "images": images, "table": K * images, "documents": 1}
  return Layout(arrays, sizes, source, f"{source}{number}")


def axes(tokens, images):
  return {"text": tokens, "images": images, "table": K * images, "documents": tokens}


@st.composite
def problems(draw):
  """(rows, axes, cycles): sizes small enough that rows fill up."""
  rows, tokens, images = draw(st.integers(1, 5)), draw(st.integers(12, 40)), draw(st.integers(1, 4))
  ratio = draw(st.integers(1, 3))
  number, cycles = 0, []
  for _ in range(draw(st.integers(1, 12))):
    cycle = []
    for source in "a" * ratio + "b":
      number += 1
      pictures = draw(st.integers(0, 1)) if source == "a" else 0
      cycle.append(layout(number, draw(st.integers(1, 8)), pictures, source))
    cycles.append(cycle)
  return rows, axes(tokens, images), cycles


def pack(fields, axes, rows, cycles):
  """All steps of the cycles; a cycle too large for an empty step is left out."""
  packer, steps, taken = Packer(fields, axes, rows), [], [[]]
  for cycle in cycles:
    try:
      if not packer.add(cycle):
        steps.append(packer.build())
        taken.append([])
        assert packer.add(cycle)
      taken[-1].append(cycle)
    except UsageError:
      continue
  steps.append(packer.build())
  return steps, taken


def check(packed, cycles, axes, rows):
  """Every property of one packed step against the layouts that went in."""
  arrays, seen = packed.arrays, np.zeros((rows, axes["text"]), bool)
  for one in [one for cycle in cycles for one in cycle]:
    number, n = one.arrays["streams/text/tokens"][0], one.sizes["text"]
    where = np.argwhere(arrays["streams/text/tokens"] == number)
    assert len(where) == n and len(set(where[:, 0])) == 1, "lost, or cut over rows"
    row, start = where[0]
    assert (where[:, 1] == np.arange(start, start + n)).all(), "torn apart"
    assert not seen[row, start : start + n].any(), "overlap"
    seen[row, start : start + n] = True
    get = lambda path, r=row, s=start, n=n: arrays[path][r, s : s + n]
    for path in ("targets", "positions", "source_ids", "loss_weights/lm"):
      assert (get(f"streams/text/{path}") == one.arrays[f"streams/text/{path}"]).all(), path
    for path in ("lo", "hi"):
      assert (get(f"masks/text/{path}") == one.arrays[f"masks/text/{path}"] + start).all(), path
    for path in ("q_class", "k_class"):
      assert (get(f"masks/text/{path}") == one.arrays[f"masks/text/{path}"]).all(), path
    segment = get("streams/text/segment_ids")
    assert segment[0] >= 1 and len(set(segment)) == 1
    others = np.delete(arrays["streams/text/segment_ids"][row], np.arange(start, start + n))
    assert segment[0] not in others, "two documents share a segment"
    fill = get("streams/text/fill")
    assert ((fill < 0) == (one.arrays["streams/text/fill"] < 0)).all(), "a sentinel was shifted"
    for image in range(one.sizes["images"]):  # the rows of the table lead to the document's image
      slots = np.unique(fill[image * K : (image + 1) * K] // K)
      assert len(slots) == 1
      assert arrays["media/images/values"][row, slots[0], 0, 0, 0] == number % 251, "wrong picture"
      assert arrays["media/images/segment_ids"][row, slots[0]] == segment[0]
  empty = ~seen
  for path, pad in (("tokens", 0), ("fill", -1), ("segment_ids", 0), ("loss_weights/lm", 0)):
    assert (arrays[f"streams/text/{path}"][empty] == pad).all(), f"padding of {path}"
  assert (arrays["masks/text/lo"][empty] >= arrays["masks/text/hi"][empty]).all()
  assert packed.fill["text"] == pytest.approx(seen.mean())
  used = arrays["media/images/segment_ids"] > 0
  assert packed.fill["images"] == pytest.approx(used.mean())


@settings(max_examples=60, deadline=None)
@given(problems())
def test_properties(problem):
  rows, capacity, cycles = problem
  steps, taken = pack(FIELDS, capacity, rows, cycles)
  for packed, inside in zip(steps, taken, strict=True):
    check(packed, inside, capacity, rows)
    for name, size in capacity.items():
      assert all(sum(one.sizes[name] for one in row) <= size for row in packed.rows)
    for source in "ab":  # the ratio is exact in every step
      per_cycle = sum(one.source == source for one in cycles[0])
      assert packed.documents.get(source, 0) == len(inside) * per_cycle
  again, _ = pack(FIELDS, capacity, rows, cycles)
  for one, other in zip(steps, again, strict=True):
    assert all((one.arrays[path] == other.arrays[path]).all() for path in one.arrays)


@pytest.mark.parametrize("path", ["masks/text/lo", "streams/text/fill", "streams/text/segment_ids",
                                  "media/images/segment_ids"])
def test_properties_notice_a_missing_shift(path):
  broken = FIELDS | {path: dataclasses.replace(FIELDS[path], shift=None)}
  cycles = [[layout(i, 4, 1), layout(i + 50, 3, 0, "b")] for i in range(1, 5)]
  capacity = axes(40, 4)
  steps, taken = pack(FIELDS, capacity, 2, cycles)
  check(steps[0], taken[0], capacity, 2)
  steps, taken = pack(broken, capacity, 2, cycles)
  with pytest.raises(AssertionError):
    check(steps[0], taken[0], capacity, 2)


def test_base_keeps_sentinels():
  fields = {"x": Field("text", shift="text", pad=-1, base=0)}
  packer = Packer(fields, {"text": 6}, 1)
  one = Layout({"x": np.array([-1, 0, 2], np.int32)}, {"text": 3}, "a", "a")
  packer.add([one, one])
  assert packer.build().arrays["x"].tolist() == [[-1, 0, 2, -1, 3, 5]]


def test_repacks_when_first_fit_is_full():
  # First fit puts 4 and 4 into one row; 6, 6 then leave no room for the last 4, largest first does.
  packer = Packer(FIELDS, axes(10, 0), 3)
  for number, words in enumerate((3, 3, 7, 7, 4, 6), 1):
    assert packer.add([layout(number, words, 0)])
  assert packer.build().fill["text"] == 1.0


def test_cycle_too_large_names_the_fields():
  packer = Packer(FIELDS, axes(10, 1), 2)
  with pytest.raises(UsageError, match="config.data.rows, config.data.tokens or config.data.im"):
    packer.add([layout(i, 8, 0) for i in range(1, 4)])


def test_padded_has_one_document_a_row():
  packer = Packer(FIELDS, padded(axes(40, 4)), 3)
  for number in range(1, 4):
    assert packer.add([layout(number, 2, 1)])
  assert not packer.add([layout(9, 2, 1)])
  assert [len(row) for row in packer.build().rows] == [1, 1, 1]
