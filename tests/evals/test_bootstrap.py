import numpy as np
import pytest

from vlm_jax.evals.bootstrap import interval


def test_it_is_the_normal_interval_of_a_large_sample():
  scores = np.random.default_rng(0).random(2000) < 0.3
  low, high = interval(scores, resamples=2000)
  spread = 1.96 * np.sqrt(0.3 * 0.7 / 2000)
  assert low < scores.mean() < high
  assert (high - low) / 2 == pytest.approx(spread, rel=0.08)


def test_it_covers_the_truth_as_often_as_it_says():
  rng = np.random.default_rng(1)
  inside = 0
  for trial in range(200):
    low, high = interval(rng.random(150) < 0.6, resamples=300, seed=trial)
    inside += low <= 0.6 <= high
  assert 0.88 <= inside / 200 <= 0.99


def test_seeds_and_constants():
  scores = np.random.default_rng(2).random(50)
  assert interval(scores, seed=3) == interval(scores, seed=3) != interval(scores, seed=4)
  assert interval(np.ones(7)) == (1.0, 1.0)
  with pytest.raises(ValueError, match="no scores"):
    interval(np.array([]))


def test_scores_that_belong_together_say_less():
  group = np.repeat(np.arange(200), 10)
  same = np.repeat(np.random.default_rng(3).random(200) < 0.5, 10)
  width = lambda **options: np.subtract(*interval(same, **options)[::-1])
  assert width(groups=group) == pytest.approx(width() * np.sqrt(10), rel=0.15)
  # Names serve as well as numbers, groups of one as well as none.
  assert interval(same, groups=group.astype(str))[0] == pytest.approx(
    interval(same, groups=group)[0], abs=0.02)
  np.testing.assert_allclose(interval(same, groups=np.arange(2000)), interval(same))
