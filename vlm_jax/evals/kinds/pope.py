"""Yes-or-no questions about objects, scored as POPE does: hallucination shows as a yes-ratio."""

from typing import Any

from vlm_jax.core.errors import UsageError
from vlm_jax.evals.metrics.yes_no import pope, says_yes
from vlm_jax.evals.reading import mean_score

MAIN, UNIT = "accuracy", "questions"
TRUE = ("yes", "no")


def score(rows: list[dict], seed: int) -> dict[str, Any]:
  """Scores rows {"document", "prediction", "answers": ["yes"] or ["no"]}, which get "score".

  Returns:
    {"accuracy", "low", "high", "precision", "recall", "f1", "yes_ratio", "questions"}; the
    interval is the accuracy's.

  Raises:
    UsageError: a true answer is another one; a wrong "blue" would be as right as "red".
  """
  for row in rows:
    if (right := row["answers"][0]).strip(" .").lower() not in TRUE:
      raise UsageError(f"pope scores questions of yes or no, and '{right}' is the answer of "
                       f"{row.get('key', row['document'])}; use another kind, vqa for one")
  said = [says_yes(row["prediction"]) for row in rows]
  truth = [row["answers"][0].strip().lower().startswith("yes") for row in rows]
  for row, mine, right in zip(rows, said, truth, strict=True):
    row["score"] = float(mine == right)
  _, low, high = mean_score(rows, seed)
  return pope(said, truth) | {"low": low, "high": high, "questions": len(rows)}
