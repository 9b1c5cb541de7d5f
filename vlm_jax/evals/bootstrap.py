"""How sure a mean is, and a difference of two: percentile bootstrap (Efron 1979), seeded."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from vlm_jax.core.errors import UsageError

BLOCK = 64  # resamples drawn together
RESAMPLES = 1000


def resample(count: int, *, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[np.ndarray]:
  """Blocks i[b,count] of draws with replacement from 0..count-1, `resamples` rows in all.

  Raises:
    UsageError: a negative seed.
  """
  if seed < 0:
    raise UsageError(f"the seed of the bootstrap is {seed}; use 0 or more")
  rng = np.random.default_rng(seed)
  for start in range(0, resamples, BLOCK):
    yield rng.integers(0, count, (min(BLOCK, resamples - start), count))


def interval(
  scores: np.ndarray,
  *,
  groups: np.ndarray | None = None,
  level: float = 0.95,
  resamples: int = RESAMPLES,
  seed: int = 0,
) -> tuple[float, float]:
  """The percentile interval of the mean of `scores`.

  Args:
    scores: f[n], one score per question.
    groups: [n], scores that belong together (questions about one image); whole groups are drawn,
      since questions about one image are not independent. None: every score is its own group.
    level: coverage.
    resamples: how many times the groups are drawn again, with replacement.
    seed: of the draws.

  Returns:
    (low, high).

  Raises:
    ValueError: no scores.
  """
  means = _means(scores, groups, resamples, seed)
  low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
  return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Difference:
  """How much better B is than A.

  Attributes:
    difference: mean score of B minus mean score of A, over the same questions.
    low, high: its 95% interval.
    p: two-sided p-value of "no difference": twice the share of resamples on the other side of 0
      (counting those at 0), never below 1 / resamples.
  """

  difference: float
  low: float
  high: float
  p: float


def paired(
  a: np.ndarray,
  b: np.ndarray,
  *,
  groups: np.ndarray | None = None,
  resamples: int = 10_000,
  seed: int = 0,
) -> Difference:
  """The paired bootstrap of two systems that answered the same questions.

  The same questions are drawn for both, so what makes a question hard for both cancels out: the
  interval is much narrower than that of two separate samples.

  Args:
    a, b: f[n], the scores of question i under A and under B.
    groups, resamples, seed: as in `interval`.

  Raises:
    ValueError: no scores, or not as many.
  """
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if a.shape != b.shape:
    raise ValueError(f"paired: {a.size} scores of A and {b.size} of B")
  means = _means(b - a, groups, resamples, seed)
  low, high = np.quantile(means, (0.025, 0.975))
  tail = min((means <= 0).mean(), (means >= 0).mean())
  p = min(1.0, max(2 * float(tail), 1 / resamples))
  return Difference(float((b - a).mean()), float(low), float(high), p)


def _means(scores: np.ndarray, groups: np.ndarray | None, resamples: int, seed: int) -> np.ndarray:
  """f64[resamples], the mean of every resample."""
  scores = np.asarray(scores, np.float64)
  if not scores.size:
    raise ValueError("bootstrap: there are no scores")
  if groups is None:
    sums, sizes = scores, np.ones_like(scores)
  else:
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    sums, sizes = np.bincount(index, scores), np.bincount(index).astype(np.float64)
  return np.concatenate([sums[draws].sum(1) / sizes[draws].sum(1)
                         for draws in resample(len(sums), resamples=resamples, seed=seed)])
