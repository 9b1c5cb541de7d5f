"""Questions about documents, scored by ANLS (DocVQA, ST-VQA, InfographicVQA)."""

from typing import Any

from vlm_jax.evals.metrics.text import anls
from vlm_jax.evals.reading import mean_score

MAIN, UNIT = "anls", "questions"


def score(rows: list[dict], seed: int) -> dict[str, Any]:
  """Scores rows {"document", "prediction", "answers"}, which get "score".

  Returns:
    {"anls", "low", "high", "questions"}, a mean over questions.
  """
  for row in rows:
    row["score"] = anls(row["prediction"], row["answers"])
  mean, low, high = mean_score(rows, seed)
  return {"anls": mean, "low": low, "high": high, "questions": len(rows)}
