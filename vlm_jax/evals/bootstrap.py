"""How sure a mean is: percentile bootstrap (Efron 1979), seeded."""

import numpy as np

BLOCK = 64  # resamples drawn together


def interval(
  scores: np.ndarray,
  *,
  groups: np.ndarray | None = None,
  level: float = 0.95,
  resamples: int = 1000,
  seed: int = 0,
) -> tuple[float, float]:
  """The percentile interval of the mean of `scores`.

  Args:
    scores: f[n], one score per question.
    groups: i[n], scores that belong together (questions about one image); whole groups are drawn,
      since questions about one image are not independent. None: every score is its own group.
    level: coverage.
    resamples: how many times the groups are drawn again, with replacement.
    seed: of the draws.

  Returns:
    (low, high).

  Raises:
    ValueError: no scores.
  """
  scores = np.asarray(scores, np.float64)
  if not scores.size:
    raise ValueError("interval: there are no scores")
  if groups is None:
    sums, sizes = scores, np.ones_like(scores)
  else:
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    sums, sizes = np.bincount(index, scores), np.bincount(index).astype(np.float64)
  rng = np.random.default_rng(seed)
  means = []
  for start in range(0, resamples, BLOCK):
    draws = rng.integers(0, len(sums), (min(BLOCK, resamples - start), len(sums)))
    means.append(sums[draws].sum(1) / sizes[draws].sum(1))
  low, high = np.quantile(np.concatenate(means), ((1 - level) / 2, (1 + level) / 2))
  return float(low), float(high)
