"""Questions about documents, scored by ANLS (DocVQA, ST-VQA, InfographicVQA)."""

from typing import Any

from ml_collections import ConfigDict

from vlm_jax.core.typing import Params
from vlm_jax.evals import asking
from vlm_jax.evals.metrics.text import anls
from vlm_jax.evals.reading import mean_score

MAIN, UNIT = "anls", "questions"


def run(config: ConfigDict, params: Params, entry: ConfigDict, split: str) -> tuple[dict, dict]:
  """Asks and scores every question; see `asking.run`."""
  return asking.run(config, params, entry, split, score)


def score(rows: list[dict], seed: int) -> dict[str, Any]:
  """Scores rows {"document", "prediction", "answers"}, which get "score".

  Returns:
    {"anls", "low", "high", "questions"}, a mean over questions.
  """
  for row in rows:
    row["score"] = anls(row["prediction"], row["answers"])
  mean, low, high = mean_score(rows, seed)
  return {"anls": mean, "low": low, "high": high, "questions": len(rows)}
