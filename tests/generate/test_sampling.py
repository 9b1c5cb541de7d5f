import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.core.errors import UsageError
from vlm_jax.generate.sampling import Sampling, choose, nucleus

LOGITS = jnp.log(jnp.array([0.05, 0.5, 0.15, 0.3]))


@pytest.mark.parametrize(
  "top_p, kept",
  [(0.01, [1]), (0.49, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.81, [1, 2, 3]),
   (1.0, [0, 1, 2, 3])],
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p, kept):
  logits = nucleus(LOGITS, jnp.float32(top_p))
  assert np.flatnonzero(np.isfinite(logits)).tolist() == kept
  np.testing.assert_array_equal(logits[np.array(kept)], LOGITS[np.array(kept)])


def draws(temperature, top_p, count=4000):
  keys = jax.random.split(jax.random.key(0), count)
  logits = jnp.broadcast_to(LOGITS, (count, 4))
  warmth = jnp.float32(temperature) if temperature else None
  return choose(logits, keys, warmth, jnp.float32(top_p))


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.81)])
def test_draws_follow_the_distribution(temperature, top_p):
  tokens, log_probs = draws(temperature, top_p)
  want = np.exp(np.asarray(LOGITS, np.float64) / temperature)
  want /= want.sum()
  if top_p < 1:
    want[0] = 0
    want /= want.sum()
  got = np.bincount(np.asarray(tokens), minlength=4) / len(tokens)
  np.testing.assert_allclose(got, want, atol=0.025)
  assert (got[want == 0] == 0).all()
  # Log-probabilities are the model's own, whatever the temperature.
  np.testing.assert_allclose(log_probs, np.asarray(LOGITS)[np.asarray(tokens)], rtol=1e-5)


def test_a_wrong_temperature_would_be_seen():
  got = np.bincount(np.asarray(draws(1.0, 1.0)[0]), minlength=4) / 4000
  want = np.exp(np.asarray(LOGITS) / 2.0)
  assert np.abs(got - want / want.sum()).max() > 0.1


def test_greedy_takes_the_most_likely():
  assert (np.asarray(draws(0.0, 0.5)[0]) == 1).all()


@pytest.mark.parametrize("fields", [{"temperature": -0.1}, {"temperature": float("nan")},
                                    {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_settings_are_refused(fields):
  with pytest.raises(UsageError, match="--t"):
    Sampling(**fields)
