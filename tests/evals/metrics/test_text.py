import random

import pytest
from anls import anls_score

from vlm_jax.evals.metrics import text


def test_anls_is_the_published_one():
  draw = random.Random()
  word = lambda: "".join(draw.choice("abcAB ") for _ in range(draw.randint(1, 7)))
  scores = []
  for _ in range(400):
    said, answers = word(), [word() for _ in range(draw.randint(1, 3))]
    scores.append(text.anls(said, answers))
    assert scores[-1] == pytest.approx(anls_score(said, answers), abs=1e-9), (said, answers)
  assert len(set(scores)) > 5 and min(scores) == 0


def test_anls_by_hand(monkeypatch):
  assert text.anls("Paris", ["paris "]) == 1 and text.anls("a  b", ["A B"]) == 1
  assert text.anls("ab", ["ac"]) == 0 and text.anls("abc", ["axx"]) == 0
  assert text.anls("kitten", ["sitting", "mitten"]) == pytest.approx(5 / 6)
  assert text.levenshtein("kitten", "sitting") == 3 == text.levenshtein("sitting", "kitten")
  assert text.anls("", ["x"]) == 0 and text.anls("", [""]) == 1
  with pytest.raises(ValueError, match="at least one"):
    text.anls("x", [])
  monkeypatch.setattr(text, "ANLS_THRESHOLD", 0.6)
  assert text.anls("ab", ["ac"]) == 0.5


@pytest.mark.parametrize("said,answers,want", [
  ("10.5", ["10"], 1), ("10.51", ["10"], 0), ("9.5", ["10"], 1), ("-10", ["10"], 0),
  ("12%", ["0.12"], 1), ("12", ["12%"], 0), ("Red", ["red"], 1), ("reds", ["red"], 0),
  ("0", ["0"], 1), ("0.0", ["0"], 0), ("ten", ["10"], 0), ("2010", ["2005", "2011"], 1),
  (" 3 ", ["3"], 1), ("1,000", ["1000"], 0), ("", ["1"], 0),
])
def test_relaxed_accuracy(said, answers, want):
  assert text.relaxed_accuracy(said, answers) == want


def test_relaxed_accuracy_needs_answers():
  with pytest.raises(ValueError, match="at least one"):
    text.relaxed_accuracy("x", [])
