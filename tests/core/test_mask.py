"""IntervalMask against its rule written as loops, and against big_vision's cumulative sums."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_jax.core import mask as masks
from vlm_jax.core.mask import IntervalMask


def by_hand(mask: IntervalMask, num_keys: int) -> np.ndarray:
  """The rule of the module docstring, one pair at a time."""
  field = lambda values, i, default: default if values is None else int(values[i])
  seen = np.zeros((mask.num_queries, num_keys), bool)
  for i in range(mask.num_queries):
    for j in range(num_keys):
      inside = mask.lo[i] <= field(mask.k_index, j, j) < mask.hi[i]
      q, k = field(mask.q_class, i, 0), field(mask.k_class, j, 0)
      seen[i, j] = inside and (q == 0 or k == 0 or q == k)
  return seen


def mask_ar_rule(mask_ar: np.ndarray) -> np.ndarray:
  """big_vision, models/proj/paligemma: i sees j where cumsum(mask_ar)[j] <= cumsum(mask_ar)[i]."""
  blocks = np.cumsum(mask_ar)
  return blocks[None, :] <= blocks[:, None]


@st.composite
def random_masks(draw, classes=True):
  queries, keys = draw(st.integers(1, 9)), draw(st.integers(1, 9))
  row = lambda size, low, high: np.array(
    draw(st.lists(st.integers(low, high), min_size=size, max_size=size)), np.int32)
  return IntervalMask(
    row(queries, 0, keys), row(queries, 0, keys + 1),
    row(queries, -1, 3) if classes else None,
    row(keys, 0, 3) if classes else None,
    row(keys, 0, keys) if draw(st.booleans()) else None,
  ), keys


@given(random_masks())
@settings(max_examples=60, deadline=None)
def test_dense_is_the_rule(drawn):
  mask, keys = drawn
  np.testing.assert_array_equal(mask.dense(keys), by_hand(mask, keys))


@given(random_masks(), st.data())
@settings(max_examples=60, deadline=None)
def test_take_moves_rows_and_columns(drawn, data):
  mask, keys = drawn
  dense = mask.dense(keys)
  if mask.k_class is None and mask.k_index is None:
    mask = dataclasses.replace(mask, k_index=np.arange(keys, dtype=np.int32))
  pick = lambda n: np.array(data.draw(st.lists(st.integers(-1, n - 1), min_size=1, max_size=8)))
  q, k = pick(mask.num_queries), pick(keys)
  taken = mask.take(q, k).dense()
  expected = np.where((q[:, None] < 0) | (k[None, :] < 0), False, dense[np.ix_(q, k)])
  np.testing.assert_array_equal(taken, expected)


def test_take_of_keys_in_a_batch_without_key_fields():
  mask = IntervalMask(*(np.tile(row, (2, 1)) for row in (masks.causal(5).lo, masks.causal(5).hi)))
  order = np.array([[4, 3, 2, 1, 0], [1, 0, -1, 3, 2]])
  taken = mask.take(k=order).dense()
  for row in range(2):
    dense = masks.causal(5).dense()
    expected = dense[:, np.maximum(order[row], 0)] & (order[row] >= 0)
    np.testing.assert_array_equal(taken[row], expected)
    assert not np.array_equal(taken[row], dense)


def test_jax_and_numpy_agree():
  mask = masks.prefix(6, 3)
  mask = dataclasses.replace(mask, q_class=np.array([0, 0, 1, -1, 2, 2], np.int32),
                             k_class=np.array([0, 0, 1, 1, 2, 2], np.int32))
  on_device = jax.tree.map(jnp.asarray, mask)
  np.testing.assert_array_equal(jax.jit(IntervalMask.dense)(on_device), mask.dense())


def test_a_query_of_class_minus_one_sees_class_zero_only():
  mask = dataclasses.replace(masks.full(3), q_class=np.full(3, -1, np.int32),
                             k_class=np.array([0, 1, 2], np.int32))
  np.testing.assert_array_equal(mask.dense(), np.array([[1, 0, 0]] * 3, bool))


@pytest.mark.parametrize("n,length", [(1, 0), (5, 0), (5, 1), (5, 3), (5, 5)])
def test_prefix_is_big_visions_rule(n, length):
  # In mask_ar, 0 continues the bidirectional block and 1 opens the next causal one.
  mask_ar = (np.arange(n) >= length).astype(np.int32)
  np.testing.assert_array_equal(masks.prefix(n, length).dense(), mask_ar_rule(mask_ar))
  if 1 < length < n:
    assert not np.array_equal(masks.prefix(n, length - 1).dense(), mask_ar_rule(mask_ar))


def test_blocks_are_big_visions_rule():
  # text, an image of three tokens that see each other, text: 1 1 | 1 0 0 | 1 1
  mask_ar = np.array([1, 1, 1, 0, 0, 1, 1])
  mask = masks.see_until(masks.causal(7), np.array([0, 0, 5, 5, 5, 0, 0]))
  np.testing.assert_array_equal(mask.dense(), mask_ar_rule(mask_ar))


def test_builders():
  index = np.arange(6)
  causal = index[:, None] >= index[None, :]
  np.testing.assert_array_equal(masks.causal(6).dense(), causal)
  np.testing.assert_array_equal(masks.full(6).dense(), np.ones((6, 6), bool))
  near = index[:, None] - index[None, :] < 2
  np.testing.assert_array_equal(masks.window(6, 2).dense(), causal & near)
  np.testing.assert_array_equal(masks.window(6, 9).dense(), causal)
  for mask in (masks.causal(4), masks.full(4), masks.window(4, 2), masks.prefix(4, 2)):
    assert mask.lo.dtype == mask.hi.dtype == np.int32


def test_empty_interval_sees_nothing():
  assert not IntervalMask(np.array([2, 3]), np.array([2, 1])).dense(4).any()


def test_picture():
  assert masks.prefix(4, 2).picture("ipss") == "\n".join([
    "  i p s s",
    "i 1 1 . .",
    "p 1 1 . .",
    "s 1 1 1 .",
    "s 1 1 1 1",
  ])
  with pytest.raises(ValueError, match="one row"):
    IntervalMask(np.zeros((2, 3)), np.ones((2, 3))).picture()
