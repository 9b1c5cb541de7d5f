"""Captions: CIDEr-D, BLEU-1..4 and ROUGE-L over a split, as the COCO caption evaluation reports.

A picture is captioned once; the captions of all documents of its record are the references. Words
are those of `metrics.ptb`. Without its image a document may be nothing but its caption: the bare
opening mark is the prompt then.
"""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core.document import Document
from vlm_jax.core.typing import Params
from vlm_jax.data import template
from vlm_jax.evals import asking
from vlm_jax.evals.bootstrap import resample
from vlm_jax.evals.metrics import captions, ptb
from vlm_jax.evals.questions import Question, questions_of
from vlm_jax.evals.reading import Split, mean_score

MAIN, UNIT = "cider", "pictures"


def run(config: ConfigDict, params: Params, entry: ConfigDict, split: str) -> tuple[dict, dict]:
  """Captions and scores every picture; see `asking.run`."""
  return asking.run(config, params, entry, split, score, Once)


class Once:
  """Documents to prompts: the first of a record asks, the others only add their caption."""

  def __init__(self) -> None:
    self._picture, self._captions = "", list[str]()

  def __call__(self, document: Document, split: Split, entry: ConfigDict) -> list[asking.Prompt]:
    """The prompt of the first document of a record, nothing for its other documents."""
    picture = document.key.split("?")[0]
    question = questions_of(document)[-1]
    if picture == self._picture:
      self._captions.extend(question.answers)
      return []
    encoded = template.encode_prompt(document, split.tokenizer, split.decode_image)
    self._picture, self._captions = picture, list(question.answers)
    return [(encoded, [Question(picture, picture, question.text, self._captions)])]


def score(rows: list[dict], seed: int) -> dict[str, Any]:
  """Scores captions.

  Args:
    rows: {"document", "prediction", "answers": the references}, one a picture; get "score"
      (CIDEr-D, 0 to 10) and "rouge_l".
    seed: of the bootstrap.

  Returns:
    {"cider", "low", "high", "rouge_l", "bleu_1".."bleu_4", "bleu_4_low", "bleu_4_high",
    "tokenizer", "pictures"}. CIDEr-D and ROUGE-L are means over pictures, BLEU is that of the
    corpus; low and high are CIDEr-D's, pictures drawn again under the same document frequencies.
  """
  said = [ptb.tokenize(row["prediction"]) for row in rows]
  truth = [[ptb.tokenize(answer) for answer in row["answers"]] for row in rows]
  for row, cider, mine, references in zip(rows, captions.cider_d(said, truth), said, truth,
                                          strict=True):
    row["score"], row["rouge_l"] = float(cider), captions.rouge_l(mine, references)
  cider, low, high = mean_score(rows, seed)
  counts = captions.bleu_counts(said, truth)
  bleu = captions.bleu(counts)
  drawn = np.concatenate([captions.bleu(counts, block)[:, 3]
                          for block in resample(len(rows), seed=seed)])
  bleu_low, bleu_high = np.quantile(drawn, (0.025, 0.975))
  return {"cider": cider, "low": low, "high": high,
          "rouge_l": float(np.mean([row["rouge_l"] for row in rows])),
          **{f"bleu_{n}": float(value) for n, value in enumerate(bleu, 1)},
          "bleu_4_low": float(bleu_low), "bleu_4_high": float(bleu_high),
          "tokenizer": ptb.NAME, "pictures": len(rows)}
