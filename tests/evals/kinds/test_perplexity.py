"""Perplexity against a computation by hand: one window of text at a time, from all its logits."""

import numpy as np
import pytest

from tests.generate.helpers import forward
from vlm_jax.core.document import Encoded, Tokens
from vlm_jax.core.errors import DataError
from vlm_jax.data import pipeline
from vlm_jax.evals.kinds import perplexity

WINDOW = 24


def changed(config, window=WINDOW, **fields):
  config = config.copy_and_resolve_references()
  config.data.window = window
  config.evals.read.update(fields)
  return config


def by_hand(config, params, split, off=0):
  """-log p of every predicted token; `off` reads the wrong slot, to see that it would be seen."""
  words = pipeline.load_tokenizer(config)
  losses = []
  for index, document in enumerate(pipeline.documents(config, "words", split, "text")):
    text = document.parts[0].text
    if not text.strip():
      continue
    ids = np.array([words.bos, *words.encode(text), words.eos], np.int32)
    rng = np.random.default_rng([config.seed, index])
    for start in range(0, len(ids), WINDOW):
      window = ids[start : start + WINDOW]
      cut = int(rng.integers(0, len(window)))  # SimVLM's prefix, which sees itself
      logits = as_prompt(config, params, window, cut)
      for slot in range(max(cut - 1, 0), len(window) - 1):
        row = logits[slot - off]
        losses.append(np.logaddexp.reduce(row) - row[window[slot + 1]])
  return np.array(losses, np.float64)


def as_prompt(config, params, ids, cut):
  """Logits of a text whose first `cut` tokens are a prompt and the rest its answer."""
  config = config.copy_and_resolve_references()
  if cut < 2:  # a prefix of one token is no prefix
    config.fusion.name, cut = "concat", 1
  said = lambda ids, loss: Tokens(ids, np.full(len(ids), loss))
  parts = tuple(part for part in (said(ids[:cut], False), said(ids[cut:], True)) if len(part.ids))
  logits, _ = forward(config, params, [Encoded(parts, "words", "by hand")])[0]
  return logits.astype(np.float64)


def test_it_is_the_hand_computation(setup):
  config, params = changed(setup[0]), setup[1]
  numbers, predictions = perplexity.run(config, params, config.evals.read, "test")
  losses = by_hand(config, params, "test")
  assert predictions == {} and numbers["tokens"] == len(losses) > 200
  assert numbers["documents"] > 3 and numbers["bad"] == 1
  assert numbers["loss"] == pytest.approx(losses.mean(), rel=1e-5)
  assert numbers["perplexity"] == pytest.approx(np.exp(losses.mean()), rel=1e-4)
  assert numbers["low"] < numbers["perplexity"] < numbers["high"]
  wrong = by_hand(config, params, "test", off=1)
  assert abs(wrong.mean() - losses.mean()) > 100 * 1e-5 * losses.mean()


def test_the_same_tokens_whatever_the_batch(setup):
  config, params = changed(setup[0]), setup[1]
  two = changed(config, batch=2)
  numbers = [perplexity.run(c, params, c.evals.read, "test")[0] for c in (config, two)]
  for name in ("loss", "tokens", "low", "high"):
    assert numbers[0][name] == pytest.approx(numbers[1][name], rel=1e-5)


def test_nothing_to_predict_is_said(setup):
  config = changed(setup[0], window=1, limit=1)
  with pytest.raises(DataError, match="no token to predict"):
    perplexity.run(config, setup[1], config.evals.read, "test")
