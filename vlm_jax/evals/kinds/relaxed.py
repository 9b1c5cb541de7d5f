"""Questions about charts, scored by relaxed accuracy (ChartQA): numbers within 5% are right."""

from typing import Any

from vlm_jax.evals.metrics.text import relaxed_accuracy
from vlm_jax.evals.reading import mean_score

MAIN, UNIT = "accuracy", "questions"


def score(rows: list[dict], seed: int) -> dict[str, Any]:
  """Scores rows {"document", "prediction", "answers"}, which get "score".

  Returns:
    {"accuracy", "low", "high", "questions"}, a mean over questions.
  """
  for row in rows:
    row["score"] = relaxed_accuracy(row["prediction"], row["answers"])
  mean, low, high = mean_score(rows, seed)
  return {"accuracy": mean, "low": low, "high": high, "questions": len(rows)}
