"""References of standard benchmarks, joined with predictions into rows that a kind can score.

Predictions are JSON lines (ours, POPE's) or a JSON list (the results files of VQA v2 and COCO):

    key         "key", "question_id", "image_id", "id" or "index"
    prediction  "prediction", "answer", "caption" or "text"

References are VQA v2 annotations, COCO captions, POPE labels, an MMBench table, or JSON lines of
{"id", "answers"}. Every reference needs a prediction: what was never answered cannot be left out.
"""

import collections
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.evals.predictions import SHOWN, read, read_text
from vlm_jax.evals.requests import options_of, table

KEYS = ("key", "question_id", "image_id", "id", "index")
SAID = ("prediction", "answer", "caption", "text")
ROTATIONS = 1_000_000  # MMBench's circular tables number the rotations of question i: i + k * this


def join(predictions: str | Path, references: str | Path) -> list[dict[str, Any]]:
  """Rows {"key", "document", "prediction", "answers"}, of choices also "options", one a reference.

  A request that could not be answered (a row with "error") counts as the empty answer.

  Raises:
    DataError: a file is missing or of no known form, or a key comes twice.
    UsageError: a reference without a prediction.
  """
  said = _said(Path(predictions))
  known = _references(Path(references))
  if missing := [row["key"] for row in known if row["key"] not in said]:
    raise UsageError(
      f"{len(missing)} of {len(known)} questions of {references} have no prediction in "
      f"{predictions} ({', '.join(missing[:SHOWN])}{', ...' if len(missing) > SHOWN else ''}); "
      "answer all of them")
  return [{**row, "prediction": said[row["key"]]} for row in known]


def _said(path: Path) -> dict[str, str]:
  """Key to prediction."""
  rows = _json(path) if path.suffix == ".json" else read(path)
  if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
    raise DataError(f"{path} must be a list of predictions; name another file")
  found: dict[str, str] = {}
  for number, row in enumerate(rows, 1):
    key = next((str(row[name]) for name in KEYS if name in row), None)
    text = "" if "error" in row else next((row[name] for name in SAID if name in row), None)
    if key is None or not isinstance(text, str):
      raise DataError(f"{path} prediction {number} must have one of {', '.join(KEYS)} and one of "
                      f"{', '.join(SAID)}; mend or remove it")
    if key in found:
      raise DataError(f"{path} has '{key}' twice; remove one of them")
    found[key] = text
  return found


def _references(path: Path) -> list[dict[str, Any]]:
  """Rows without predictions."""
  try:
    if path.suffix == ".tsv":
      rows = [_of_table(row) for row in table(path)]
    elif path.suffix == ".json":
      rows = _of_annotations(_json(path)["annotations"])
    else:
      rows = [_of_line(row) for row in read(path)]
  except (KeyError, TypeError, ValueError, StopIteration) as error:
    raise DataError(f"{path} is no reference file of a known form ({error!r}); see "
                    "`vlm-jax score --help`") from error
  if not rows:
    raise DataError(f"{path} has no references; name another file")
  for key, count in collections.Counter(row["key"] for row in rows).items():
    if count > 1:
      raise DataError(f"{path} has '{key}' {count} times; its references must differ in it")
  return rows


def _of_annotations(annotations: Iterable[dict]) -> list[dict[str, Any]]:
  """VQA v2: ten answers a question; COCO: the captions of a picture, wherever they stand."""
  rows: dict[str, dict[str, Any]] = {}
  for one in annotations:
    if "answers" in one:
      key, document = str(one["question_id"]), str(one["image_id"])
      rows[key] = {"key": key, "document": document,
                   "answers": [answer["answer"] for answer in one["answers"]]}
    else:
      key = str(one["image_id"])
      rows.setdefault(key, {"key": key, "document": key, "answers": []})
      rows[key]["answers"].append(one["caption"])
  return list(rows.values())


def _of_line(row: dict[str, Any]) -> dict[str, Any]:
  """POPE's {"question_id", "image", "label"}, or {"id", "answers"}."""
  key = str(next(row[name] for name in KEYS if name in row))
  answers = [row["label"]] if "label" in row else row.get("answers", row.get("answer"))
  answers = [answers] if isinstance(answers, str) else answers
  if not answers or not all(isinstance(answer, str) for answer in answers):
    raise ValueError(f"'{key}' has no answers")
  return {"key": key, "document": str(row.get("document", row.get("image", key))),
          "answers": answers}


def _of_table(row: dict[str, str]) -> dict[str, Any]:
  """MMBench: the answer is a letter; the rotations of one question are one document."""
  return {"key": row["index"], "document": str(int(row["index"]) % ROTATIONS),
          "options": options_of(row), "answers": [row["answer"]]}


def _json(path: Path) -> Any:
  try:
    return json.loads(read_text(path))
  except ValueError as error:
    raise DataError(f"{path} is not JSON ({error}); name another file") from error
