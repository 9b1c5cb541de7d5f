"""Pairs ranked again by matching, against every pair matched alone and sorted by hand."""

import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from tests.evals.kinds import test_embedders as embedders
from tests.fusion import contrast as c
from tests.fusion import testing as t
from vlm_jax.configs import base
from vlm_jax.core.document import Encoded
from vlm_jax.core.errors import UsageError
from vlm_jax.evals import embed, pairs, run
from vlm_jax.evals.kinds import retrieval
from vlm_jax.evals.metrics.retrieval import nearest, reranked

TOLERANCE, LOUD = 2e-6, 100
BEST, PICTURES = 2, 5
OWNERS = np.array([0, 1, 1, 2, 3, 3, 4])  # of the captions


@pytest.fixture(scope="module")
def asked(setup):
  """A config that ranks captions again, and a model of noise."""
  config = c.get_config("blip2_qformer")
  config.data.root, config.data.bad_limit = setup[0].data.root, 0.5
  config.data.template = "caption"
  vocabulary = setup[0].llm.vocab_size
  config.llm.update(vocab_size=vocabulary, positions=12)
  config.connector.update(vocab_size=vocabulary, positions=12)
  config.data.sources.pictures = base.source(name=embedders.SOURCE, form="caption")
  config.evals.find = base.evaluation(kind="retrieval", source="pictures", split="test", batch=3,
                                      rerank=BEST, controls=("shuffled",))
  return config, c.sharp_params(config)


@pytest.fixture(scope="module")
def found():
  """Pictures and captions of noise, no two of which are equal."""
  rng = np.random.default_rng(2)
  captions = [(f"c{number}", str(number), (c.text(rng, 3 + number % 4),))
              for number in range(len(OWNERS))]
  return retrieval.Candidates(
    [(f"p{number}", (t.pixels(rng),)) for number in range(PICTURES)], captions, OWNERS, "pairs")


@pytest.fixture(scope="module")
def by_hand(asked, found):
  """Cosines and logits of belonging together f[pictures, captions]; each pair in its own row."""
  config, params = asked
  every = [Encoded((*picture, *text), "pairs", f"{row} {column}")
           for row, (_, picture) in enumerate(found.pictures)
           for column, (_, _, text) in enumerate(found.captions)]
  config = config.copy_and_resolve_references()
  config.data.update(rows=len(every), images=1)
  flat, where = c.pack(t.lay_out(every, config), config)
  at = [where[one.key][0] for one in every]
  frozen = FrozenConfigDict(config)
  out = embed.embeddings(frozen, params, flat)
  cosines = np.einsum("bke,be->bk", np.asarray(out.image)[at, 0], np.asarray(out.text)[at, 0])
  logits = np.asarray(pairs._matching(frozen, params, flat))[at, 1]
  return [one.reshape(PICTURES, -1) for one in (cosines.max(1), logits)]


def sorted_by_hand(cosines, logits, owners, best) -> dict[str, float]:
  """R@1, R@5 of the k best by cosine sorted by the sum, then the others by cosine."""

  def order(one, other):
    first = sorted(range(len(one)), key=lambda place: -one[place])
    again = sorted(first[:best], key=lambda place: -(one[place] + other[place]))
    return again + first[best:]

  found = {}
  to_text = [order(*rows) for rows in zip(cosines, logits, strict=True)]
  to_image = [order(*rows) for rows in zip(cosines.T, logits.T, strict=True)]
  for k in (1, 5):
    found[f"image_to_text@{k}"] = np.mean([
      any(owners[text] == row for text in texts[:k]) for row, texts in enumerate(to_text)])
    found[f"text_to_image@{k}"] = np.mean([
      owners[text] in images[:k] for text, images in enumerate(to_image)])
  return found


def test_the_best_are_ranked_again_by_cosine_and_logit(asked, found, by_hand):
  (config, params), (cosines, logits) = asked, by_hand
  numbers, rows = retrieval.compared(config, params, found, config.evals.find)
  expected = sorted_by_hand(cosines, logits, OWNERS, BEST)
  first = sorted_by_hand(cosines, 0 * logits, OWNERS, BEST)
  for name, value in expected.items():
    assert numbers[name] == pytest.approx(value), name
    assert numbers[name.replace("@", "_cosine@")] == pytest.approx(first[name]), name
  by_text = nearest(cosines, BEST, 0)
  chosen = by_text | nearest(cosines, BEST, 1)
  assert numbers["matched"] == chosen.sum() < numbers["pairs"] == cosines.size
  assert numbers["low"] <= numbers["text_to_image@1"] <= numbers["high"]
  assert expected != first
  # Every pair is matched as if alone, although texts share the picture of a call.
  own = lambda scores: scores[OWNERS, np.arange(len(OWNERS))]
  off = lambda scores: np.abs([row["match"] for row in rows] - own(scores)).max() / np.abs(
    own(scores)).max()
  print(f"sums {off(reranked(cosines, logits, by_text)):.1e}")
  assert off(reranked(cosines, logits, by_text)) < TOLERANCE
  # Twins: more of the best, the logit alone, the logit of another pair.
  for wrong in (reranked(cosines, logits, chosen | nearest(cosines, BEST + 1, 0)),
                reranked(0 * cosines, logits, by_text),
                reranked(cosines, np.roll(logits, 1, axis=1), by_text)):
    assert off(wrong) > LOUD * TOLERANCE


def test_an_evaluation_says_both(asked):
  config, params = asked
  results = run.evaluate(config, params, None, names=["find"])["find"]
  for numbers in (results, results["controls"]["shuffled"]):
    for name in ("text_to_image", "image_to_text"):
      assert {f"{name}@5", f"{name}_cosine@5"} <= numbers.keys()
  assert 0 < results["matched"] < results["pairs"]


def test_others_stay_behind_in_their_order():
  rng = np.random.default_rng(0)
  cosines, matches = rng.uniform(-1, 1, (6, 9)), rng.normal(0, 30, (6, 9))
  for axis, count in ((0, 2), (1, 4)):
    chosen = nearest(cosines, count, axis)
    assert (chosen.sum(axis) == count).all()
    again = reranked(cosines, matches, chosen)
    assert again[~chosen].max() < again[chosen].min()
    assert (np.argsort(again[~chosen]) == np.argsort(cosines[~chosen])).all()
    np.testing.assert_array_equal(again[chosen], (cosines + matches)[chosen])
  equal = nearest(np.zeros((3, 4)), 2, 1)
  assert equal.tolist() == [[True, True, False, False]] * 3


def test_what_cannot_be_ranked_again(asked, setup):
  config, params = asked
  config = config.copy_and_resolve_references()
  config.evals.find.rerank = -1
  with pytest.raises(UsageError, match="rerank is -1; use 0 for none"):
    run.evaluate(config, params, None, names=["find"])
  config.evals.find.rerank = BEST
  for name in ("clip", "prefix_lm"):
    config.fusion.name = name
    with pytest.raises(UsageError, match=f"rerank is 2, but config.fusion.name '{name}' has no"):
      run.evaluate(config, params, None, names=["find"])
