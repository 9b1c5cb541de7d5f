"""POPE: does the model see what is there, or say yes to everything? (arXiv:2305.10355)."""

from collections.abc import Sequence

import numpy as np

NO = frozenset(("No", "not", "no"))


def says_yes(answer: str) -> bool:
  """How the POPE evaluation reads an answer: no when its first sentence has "No", "no" or "not"."""
  words = answer.split(".")[0].replace(",", "").split(" ")
  return not NO.intersection(words)


def pope(said: Sequence[bool], truth: Sequence[bool]) -> dict[str, float]:
  """The numbers that POPE reports; yes is the positive class.

  Args:
    said: bool[n], the model said yes.
    truth: bool[n], yes is right.

  Returns:
    {"accuracy", "precision", "recall", "f1", "yes_ratio"}, each in [0, 1]; a share of nothing is 0.

  Raises:
    ValueError: no questions, or not as many answers.
  """
  yes, right = np.asarray(said, bool), np.asarray(truth, bool)
  if not yes.size or yes.shape != right.shape:
    raise ValueError(f"pope: {yes.size} answers to {right.size} questions")
  hits = int((yes & right).sum())
  share = lambda part, whole: float(part / whole) if whole else 0.0
  precision, recall = share(hits, int(yes.sum())), share(hits, int(right.sum()))
  return {
    "accuracy": float((yes == right).mean()),
    "precision": precision,
    "recall": recall,
    "f1": share(2 * precision * recall, precision + recall),
    "yes_ratio": float(yes.mean()),
  }
