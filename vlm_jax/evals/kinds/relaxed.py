"""Questions about charts, scored by relaxed accuracy (ChartQA): numbers within 5% are right."""

from typing import Any

from ml_collections import ConfigDict

from vlm_jax.core.typing import Params
from vlm_jax.evals import asking
from vlm_jax.evals.metrics.text import relaxed_accuracy
from vlm_jax.evals.reading import mean_score

MAIN, UNIT = "accuracy", "questions"


def run(config: ConfigDict, params: Params, entry: ConfigDict, split: str) -> tuple[dict, dict]:
  """Asks and scores every question; see `asking.run`."""
  return asking.run(config, params, entry, split, score)


def score(rows: list[dict], seed: int) -> dict[str, Any]:
  """Scores rows {"document", "prediction", "answers"}, which get "score".

  Returns:
    {"accuracy", "low", "high", "questions"}, a mean over questions.
  """
  for row in rows:
    row["score"] = relaxed_accuracy(row["prediction"], row["answers"])
  mean, low, high = mean_score(rows, seed)
  return {"accuracy": mean, "low": low, "high": high, "questions": len(rows)}
