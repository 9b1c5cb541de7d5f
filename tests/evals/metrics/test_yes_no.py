import numpy as np
import pytest

from vlm_jax.evals.metrics.yes_no import pope, says_yes


@pytest.mark.parametrize("answer,want", [
  ("Yes, there is a dog.", True), ("no", False), ("No, there is not.", False), ("Nope", True),
  ("There is not a dog", False), ("yes. no", True), ("yes no", False), ("", True), ("NO", True),
])
def test_answers_are_read_as_pope_reads_them(answer, want):
  assert says_yes(answer) is want


def test_numbers_are_those_of_the_four_counts():
  rng = np.random.default_rng()
  said, truth = rng.random(200) < 0.7, rng.random(200) < 0.5
  got = pope(said, truth)
  tp, fp = sum(said & truth), sum(said & ~truth)
  tn, fn = sum(~said & ~truth), sum(~said & truth)
  want = {"accuracy": (tp + tn) / 200, "precision": tp / (tp + fp), "recall": tp / (tp + fn),
          "f1": 2 * tp / (2 * tp + fp + fn), "yes_ratio": (tp + fp) / 200}
  assert got == pytest.approx(want) and len(set(got.values())) == 5
  # Yes and no are not alike, nor are what was said and what is true.
  assert pope(~said, ~truth)["f1"] != pytest.approx(want["f1"])
  assert pope(truth, said)["precision"] == pytest.approx(want["recall"])


def test_the_ends():
  assert pope([True], [True]) == dict.fromkeys(("accuracy", "precision", "recall", "f1",
                                                "yes_ratio"), 1.0)
  assert pope([False], [True]) == dict.fromkeys(("accuracy", "precision", "recall", "f1",
                                                 "yes_ratio"), 0.0)
  with pytest.raises(ValueError, match="0 answers"):
    pope([], [])
  with pytest.raises(ValueError, match="1 answers to 2"):
    pope([True], [True, False])
