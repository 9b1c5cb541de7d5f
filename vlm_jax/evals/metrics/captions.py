"""BLEU, ROUGE-L and CIDEr-D of captions, as the COCO caption evaluation computes them.

Captions come as lists of words (see `ptb.tokenize`). The constants of the original (tiny numbers
against division by zero, the number of bigrams taken for the length in CIDEr-D, one empty word for
an empty caption) are kept, because published numbers depend on them.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

Words = Sequence[str]
MAX_N = 4
SIGMA = 6.0  # CIDEr-D: width of the penalty for another length, in words
BETA = 1.2  # ROUGE-L: how much recall weighs beside precision


def ngrams(words: Words, max_n: int = MAX_N) -> list[Counter]:
  """How often every n-gram occurs, one counter for each n in 1..max_n."""
  words = tuple(words)
  return [Counter(words[i : i + n] for i in range(len(words) - n + 1)) for n in range(1, max_n + 1)]


@dataclasses.dataclass(frozen=True)
class BleuCounts:
  """What BLEU needs to know about some captions; counts of a corpus are sums of its captions'.

  Attributes:
    correct: i64[pictures,4], n-grams of the caption that a reference has, clipped to how often.
    guessed: i64[pictures,4], n-grams of the caption.
    length: i64[pictures], words of the caption.
    reference: f64[pictures], words of the reference closest in length (the shorter of two).
  """

  correct: np.ndarray
  guessed: np.ndarray
  length: np.ndarray
  reference: np.ndarray


def bleu_counts(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> BleuCounts:
  """Counts every caption against its references.

  Args:
    captions: one a picture.
    references: one or more a picture.
  """
  _check(captions, references)
  correct = np.zeros((len(captions), MAX_N), np.int64)
  guessed = np.zeros_like(correct)
  reference_length = np.zeros(len(captions))
  for row, (caption, truth) in enumerate(zip(captions, references, strict=True)):
    most: list[Counter] = [Counter() for _ in range(MAX_N)]
    for reference in truth:
      most = [a | b for a, b in zip(most, ngrams(reference), strict=True)]
    for n, counts in enumerate(ngrams(caption)):
      guessed[row, n] = counts.total()
      correct[row, n] = (counts & most[n]).total()
    lengths = [len(reference) for reference in truth]
    reference_length[row] = min((abs(length - len(caption)), length) for length in lengths)[1]
  return BleuCounts(correct, guessed, guessed[:, 0].copy(), reference_length)


def bleu(counts: BleuCounts, rows: np.ndarray | None = None) -> np.ndarray:
  """Corpus BLEU-1..4, f64[...,4] (Papineni et al. 2002).

  Args:
    counts: of every picture.
    rows: i[...,pictures], which pictures make up the corpus (a bootstrap draws some twice); None:
      each once.
  """
  rows = np.arange(len(counts.length)) if rows is None else rows
  correct, guessed = counts.correct[rows].sum(-2), counts.guessed[rows].sum(-2)
  length, reference = counts.length[rows].sum(-1), counts.reference[rows].sum(-1)
  precision = (correct + 1e-15) / (guessed + 1e-9)
  score = np.cumprod(precision, -1) ** (1 / np.arange(1, MAX_N + 1))
  ratio = (length + 1e-15) / (reference + 1e-9)
  brevity = np.where(ratio < 1, np.exp(np.minimum(1 - 1 / ratio, 0)), 1.0)
  return score * brevity[..., None]


def rouge_l(caption: Words, references: Sequence[Words]) -> float:
  """ROUGE-L (Lin 2004) with the best precision and the best recall over the references.

  They may come from two references, as in the original; a caption without words counts as one
  empty word.
  """
  caption = list(caption) or [""]
  precision = recall = 0.0
  for reference in references:
    reference = list(reference) or [""]
    common = _common_subsequence(caption, reference)
    precision = max(precision, common / len(caption))
    recall = max(recall, common / len(reference))
  if not precision or not recall:
    return 0.0
  return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common_subsequence(a: Words, b: Words) -> int:
  """Length of the longest common subsequence."""
  above = [0] * (len(b) + 1)
  for left in a:
    row = [0]
    for index, right in enumerate(b):
      row.append(above[index] + 1 if left == right else max(row[-1], above[index + 1]))
    above = row
  return above[-1]


def cider_d(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
  """CIDEr-D of every caption, f64[pictures], 0 to 10 (arXiv:1411.5726, section 4, "CIDEr-D").

  The document frequency of an n-gram is the number of pictures with a reference that has it, so
  the score of a caption depends on all references of the corpus; with one picture it is 0.
  """
  _check(captions, references)
  frequency: Counter = Counter()
  for truth in references:
    frequency.update({gram for one in truth for counts in ngrams(one) for gram in counts})
  log_pictures = math.log(len(captions)) if captions else 0.0
  return np.array([
    np.mean([_similarity(_weigh(caption, frequency, log_pictures),
                         _weigh(reference, frequency, log_pictures)) for reference in truth])
    for caption, truth in zip(captions, references, strict=True)
  ])


@dataclasses.dataclass(frozen=True)
class _Weighed:
  """TF-IDF weight of every n-gram, one dict for each n; their norms; the length in bigrams."""

  weights: list[dict]
  norms: list[float]
  length: int


def _weigh(words: Words, frequency: Counter, log_pictures: float) -> _Weighed:
  counted = ngrams(words)
  weights = [
    {gram: count * (log_pictures - math.log(max(1, frequency[gram])))
     for gram, count in counts.items()}
    for counts in counted
  ]
  norms = [math.sqrt(sum(weight**2 for weight in one.values())) for one in weights]
  return _Weighed(weights, norms, counted[1].total())


def _similarity(caption: _Weighed, reference: _Weighed) -> float:
  """Equation 3 with the clipping and the length penalty of CIDEr-D, times 10."""
  total = 0.0
  for n in range(MAX_N):
    mine, theirs = caption.weights[n], reference.weights[n]
    dot = sum(min(weight, theirs[gram]) * theirs[gram]
              for gram, weight in mine.items() if gram in theirs)
    norm = caption.norms[n] * reference.norms[n]
    total += dot / norm if norm else dot
  penalty = math.exp(-((caption.length - reference.length) ** 2) / (2 * SIGMA**2))
  return 10 * penalty * total / MAX_N


def _check(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> None:
  if len(captions) != len(references):
    raise ValueError(f"{len(captions)} captions for {len(references)} pictures")
  if not all(references):
    raise ValueError("every picture needs at least one reference")
