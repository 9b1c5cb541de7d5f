"""A bias of the logits, whole or by distance, read and differentiated a tile at a time."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from vlm_jax.core.typing import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DistanceBias:
  """A learned number a head and bucket of distances (T5, arXiv:1910.10683, section 2.1).

  Half of the buckets of one direction are single distances from 0, the other half grow
  logarithmically up to `max_distance`; what is further away shares the last one.

  Attributes:
    table: f[H,N], N buckets; an even number when bidirectional.
    q_position, k_position: i32[B,T], i32[B,S].
    max_distance: where the buckets end.
    bidirectional: keys after the query have the upper half of the buckets; otherwise they all
      count as distance 0.
  """

  table: Array
  q_position: Array
  k_position: Array
  max_distance: int = dataclasses.field(default=128, metadata=dict(static=True))
  bidirectional: bool = dataclasses.field(default=True, metadata=dict(static=True))

  def buckets(self, query: Array, key: Array) -> Array:
    """Positions i32[...,T] and i32[...,S] to buckets i32[...,T,S]."""
    count = self.table.shape[1]
    ahead = key[..., None, :] - query[..., :, None]
    first = 0
    if self.bidirectional:
      count //= 2
      first, distance = jnp.where(ahead > 0, count, 0), jnp.abs(ahead)
    else:
      distance = jnp.maximum(-ahead, 0)
    exact = count // 2
    steps = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
    steps = steps / math.log(self.max_distance / exact) * (count - exact)
    far = jnp.minimum(exact + steps.astype(jnp.int32), count - 1)
    return first + jnp.where(distance < exact, distance, far)

  def values(self, query: Array, key: Array) -> Array:
    """Positions i32[T] and i32[S] to f32[H,T,S]."""
    # A product with one-hot buckets, exact because every sum has one term: its transpose is a
    # product too and always adds in the same order, unlike the scatter that a gather turns into.
    which = jax.nn.one_hot(self.buckets(query, key), self.table.shape[1], dtype=jnp.float32)
    return jnp.einsum("hn,tsn->hts", self.table.astype(jnp.float32), which,
                      precision=lax.Precision.HIGHEST)

  def dense(self) -> Array:
    """f32[B,H,T,S]."""
    return jax.vmap(self.values)(self.q_position, self.k_position)


Bias = Array | DistanceBias


def dense(bias: Bias) -> Array:
  """The whole bias f32[1 or B,H,T,S]."""
  return bias.dense() if isinstance(bias, DistanceBias) else bias.astype(jnp.float32)


def pad(bias: Bias | None, more_q: int, more_k: int) -> Bias | None:
  """With room for blocks that stick out over T and S."""
  if bias is None:
    return None
  if isinstance(bias, DistanceBias):
    longer = lambda x, more: jnp.pad(x, ((0, 0), (0, more)))
    return dataclasses.replace(bias, q_position=longer(bias.q_position, more_q),
                               k_position=longer(bias.k_position, more_k))
  return jnp.pad(bias, ((0, 0), (0, 0), (0, more_q), (0, more_k)))


@dataclasses.dataclass(frozen=True)
class Tile:
  """Where a tile lies. Attributes: row, q_start, k_start i32[]; sizes (queries, keys)."""

  row: Array
  q_start: Array
  k_start: Array
  sizes: tuple[int, int]

  def _corner(self, bias: Array) -> tuple:
    return (self.row if bias.shape[0] > 1 else 0, 0, self.q_start, self.k_start)

  def read(self, bias: Bias) -> Array:
    """f32[H,*sizes] of a padded bias."""
    if isinstance(bias, DistanceBias):
      return bias.values(*self._positions(bias))
    cut = lax.dynamic_slice(bias, self._corner(bias), (1, bias.shape[1], *self.sizes))
    return cut[0].astype(jnp.float32)

  def add(self, total: Array, bias: Bias, grad: Array) -> Array:
    """Adds the gradient f32[H,*sizes] of the tile to that of the bias (see `zeros`)."""
    if isinstance(bias, DistanceBias):
      query, key = self._positions(bias)
      values = lambda table: dataclasses.replace(bias, table=table).values(query, key)
      return total + jax.vjp(values, bias.table.astype(jnp.float32))[1](grad)[0]
    corner = self._corner(bias)
    old = lax.dynamic_slice(total, corner, (1, *grad.shape))
    return lax.dynamic_update_slice(total, old + grad[None], corner)

  def _positions(self, bias: DistanceBias) -> tuple[Array, Array]:
    cut = lambda x, start, size: lax.dynamic_slice(x, (self.row, start), (1, size))[0]
    return (cut(bias.q_position, self.q_start, self.sizes[0]),
            cut(bias.k_position, self.k_start, self.sizes[1]))


def zeros(bias: Bias | None) -> Array | None:
  """What gradients of tiles are added to: f32 of the numbers that a padded bias is made of."""
  if bias is None:
    return None
  return jnp.zeros((bias.table if isinstance(bias, DistanceBias) else bias).shape, jnp.float32)


def gradient(total: Array | None, bias: Bias | None) -> Bias | None:
  """The sum as the gradient of the bias before it was padded."""
  if bias is None:
    return None
  if isinstance(bias, DistanceBias):
    return dataclasses.replace(bias, table=total.astype(bias.table.dtype), q_position=None,
                               k_position=None)
  return total[:, :, : bias.shape[2], : bias.shape[3]].astype(bias.dtype)
