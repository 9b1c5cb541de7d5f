"""Arrays in pieces: the same rows, the same digest, whatever the size of a piece."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from vlm_jax.core import digest, pieces
from vlm_jax.core.pieces import Pieces

ARRAYS = {
  "matrix": np.arange(60, dtype=np.float32).reshape(15, 4),
  "stack": np.arange(48, dtype=np.int32).reshape(3, 4, 4),
  "half": np.arange(7).astype(ml_dtypes.bfloat16),
  "scalar": np.float32(3.5)[()].reshape(()),
  "empty": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("size", [1, 40, 2**25])
@pytest.mark.parametrize("name", ARRAYS)
def test_pieces_are_the_array(name, size, monkeypatch):
  monkeypatch.setattr(pieces, "BYTES", size)
  array = ARRAYS[name]
  for made in (pieces.of(array), pieces.of(jnp.asarray(array))):
    assert (made.shape, made.dtype, made.nbytes) == (array.shape, array.dtype, array.nbytes)
    assert made.whole().tobytes() == b"".join(piece.tobytes() for piece in made) == array.tobytes()
    assert digest.of_arrays({"a": made}) == digest.of_arrays({"a": array})
  assert pieces.of(made) is made
  if name == "matrix":
    assert len(list(made)) == {1: 15, 40: 8, 2**25: 1}[size]


def test_a_piece_is_a_multiple_of_what_can_be_read():
  rows = lambda least: pieces.rows((100, 2**20), np.float32, least)  # rows of 4 MiB
  assert [rows(least) for least in (1, 3, 8, 30)] == [8, 6, 8, 30]


def test_twin_pieces_in_another_order_have_another_digest():
  array = ARRAYS["matrix"]
  turned = Pieces(array.shape, array.dtype, lambda start, stop: array[::-1][start:stop], 4)
  assert digest.of_arrays({"a": turned}) != digest.of_arrays({"a": array})
