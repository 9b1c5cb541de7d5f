"""Who sees whom, as data: two or three int32 per token instead of a T x S matrix.

Query i sees key j when

    lo[i] <= k_index[j] < hi[i]   and
    (q_class[i] == 0  or  k_class[j] == 0  or  q_class[i] == k_class[j])

A query of class -1 sees class 0 only. `k_index` is the key's order in the packed row before any
permutation, drop or cache layout (None: j); it is never `positions`, which feed RoPE and restart
per document. An empty interval (lo >= hi) sees nothing: its output and gradient are 0.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.core.typing import Array

NEVER = np.int32(2**30)  # the k_index of a key that no query may see (an empty cache slot)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IntervalMask:
  """An attention mask; see the module's rule.

  Attributes:
    lo, hi: i32[..., T], the visible keys of each query, half open.
    q_class: i32[..., T] or None (every query sees every class).
    k_class: i32[..., S] or None (every key has class 0).
    k_index: i32[..., S] or None (key j has index j).
  None is static: kernels compile without the comparison.
  """

  lo: Array
  hi: Array
  q_class: Array | None = None
  k_class: Array | None = None
  k_index: Array | None = None

  @property
  def num_queries(self) -> int:
    return self.lo.shape[-1]

  def keys(self, default: int | None = None) -> int:
    """The number of keys S, read from a key field; without one, `default` or as many as queries."""
    for field in (self.k_class, self.k_index):
      if field is not None:
        return field.shape[-1]
    return self.num_queries if default is None else default

  def dense(self, num_keys: int | None = None) -> Array:
    """The mask as bool[..., T, S]; the oracle of every kernel, not for long sequences."""
    num_keys = self.keys(num_keys)
    xp = np if isinstance(self.lo, np.ndarray) else jnp
    index = xp.arange(num_keys) if self.k_index is None else self.k_index[..., None, :]
    seen = (self.lo[..., :, None] <= index) & (index < self.hi[..., :, None])
    if self.q_class is not None and self.k_class is not None:
      query, key = self.q_class[..., :, None], self.k_class[..., None, :]
      seen &= (query == 0) | (key == 0) | (query == key)
    return seen

  def take(self, q: Array | None = None, k: Array | None = None) -> "IntervalMask":
    """The mask of the queries `q` i32[..., t] and the keys `k` i32[..., s]: exact.

    Dropping, permuting or caching tokens only moves their metadata. An index of -1 in `k` makes a
    key that nobody sees, in `q` a query that sees nothing.
    """
    xp = np if isinstance(self.lo, np.ndarray) else jnp

    def pick(field, index, absent):
      if field is None:
        return None
      index = xp.broadcast_to(index, field.shape[:-1] + index.shape[-1:])
      return xp.where(index < 0, absent, xp.take_along_axis(field, xp.maximum(index, 0), -1))

    lo, hi, q_class, k_class, k_index = self.lo, self.hi, self.q_class, self.k_class, self.k_index
    if q is not None:
      lo, hi, q_class = pick(lo, q, 0), pick(hi, q, 0), pick(q_class, q, 0)
    if k is not None:
      index = k if k_index is None else pick(k_index, k, NEVER)
      index = xp.where(k < 0, NEVER, index)
      k_index = xp.broadcast_to(index, self.lo.shape[:-1] + k.shape[-1:]).astype(xp.int32)
      k_class = pick(k_class, k, 0)
    return IntervalMask(lo, hi, q_class, k_class, k_index)

  def within(self, own: Array, window: int) -> "IntervalMask":
    """The mask of which a query sees at most `window` keys back, its own counted; ahead, as before.

    Args:
      own: i32[..., T], the `k_index` of every query's own key.
      window: in units of `k_index`.
    """
    host = isinstance(self.lo, np.ndarray) and isinstance(own, np.ndarray)
    xp = np if host else jnp
    return dataclasses.replace(self, lo=xp.maximum(self.lo, own - window + 1))

  def picture(self, labels: str = "", num_keys: int | None = None) -> str:
    """The mask of one row as the 0/1 picture of the docstrings: a '1' per visible key, '.' else."""
    return draw(np.asarray(self.dense(num_keys)), labels)


def draw(dense: np.ndarray, labels: str = "") -> str:
  """The picture of bool[T,S], with a label for every column, the first T of which are the rows'.

  Raises:
    ValueError: more than one row of a batch.
  """
  if dense.ndim != 2:
    raise ValueError(f"picture draws one row: take mask.lo[b], got shape {dense.shape}")
  lines = [" ".join("1" if seen else "." for seen in row) for row in dense]
  if labels:
    lines = [" ".join(labels[: dense.shape[1]])] + lines
    marks = " " + labels[: len(dense)]
    lines = [f"{mark} {line}" for mark, line in zip(marks, lines, strict=True)]
  return "\n".join(lines)


# Builders for one document of n tokens (numpy, on the host). Packing shifts lo and hi.


def causal(n: int) -> IntervalMask:
  """Each token sees itself and everything before it."""
  return IntervalMask(np.zeros(n, np.int32), np.arange(1, n + 1, dtype=np.int32))


def full(n: int) -> IntervalMask:
  """Every token sees every token (encoders)."""
  return IntervalMask(np.zeros(n, np.int32), np.full(n, n, np.int32))


def window(n: int, size: int) -> IntervalMask:
  """Causal, at most `size` tokens back, the token itself counted."""
  return causal(n).within(np.arange(n, dtype=np.int32), size)


def prefix(n: int, length: int) -> IntervalMask:
  """The first `length` tokens see each other; the rest is causal."""
  return see_until(causal(n), np.where(np.arange(n) < length, length, 0))


def see_until(mask: IntervalMask, end: np.ndarray) -> IntervalMask:
  """Lets query i also see ahead to `end[i]` (0: as before): bidirectional blocks and prefixes.

  Args:
    mask: any mask of n queries.
    end: i32[n], the end of the block that token i belongs to, 0 outside blocks.
  """
  return dataclasses.replace(mask, hi=np.maximum(mask.hi, end).astype(np.int32))
