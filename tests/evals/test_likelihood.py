"""Documents are scored in rows about as long as they are, by few programs."""

import numpy as np

from tests.generate.helpers import fan_out, noise, question, tiny
from vlm_jax.evals import likelihood
from vlm_jax.generate.prompts import layouts

LENGTHS = (3, 9, 20, 24, 40, 41, 110, 130)  # of texts, behind an image of 4 slots
WIDTHS = {32, 64, 128, 256}


def test_short_rows_are_short_and_scores_the_same(monkeypatch):
  config = tiny("concat", attend="causal")
  params = noise(config)
  laid_out = layouts([question(n, seed=n) for n in LENGTHS] + [fan_out([9, 7], 1)], config)
  for layout in laid_out:
    layout.arrays["streams/text/loss_weights/lm"][:] = 1
  widths = []
  run = likelihood.log_likelihoods
  monkeypatch.setattr(likelihood, "log_likelihoods", lambda config, params, flat: (
    widths.append(flat["streams/text/tokens"].shape[1]), run(config, params, flat))[1])

  def score():
    widths.clear()
    before = run._cache_size()
    found = {n: log_p for n, log_p, _ in likelihood.of_layouts(config, params, laid_out, 1)}
    return found, sorted(widths), run._cache_size() - before

  monkeypatch.setattr(likelihood, "FINE", 32)
  fine, narrow, programs = score()
  assert set(narrow) == WIDTHS and programs == len(WIDTHS)
  monkeypatch.setattr(likelihood, "FINE", likelihood.BUCKET)
  coarse, wide, _ = score()
  print(f"slots {sum(narrow)} instead of {sum(wide)}, {programs} programs")
  assert sum(narrow) < 0.6 * sum(wide)
  for number, log_p in fine.items():
    assert np.isfinite(log_p).all() and log_p.std() > 0.1
    np.testing.assert_allclose(log_p, coarse[number], rtol=0, atol=2e-5)
