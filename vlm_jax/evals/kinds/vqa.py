"""Visual question answering, scored by the official VQA accuracy."""

from typing import Any

import numpy as np

from vlm_jax.evals.metrics.vqa import exact_match, vqa_accuracy
from vlm_jax.evals.reading import mean_score

MAIN, UNIT = "accuracy", "questions"


def score(rows: list[dict], seed: int) -> dict[str, Any]:
  """Scores predictions.

  Args:
    rows: {"document", "prediction", "answers"}; get "score" (VQA accuracy) and "exact".
    seed: of the bootstrap.

  Returns:
    {"accuracy", "low", "high", "exact_match", "questions"}: means over questions; exact_match is
    the share of answers that are the truth letter by letter.
  """
  for row in rows:
    row["score"] = vqa_accuracy(row["prediction"], row["answers"])
    row["exact"] = exact_match(row["prediction"], row["answers"])
  accuracy, low, high = mean_score(rows, seed)
  exact = float(np.mean([row["exact"] for row in rows]))
  return {"accuracy": accuracy, "low": low, "high": high, "exact_match": exact,
          "questions": len(rows)}
