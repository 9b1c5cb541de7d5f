"""Next-token losses that compute logits at predicted slots only and never hold B x T x V of them.

In most batches few slots are predicted (images, prompts and padding are not): those go to the front
of their rows, and a loop as long as the fullest row needs takes them through the vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.core.typing import Array
from vlm_jax.ops.gather import invert, take_rows
from vlm_jax.ops.vocabulary import Form, log_likelihoods, placement

CHUNK = (2048, 2048)  # slots and columns of the head whose logits a device holds at a time
PIECES, LEAST = 8, 128  # of a row; slots of all rows in a piece, at least


class TokenLosses(NamedTuple):
  """Losses of single slots, exactly 0 where none was wanted.

  Attributes:
    cross_entropy: f32[B,T], -log p(target), smoothed if asked for.
    z: f32[B,T], (log Z)^2 with Z the sum of exp(logits) (arXiv:2204.02311, section 5): it keeps
      logits from drifting. Its coefficient is the caller's, who adds it as an objective of its own.
  """

  cross_entropy: Array
  z: Array


def token_losses(
  hidden: Array,
  head: Array,
  targets: Array,
  wanted: Array,
  *,
  soft_cap: float | None = None,
  smoothing: float = 0.0,
  chunk: tuple[int, int] = CHUNK,
) -> TokenLosses:
  """The losses of the wanted slots.

  Args:
    hidden: f[B,T,D].
    head: f[D,V].
    targets: i32[B,T].
    wanted: bool[B,T]; other slots cost nothing, and get gradient 0.
    soft_cap: logits are soft_cap * tanh(logits / soft_cap); None: as they are.
    smoothing: s of label smoothing: the target has 1 - s + s / V of the distribution that p is
      held against, every other token s / V.
    chunk: slots (of all rows together) and columns of the head whose f32 logits are held at a time,
      at most; the backward pass computes them again.

  Raises:
    ValueError: shapes that do not fit, a soft cap that is not positive, smoothing outside [0, 1).
  """
  _check(hidden, head, targets, wanted, soft_cap, smoothing)
  batch, length, _ = hidden.shape
  rows = batch // placement(hidden.shape, head.shape).ways  # of one device
  size = piece(rows, length, chunk[0])
  wanted = wanted.astype(jnp.int32)
  place = jnp.where(wanted > 0, wanted.cumsum(axis=1) - 1, -1)
  order = invert(place, length + -length % size)
  compact = take_rows(hidden, order)
  chosen = take_rows(targets[..., None], order)[..., 0]
  form = Form(soft_cap, smoothing, size, chunk[1])
  values, norms = log_likelihoods(compact, head, chosen, wanted.sum(axis=1), form)
  back = take_rows(jnp.stack([values, norms], axis=-1), place)
  return TokenLosses(-back[..., 0], jnp.square(back[..., 1]))


def piece(rows: int, length: int, most: int) -> int:
  """How many slots of a row are taken at a time, `most` of all `rows` of a device together.

  A row's last piece is empty by half on average, so pieces are small; below `LEAST` slots reading
  the head takes longer than multiplying by it.
  """
  return max(1, min(length, most // rows, max(-(-length // PIECES), LEAST // rows)))


def _check(hidden, head, targets, wanted, soft_cap, smoothing) -> None:
  if hidden.ndim != 3 or head.ndim != 2 or hidden.shape[2] != head.shape[0]:
    raise ValueError(f"losses: hidden is [B,T,D] and head [D,V], got {hidden.shape} and "
                     f"{head.shape}")
  for name, array in (("targets", targets), ("wanted", wanted)):
    if array.shape != hidden.shape[:2]:
      raise ValueError(f"losses: {name} [B,T] must be {hidden.shape[:2]}, got {array.shape}")
  if soft_cap is not None and soft_cap <= 0:
    raise ValueError(f"losses: soft_cap must be positive, or None for none; got {soft_cap}")
  if not 0 <= smoothing < 1:
    raise ValueError(f"losses: smoothing must be in [0, 1), got {smoothing}")


def token_log_likelihoods(
  hidden: Array,
  head: Array,
  targets: Array,
  wanted: Array,
  *,
  soft_cap: float | None = None,
  chunk: tuple[int, int] = CHUNK,
) -> Array:
  """log p(target) of the wanted slots, exactly 0 elsewhere, f32[B,T]; see `token_losses`."""
  losses = token_losses(hidden, head, targets, wanted, soft_cap=soft_cap, chunk=chunk)
  return -losses.cross_entropy


def source_sums(values: Array, source_ids: Array, num_sources: int) -> Array:
  """f32[sources], the sum of `values` f[B,T] over the slots of each source."""
  one_hot = jax.nn.one_hot(source_ids, num_sources, dtype=jnp.float32)
  return jnp.einsum("bt,bts->s", values.astype(jnp.float32), one_hot)


def loss_sums(
  hidden: Array,
  head: Array,
  targets: Array,
  weights: Array,
  source_ids: Array,
  num_sources: int,
  **options,
) -> TokenLosses:
  """The weighted sums of the slots of each source, both losses f32[sources].

  Args:
    hidden: f[B,T,D].
    head: f[D,V].
    targets, source_ids: i32[B,T].
    weights: f32[B,T]; 0 leaves a slot out, exactly: it costs nothing and its gradient is 0.
    num_sources: how many sources the mix has.
    options: soft_cap, smoothing and chunk of `token_losses`.
  """
  losses = token_losses(hidden, head, targets, weights > 0, **options)
  return TokenLosses(*(source_sums(x * weights, source_ids, num_sources) for x in losses))


def cross_entropy_sums(
  hidden: Array,
  head: Array,
  targets: Array,
  weights: Array,
  source_ids: Array,
  num_sources: int,
  **options,
) -> Array:
  """f32[sources], the first of `loss_sums` for strategies without a z-loss; same arguments."""
  return loss_sums(
    hidden, head, targets, weights, source_ids, num_sources, **options
  ).cross_entropy
