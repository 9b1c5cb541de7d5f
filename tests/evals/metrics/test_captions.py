"""Against the scorers of pycocoevalcap, on captions that are new in every run of the loop."""

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from vlm_jax.evals.metrics import captions

WORDS = "a the man dog cat red big on in with sits runs park".split()
HAND = [  # (caption, references): empty, repeated, shorter, longer, equal, nothing in common
  ("", ["a dog"]), ("a dog", ["", "a dog"]), ("", [""]),
  ("the the the the the the", ["the the cat"]),
  ("a man", ["a man sits on the big red dog in the park"]),
  ("a man sits on the big red dog in the park", ["a man", "the dog"]),
  ("a dog runs", ["a dog runs", "a dog runs"]), ("cat", ["red park", "big"]),
  ("a dog runs in the park", ["in the park a dog runs", "runs park the in dog a"]),
]


def corpus(seed, count=40):
  rng = np.random.default_rng(seed)
  draw = lambda low: " ".join(rng.choice(WORDS, rng.integers(low, 14)))
  return [(draw(0), [draw(1) for _ in range(rng.integers(1, 6))]) for _ in range(count)]


def both(pairs):
  """Ours and theirs: {name: f64[pictures] or f64[4] of the corpus}."""
  mine = [caption.split() for caption, _ in pairs]
  truth = [[reference.split() for reference in references] for _, references in pairs]
  counts = captions.bleu_counts(mine, truth)
  ours = {"bleu": captions.bleu(counts), "cider": captions.cider_d(mine, truth),
          "rouge": np.array([captions.rouge_l(*pair) for pair in zip(mine, truth, strict=True)])}
  said = {i: [caption] for i, (caption, _) in enumerate(pairs)}
  known = {i: references for i, (_, references) in enumerate(pairs)}
  theirs = {"bleu": np.array(Bleu(4).compute_score(known, said, verbose=0)[0]),
            "cider": Cider().compute_score(known, said)[1],
            "rouge": Rouge().compute_score(known, said)[1]}
  return ours, theirs


def worst(pairs):
  ours, theirs = both(pairs)
  return {name: float(np.abs(ours[name] - theirs[name]).max()) for name in ours}


@pytest.mark.parametrize("pairs", [corpus(0), corpus(1, 7), corpus(2, 300), HAND, HAND[7:8],
                                   corpus(3, 1)],
                         ids=["40", "7", "300", "hand", "one", "one_random"])
def test_every_score_is_the_original_one(pairs):
  ours, theirs = both(pairs)
  for name, values in theirs.items():
    assert np.isfinite(values).all(), name
    assert len(pairs) < 5 or np.ptp(values) > 0, name
    np.testing.assert_allclose(ours[name], values, atol=1e-9, rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("name,value,breaks", [
  ("SIGMA", 5.0, "cider"), ("BETA", 1.0, "rouge"), ("MAX_N", 3, "cider")])
def test_a_wrong_constant_is_seen(name, value, breaks, monkeypatch):
  monkeypatch.setattr(captions, name, value)
  if name == "MAX_N":  # the default argument was bound when the file was read
    grams = captions.ngrams
    monkeypatch.setattr(captions, "ngrams", lambda words: grams(words, 3))
    pairs = corpus(0)
    mine = [caption.split() for caption, _ in pairs]
    truth = [[reference.split() for reference in references] for _, references in pairs]
    theirs = Cider().compute_score(dict(enumerate(r for _, r in pairs)),
                                   {i: [c] for i, (c, _) in enumerate(pairs)})[1]
    assert np.abs(captions.cider_d(mine, truth) - theirs).max() > 1e-4
  else:
    assert worst(corpus(0))[breaks] > 1e-4


def test_a_broken_clip_or_brevity_penalty_is_seen(monkeypatch):
  pairs = corpus(5)
  assert max(worst(pairs).values()) < 1e-9
  with monkeypatch.context() as patch:
    patch.setattr(captions.Counter, "__and__", lambda a, b: type(a)(
      {gram: count for gram, count in a.items() if gram in b}))
    assert worst(pairs)["bleu"] > 1e-4
  with monkeypatch.context() as patch:
    patch.setattr(captions, "min", max, raising=False)
    assert worst(pairs)["cider"] > 1e-4
  with monkeypatch.context() as patch:
    patch.setattr(captions.np, "where", lambda test, yes, no: no + 0 * yes)
    short = [(caption[:8], references) for caption, references in pairs]
    assert worst(short)["bleu"] > 1e-4


def test_bleu_of_drawn_rows_is_bleu_of_those_captions():
  pairs = corpus(6)
  counts = lambda chosen: captions.bleu_counts(
    [c.split() for c, _ in chosen], [[r.split() for r in refs] for _, refs in chosen])
  rows = np.random.default_rng(0).integers(0, len(pairs), (3, len(pairs)))
  drawn = captions.bleu(counts(pairs), rows)
  for row, values in zip(rows, drawn, strict=True):
    np.testing.assert_allclose(values, captions.bleu(counts([pairs[i] for i in row])))
  assert np.ptp(drawn[:, 3]) > 0


def test_missing_references_are_refused():
  with pytest.raises(ValueError, match="at least one reference"):
    captions.cider_d([["a"]], [[]])
  with pytest.raises(ValueError, match="2 captions for 1"):
    captions.bleu_counts([["a"], ["b"]], [[["a"]]])
