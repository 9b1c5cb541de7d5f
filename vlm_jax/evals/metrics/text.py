"""Scores of one short answer: ANLS of document questions, relaxed accuracy of chart questions."""

from collections.abc import Sequence

ANLS_THRESHOLD = 0.5  # a distance of this share of the letters or more is no answer at all
RELAXED = 0.05  # relative error that a number may have


def levenshtein(a: str, b: str) -> int:
  """How many characters must be inserted, deleted or replaced to make `b` of `a`."""
  above = list(range(len(b) + 1))
  for row, left in enumerate(a, 1):
    now = [row]
    for column, right in enumerate(b, 1):
      now.append(min(above[column] + 1, now[-1] + 1, above[column - 1] + (left != right)))
    above = now
  return above[-1]


def anls(prediction: str, answers: Sequence[str]) -> float:
  """Normalised Levenshtein similarity to the nearest answer (arXiv:1907.00490, equation 1).

  Case and repeated white space do not count. Half of the letters wrong, or more, is 0.

  Raises:
    ValueError: no answers.
  """
  if not answers:
    raise ValueError("anls: a question needs at least one answer")
  plain = lambda text: " ".join(text.lower().split())
  said, best = plain(prediction), 0.0
  for answer in map(plain, answers):
    longest = max(len(said), len(answer))
    distance = levenshtein(said, answer) / longest if longest else 0.0
    best = max(best, 1 - distance if distance < ANLS_THRESHOLD else 0.0)
  return best


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
  """1.0 when the prediction is one of the answers, numbers within 5% (arXiv:2203.10244, 5.1).

  As in the common implementations of ChartQA, "12%" is the number 0.12, and an answer that is zero
  or not a number must be said letter by letter, but for case and surrounding white space.

  Raises:
    ValueError: no answers.
  """
  if not answers:
    raise ValueError("relaxed_accuracy: a question needs at least one answer")
  return float(any(_close(prediction.strip(), answer.strip()) for answer in answers))


def _close(prediction: str, answer: str) -> bool:
  said, true = _number(prediction), _number(answer)
  if said is None or not true:
    return prediction.lower() == answer.lower()
  return abs(said - true) / abs(true) <= RELAXED


def _number(text: str) -> float | None:
  try:
    return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
  except ValueError:
    return None
