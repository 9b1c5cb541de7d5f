"""Runs the evaluations of a config and writes numbers and predictions into the run directory."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.core import digest
from vlm_jax.core.errors import DataError, UsageError, nearest
from vlm_jax.core.typing import Params
from vlm_jax.core.writing import write_atomically
from vlm_jax.data.origin import files_of
from vlm_jax.evals.kinds import find_kind, measure
from vlm_jax.evals.predictions import lines, read_text


def evaluate(
  config: ConfigDict,
  params: Params,
  workdir: str | Path | None,
  *,
  step: int = 0,
  names: Iterable[str] | None = None,
  split: str | None = None,
  report: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, Any]]:
  """Runs evaluations.

  Args:
    config: of the run; `config.evals` names the evaluations.
    params: the parameters.
    workdir: where `evals/<step>.json` and `predictions/<label>.jsonl` (rows with their "step") are
      written; None: nowhere.
    step: number of training steps behind the parameters.
    names: which evaluations; None: all.
    split: read this split instead of the entry's own.
    report: gets one line for every evaluation done.

  Returns:
    Label to what was asked ("kind", "main" and "unit" of the kind, "source", "split", "entry"), of
    what ("origin": "step", "parameters", a digest of theirs, and the data's "files" with sizes and
    digests), and the numbers. The label is the evaluation's name, with "_<split>" when another
    split than the entry's own is read; so both stand side by side in one file.

  Raises:
    UsageError: an unknown name or kind, or a field that cannot be.
    DataError: the data, or the `evals/<step>.json` that is there, cannot be read.
    DiskError: the workdir cannot be written.
  """
  results, parameters = {}, digest.of_json(digest.of_arrays({"params": params}))
  for name in sorted(config.evals) if names is None else names:
    label = label_of(config, name, split)
    entry = config.evals[name]
    try:
      kind = find_kind(entry.kind, config.outside)
    except UsageError as error:
      reason = str(error).removeprefix("config: ")
      raise UsageError(f"config.evals.{name}.kind: {reason}") from error
    chosen = split or entry.split
    numbers, predictions = measure(kind, config, params, entry, chosen)
    fields = json.loads(entry.to_json()) | {"split": chosen}  # what was asked, with the answer
    origin = {"step": step, "parameters": parameters,
              "files": files_of(config, entry.source, chosen)}
    results[label] = {"kind": entry.kind, "main": kind.MAIN, "unit": kind.UNIT,
                      "source": entry.source, "split": chosen, "entry": fields, "origin": origin,
                      **numbers}
    report(f"{label}: {line(results[label], kind.MAIN, kind.UNIT)}")
    if workdir is not None:
      _write(Path(workdir), step, label, results[label], predictions)
  return results


def read(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
  """Step and results, label to numbers, of an `evals/<step>.json`.

  Raises:
    DataError: it is not what an evaluation wrote.
  """
  try:
    found = json.loads(read_text(path))
    step, results = int(found["step"]), dict(found["evals"])
    if not all(isinstance(numbers, dict) for numbers in results.values()):
      raise ValueError("numbers are missing")
  except (ValueError, KeyError, TypeError) as error:
    raise DataError(f"{path} is not what an evaluation writes ({error!r}); move it away, and "
                    "evaluate again") from error
  return step, results


def label_of(config: ConfigDict, name: str, split: str | None) -> str:
  """What the results of an evaluation are called when `split` is read, None: its own split.

  Raises:
    UsageError: no such evaluation; names the nearest.
  """
  if name not in config.evals:
    raise UsageError(f"config.evals has no '{name}'; {nearest(name, config.evals)}")
  return name if split in (None, config.evals[name].split) else f"{name}_{split}"


def in_loop(
  config: ConfigDict, workdir: str | Path, report: Callable[[str], None] = lambda line: None
) -> Callable[[str, Params, int], dict[str, float]]:
  """What training calls: (name in config.evals, params, step) to flat numbers for its log."""

  def one(name: str, params: Params, step: int) -> dict[str, float]:
    results = evaluate(config, params, workdir, step=step, names=[name], report=report)
    return scalars(results[name])

  return one


def scalars(numbers: dict[str, Any]) -> dict[str, float]:
  """The numbers of one evaluation as flat floats: "accuracy", and "shuffled/accuracy" of a control.

  Times are left out: what is left is a function of the parameters and the data.
  """
  flat = {name: float(value) for name, value in numbers.items()
          if isinstance(value, int | float) and name != "seconds"}
  for images, control in numbers.get("controls", {}).items():
    flat |= {f"{images}/{name}": value for name, value in scalars(control).items()}
  return flat


def line(numbers: dict[str, Any], main: str, unit: str) -> str:
  """One line for people: the main number with its interval, those of the controls, the count."""
  show = lambda part: f"{part[main]:.4g} [{part['low']:.4g}, {part['high']:.4g}]"
  text = f"{main} {show(numbers)} with images {numbers['images']}"
  for images, control in numbers.get("controls", {}).items():
    text += f", {show(control)} {images}"
  return f"{text}; {numbers[unit]:,} {unit} of {numbers['source']} {numbers['split']}"


def _write(workdir: Path, step: int, label: str, numbers: dict, predictions: dict) -> None:
  """Adds an evaluation to the file of its step, and replaces its predictions."""
  for images, rows in predictions.items():
    name = f"{label}_{images}" if images else label
    text = lines({**row, "step": step} for row in rows)
    write_atomically(workdir / "predictions" / f"{name}.jsonl", text)
  path = workdir / "evals" / f"{step}.json"
  known = read(path)[1] if path.exists() else {}
  found = {"step": step, "evals": known | {label: numbers}}
  write_atomically(path, json.dumps(found, indent=2, sort_keys=True) + "\n")
