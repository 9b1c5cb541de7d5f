"""Golden cases written out from the rules of the official VQA evaluation."""

import pytest

from vlm_jax.evals.metrics.vqa import CONTRACTIONS, exact_match, normalise, vqa_accuracy


@pytest.mark.parametrize("text, want", [
  ("Red", "red"),
  ("  an apple\ta\nDay ", "apple day"),
  ("The one", "1"),
  ("none", "0"), ("zero", "0"), ("ten", "10"), ("eleven", "eleven"),
  ("dont", "don't"), ("couldn'tve", "couldn't've"), ("couldnt've", "couldn't've"),
  ("'ow'sat", "'ow's'at"), ("y'all'dve", "y'all'd've"), ("oclock", "o'clock"),
  ("somebody'd", "somebodyd"),  # the table's own mistake
  ("Im", "im"),  # lower-cased before the table could know it
  ("black/white", "black white"),
  ("yes, it is", "yes it is"),
  ("yes!", "yes"),
  ("t-shirt", "t shirt"),
  ("a - b", "b"),  # next to a space the mark vanishes; "a" is an article
  ("up -down", "up down"),
  ("1,000 men", "1000 men"),
  ("red/blue 1,000", "redblue 1000"),  # digits around one comma remove every mark
  ("3.5", "3.5"), ("5.", "5"), ("a.b", "ab"), (".x", "x"), ("x.5", "x.5"),
  ("." * 40, "." * 8),  # at most 32 periods are removed
  ("what's", "what's"),  # the apostrophe is not punctuation here
  ("$5%", "$5%"), ("50:50", "50:50"),  # nor are these
  ("", ""),
])
def test_normalise(text, want):
  assert normalise(text) == want


def test_contractions_only_add_an_apostrophe():
  assert len(CONTRACTIONS) == 114
  for wrong, word in CONTRACTIONS.items():
    if wrong != "somebody'd":
      assert len(word) == len(wrong) + 1 and word.replace("'", "") == wrong.replace("'", "")


@pytest.mark.parametrize(
  "matches, want", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)]
)
def test_ten_annotators(matches, want):
  answers = ["2"] * matches + ["three"] * (10 - matches)
  assert vqa_accuracy("Two.", answers) == pytest.approx(want)


def test_answers_are_normalised_only_when_annotators_differ():
  assert vqa_accuracy("Yes", ["yes"] * 10) == 0
  assert vqa_accuracy(" yes\n", ["yes"] * 10) == 1
  assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1


def test_a_single_truth():
  assert vqa_accuracy("The  red!", ["red"]) == 1
  assert vqa_accuracy("reddish", ["red"]) == 0
  assert exact_match("red ", ["red"]) == 1 and exact_match("Red", ["red"]) == 0
  with pytest.raises(ValueError, match="at least one"):
    vqa_accuracy("red", [])
