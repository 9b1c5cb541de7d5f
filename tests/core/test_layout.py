"""write_slots and split against documents written out by hand."""

import numpy as np
import pytest

from vlm_jax.core.document import Encoded, Pixels, Tokens
from vlm_jax.core.layout import (
  IGNORE,
  image_fields,
  mask_axes,
  mask_fields,
  split,
  stream_fields,
  streams_of,
  write_slots,
)

ROWS = np.array([0, 1, 2], np.int32)  # an image is three slots


def tokens(*ids, loss=True, branch=0, turn=0) -> Tokens:
  mark = np.full(len(ids), loss)
  mark[0] = False  # the opening mark
  return Tokens(np.array(ids, np.int32), mark, branch, turn)


def image(turn=0) -> Pixels:
  return Pixels(np.zeros((4, 4, 3), np.uint8), turn)


def encoded(*parts) -> Encoded:
  return Encoded(parts, "source", "key")


def test_text_only():
  slots = write_slots(encoded(tokens(5, 6, 7)), ROWS)
  assert slots.tokens.tolist() == [5, 6, 7]
  assert slots.fill.tolist() == [IGNORE] * 3
  assert slots.positions.tolist() == [0, 1, 2]
  assert slots.targets.tolist() == [6, 7, 0]
  assert slots.weight.tolist() == [1, 1, 0]
  assert slots.image.tolist() == [0, 0, 0]


def test_images_anywhere_and_prompt_without_loss():
  document = encoded(tokens(9, 8, loss=False), image(), image(), tokens(4, 5, 6))
  slots = write_slots(document, ROWS)
  assert slots.tokens.tolist() == [9, 8, 0, 0, 0, 0, 0, 0, 4, 5, 6]
  assert slots.fill.tolist() == [-1, -1, 0, 1, 2, 3, 4, 5, -1, -1, -1]
  assert slots.image.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0]
  assert slots.positions.tolist() == list(range(11))
  # The last image slot predicts nothing (4 opens the turn); 4 predicts 5, 5 predicts 6.
  assert slots.weight.tolist() == [0] * 8 + [1, 1, 0]
  assert slots.targets.tolist()[8:10] == [5, 6]
  assert slots.predicted.tolist() == [False] * 9 + [True, True]


def test_rows_may_be_any_order_of_the_table():
  slots = write_slots(encoded(image(), image()), np.array([2, 0, 1], np.int32))
  assert slots.fill.tolist() == [2, 0, 1, 5, 3, 4]


def test_branches_restart_after_the_trunk_and_never_predict_each_other():
  document = encoded(
    image(), tokens(1, 2, loss=False, branch=1), tokens(3, 4, branch=1),
    tokens(1, 5, loss=False, branch=2), tokens(3, 6, branch=2),
  )
  slots = write_slots(document, ROWS)
  assert slots.branch.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
  assert slots.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 6]
  # The last slot of a branch has no target: the next slot belongs to a sibling.
  assert slots.targets.tolist() == [0, 0, 0, 2, 3, 4, 0, 5, 3, 6, 0]
  assert slots.weight.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0]


def test_each_branch_is_as_if_asked_alone():
  parts = {1: (tokens(1, 2, branch=1), tokens(3, branch=1)), 2: (tokens(4, 5, 6, branch=2),)}
  whole = write_slots(encoded(image(), *parts[1], *parts[2]), ROWS)
  for branch, own in parts.items():
    alone = write_slots(encoded(image(), *own), ROWS)
    mine = whole.branch == branch
    for name in ("tokens", "positions", "targets", "weight", "predicted"):
      np.testing.assert_array_equal(getattr(whole, name)[mine], getattr(alone, name)[3:])


def test_trunk_behind_a_branch_is_refused():
  with pytest.raises(ValueError, match="trunk comes first"):
    write_slots(encoded(tokens(1, branch=1), tokens(2)), ROWS)


# split


def length(document: Encoded) -> int:
  return sum(3 if isinstance(part, Pixels) else len(part.ids) for part in document.parts)


def ids(document: Encoded) -> list[int]:
  return [int(i) for part in document.parts if isinstance(part, Tokens) for i in part.ids]


def test_a_document_that_fits_is_itself():
  document = encoded(image(), tokens(1, 2))
  assert split(document, 5, lambda image: 3, 1) == [document]


def test_long_text_is_cut_into_windows():
  document = encoded(tokens(*range(1, 24)))
  pieces = split(document, 10, lambda image: 3, 2)
  assert [ids(piece) for piece in pieces] == [
    list(range(1, 11)), list(range(11, 21)), list(range(21, 24))]


def test_images_and_their_turn_stay_together():
  turns = [(image(turn=t), tokens(10 + t, 20 + t, turn=t)) for t in range(4)]
  pieces = split(encoded(*(part for turn in turns for part in turn)), 11, lambda image: 3, 2)
  assert [length(piece) for piece in pieces] == [10, 10]
  for piece in pieces:
    assert [type(part) for part in piece.parts] == [Pixels, Tokens] * 2
  assert ids(pieces[0]) == [10, 20, 11, 21]


def test_image_slots_of_a_row_bound_a_piece_too():
  turns = [(image(turn=t), tokens(10 + t, turn=t)) for t in range(3)]
  pieces = split(encoded(*(part for turn in turns for part in turn)), 100, lambda image: 3, 1)
  assert [ids(piece) for piece in pieces] == [[10], [11], [12]]


def test_fan_out_repeats_the_trunk():
  branches = [tokens(b, b + 10, branch=b, turn=b) for b in range(1, 6)]
  pieces = split(encoded(image(), *branches), 7, lambda image: 3, 1)
  assert [ids(piece) for piece in pieces] == [[1, 11, 2, 12], [3, 13, 4, 14], [5, 15]]
  assert all(isinstance(piece.parts[0], Pixels) for piece in pieces)


def test_an_image_that_cannot_fit_is_bad_data():
  assert split(encoded(image(), tokens(1, 2)), 2, lambda image: 3, 1) == []
  assert split(encoded(image(), image(), tokens(1)), 100, lambda image: 3, 1) == []


# fields


def test_fields_of_a_stream():
  fields = stream_fields("text", ("lm",), classes=True)
  assert fields["masks/text/lo"].shift == "text" and fields["streams/text/fill"].shift == "table"
  assert fields["streams/text/fill"].pad == IGNORE
  assert fields["streams/text/loss_weights/lm"].dtype == "float32"
  assert "masks/text/q_class" not in stream_fields("text", ("lm",), classes=False)
  assert image_fields(4, 6)["media/images/values"].shape == (4, 6, 3)


def test_streams_and_the_mask_between_them():
  fields = (stream_fields("source", (), classes=False)
            | stream_fields("target", ("lm",), classes=True)
            | mask_fields("across", "target", "source", classes=True))
  assert streams_of(fields) == ["source", "target"]
  assert mask_axes(fields) == {"source": ("source", "source"), "target": ("target", "target"),
                               "across": ("target", "source")}
  # What says where a key is moves with the keys; what a query or a key is lies on its own axis.
  assert (fields["masks/across/lo"].axis, fields["masks/across/lo"].shift) == ("target", "source")
  assert (fields["masks/across/k_class"].axis, fields["masks/across/k_class"].shift) == (
    "source", None)
  assert "streams/source/targets" not in fields and "streams/target/targets" in fields
