"""Files of predictions, one JSON object a line: reading, appending, taking up again, comparing."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.core.errors import DataError, DiskError, UsageError
from vlm_jax.evals.bootstrap import Difference, paired

SHOWN = 3  # keys named in an error


def read(path: str | Path) -> list[dict[str, Any]]:
  """The rows of a JSON lines file.

  Raises:
    DataError: the file is missing, or a line is not a JSON object.
  """
  return parse(read_text(path), path)


def parse(text: str, path: str | Path) -> list[dict[str, Any]]:
  """The rows of JSON lines, as `read` reads them from `path`."""
  rows = []
  for number, line in enumerate(text.split("\n"), 1):  # splitlines() also cuts at U+2028, in texts
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except ValueError as error:
      raise DataError(f"{path} line {number} is not JSON ({error}); mend or remove it") from error
    if not isinstance(row, dict):
      raise DataError(f"{path} line {number} is not a JSON object; mend or remove it")
    rows.append(row)
  return rows


def read_text(path: str | Path) -> str:
  """A whole UTF-8 file; DataError when it is missing, unreadable or not text."""
  try:
    return _decode(Path(path).read_bytes(), path)
  except OSError as error:
    raise DataError(f"{path} cannot be read ({error.strerror}); name another file") from error


def _decode(held: bytes, path: str | Path) -> str:
  try:
    return held.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise DataError(f"{path} cannot be read (not UTF-8 text); name another file") from error


def lines(rows: Iterable[dict]) -> str:
  """Rows as JSON lines."""
  return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class Appender:
  """A predictions file that grows by whole batches, and can be taken up after any end.

  A last line that a kill tore is cut off by the first append; every other line that is no JSON is
  an error. Until then the file is left as it is: it may be another one, named by mistake.

  Attributes:
    rows: what the file held when it was opened.
  """

  def __init__(self, path: str | Path):
    """Opens or makes the file.

    Raises:
      DataError: a line before the last is not a JSON object.
      DiskError: the file cannot be written.
    """
    self.path = Path(path)
    self.rows: list[dict[str, Any]] = []
    self._torn: int | None = None  # where a torn last line begins
    try:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      if self.path.exists():
        held = self.path.read_bytes()
        whole = held[: held.rfind(b"\n") + 1]
        self._torn = len(whole) if whole != held else None
        self.rows = parse(_decode(whole, self.path), self.path)
      self._file = open(self.path, "ab", buffering=0)
    except OSError as error:
      raise self._full(error) from error

  def append(self, rows: Iterable[dict]) -> None:
    """Writes rows and forces them to the disk."""
    try:
      if self._torn is not None:
        os.truncate(self.path, self._torn)
        self._torn = None
      left = memoryview(lines(rows).encode())
      while left:
        left = left[self._file.write(left):]
      os.fsync(self._file.fileno())
    except OSError as error:
      raise self._full(error) from error

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def _full(self, error: OSError) -> DiskError:
    return DiskError(f"{self.path} cannot be written ({error.strerror}); free space, mend its "
                     "permissions or choose another file: the same command continues")


def compare(a: str | Path, b: str | Path, *, field: str = "score", seed: int = 0
            ) -> tuple[Difference, dict[str, float]]:
  """Compares two files of scored predictions question by question.

  Args:
    a, b: files whose rows have "key", the field, and "document" (questions of one document are
      drawn together; without it each stands alone).
    field: the number compared.
    seed: of the bootstrap.

  Returns:
    The difference B - A, and {"a": mean, "b": mean, "questions": n, "documents": n}.

  Raises:
    DataError: a row without the key or the field, or a key that comes twice.
    UsageError: the files are not about the same questions.
  """
  first, second = _by_key(a, field), _by_key(b, field)
  for here, there, path, other in ((first, second, a, b), (second, first, b, a)):
    if missing := sorted(here.keys() - there.keys()):
      raise UsageError(
        f"{len(missing)} of {len(here)} questions of {path} are not in {other} "
        f"({', '.join(missing[:SHOWN])}{', ...' if len(missing) > SHOWN else ''}); compare "
        "predictions for the same questions")
  keys = sorted(first)
  scores = [np.array([rows[key][field] for key in keys], np.float64) for rows in (first, second)]
  groups = np.array([str(first[key].get("document", key)) for key in keys])
  difference = paired(*scores, groups=groups, seed=seed)
  return difference, {"a": float(scores[0].mean()), "b": float(scores[1].mean()),
                      "questions": len(keys), "documents": len(set(groups))}


def _by_key(path: str | Path, field: str) -> dict[str, dict[str, Any]]:
  found: dict[str, dict[str, Any]] = {}
  for number, row in enumerate(read(path), 1):
    value = row.get(field)
    if "key" not in row or not isinstance(value, int | float) or not math.isfinite(value):
      has = ", ".join(sorted(name for name in row if isinstance(row[name], int | float)))
      raise DataError(f"{path} row {number} lacks 'key' or the finite number '{field}' (its "
                      f"numbers: {has or 'none'}); score the file first, or name another field")
    key = str(row["key"])
    if key in found:
      raise DataError(f"{path} has '{key}' twice; remove one of them")
    found[key] = row
  if not found:
    raise DataError(f"{path} has no predictions; name another file")
  return found
