"""Relative positions as a bias of attention logits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers

from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array
from vlm_jax.nn.linear import parameter
from vlm_jax.ops.attention import DistanceBias


def relations(height: int, width: int) -> np.ndarray:
  """i32[P,P], the number of the offset from place i to place j of a grid in reading order.

  Offsets (rows, columns) are counted from (1 - height, 1 - width) in reading order, so there are
  (2 height - 1)(2 width - 1) of them.
  """
  row, column = np.divmod(np.arange(height * width), width)
  rows, columns = row - row[:, None] + height - 1, column - column[:, None] + width - 1
  return (rows * (2 * width - 1) + columns).astype(np.int32)


class GridBias(nn.Module):
  """A learned number a head and offset between two places of one image (arXiv:2106.04803, eq. 3).

  Pairs of slots of different images, and pairs with a token in them, get 0.

  Attributes:
    heads: H.
    grid: rows and columns of places.
    precision: dtypes.
  """

  heads: int
  grid: tuple[int, int]
  precision: Precision

  @nn.compact
  def __call__(self, image: Array, place: Array) -> Array:
    """i32[B,T] image of the row and place in its grid (both -1 at tokens) to f32[B,H,T,T]."""
    height, width = self.grid
    count = (2 * height - 1) * (2 * width - 1)
    table = parameter(self, "table", initializers.normal(0.02), (self.heads, count),
                      ("heads", None), self.precision.param)
    pairs = table.astype(jnp.float32)[:, relations(height, width)]
    # Matrix products with one-hot places, exact because every sum has one term: the transpose of a
    # gather over all pairs of slots would be a scatter.
    which = jax.nn.one_hot(place, height * width, dtype=jnp.float32)  # zeros at -1
    exact = jax.lax.Precision.HIGHEST
    bias = jnp.einsum("bip,hpq->bhiq", which, pairs, precision=exact)
    bias = jnp.einsum("bhiq,bjq->bhij", bias, which, precision=exact)
    same = (image[:, :, None] == image[:, None, :])[:, None]
    return jnp.where(same, bias, 0.0)


class DistanceTable(nn.Module):
  """A learned number a head and bucket of distances in a text (T5, arXiv:1910.10683, section 2.1).

  Attributes:
    heads: H.
    buckets, max_distance, bidirectional: see `ops.attention.DistanceBias`.
    precision: dtypes.
  """

  heads: int
  buckets: int
  max_distance: int
  bidirectional: bool
  precision: Precision

  @nn.compact
  def __call__(self, queries: Array, keys: Array) -> DistanceBias:
    """Positions i32[B,T] and i32[B,S] to the bias of the logits between them."""
    table = parameter(self, "table", initializers.normal(0.02), (self.heads, self.buckets),
                      ("heads", None), self.precision.param)
    return DistanceBias(table, queries, keys, self.max_distance, self.bidirectional)
