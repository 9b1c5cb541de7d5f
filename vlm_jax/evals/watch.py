"""Evaluates the checkpoints of a run while it trains, from another process.

Lock, metrics and checkpoints of the training process are left alone. Numbers go to
`evals/<step>.json` and predictions to `predictions/`, where an evaluation inside training would
write the same ones, and rows to `evals.jsonl`, {"step", "eval/NAME/NUMBER": value}, under the names
that `metrics.jsonl` has for them. Every checkpoint gets a row, and another one when it is asked
something that it has not been asked yet.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.core.typing import Params
from vlm_jax.evals.predictions import Appender
from vlm_jax.evals.run import evaluate, label_of, scalars

ROWS = "evals.jsonl"


def watch(
  config: ConfigDict,
  workdir: str | Path,
  steps: Callable[[], list[int]],
  load: Callable[[int], Params],
  *,
  until: int = 0,
  poll: float = 10.0,
  names: Iterable[str] | None = None,
  split: str | None = None,
  report: Callable[[str], None] = lambda line: None,
  sleep: Callable[[float], None] = time.sleep,
) -> list[int]:
  """Waits for checkpoints and evaluates each once, oldest first.

  Args:
    config: of the run.
    workdir: the run directory.
    steps: the steps that have a checkpoint now.
    load: the parameters of a step.
    until: stop when a step this late has been evaluated; 0: the run's last step.
    poll: seconds between two looks.
    names, split: as in `run.evaluate`.
    report: gets one line for everything the user should read.
    sleep: waits some seconds.

  Returns:
    The steps evaluated by this call. What `evals.jsonl` has of a step is not evaluated again; a
    step whose checkpoint was removed before its turn (config.train.keep) is reported and left out.

  Raises:
    UsageError, DataError, DiskError: as in `run.evaluate`; UsageError also for `until` behind the
      run's end, which would never come.
  """
  last = until or config.train.steps
  if last > config.train.steps:
    raise UsageError(f"--until is {until}, but the run ends at step {config.train.steps}; it would "
                     "never come")
  if poll <= 0:
    raise UsageError(f"--poll is {poll}; use seconds above 0")
  labels = {name: label_of(config, name, split)
            for name in (sorted(config.evals) if names is None else names)}
  file = Appender(Path(workdir) / ROWS)
  try:
    left = _left(file.rows, labels)
    seen = {step for step in left if not left[step]}
    done: list[int] = []
    waiting = False
    while not seen or max(seen) < last:
      found = [step for step in steps() if step not in seen and step <= config.train.steps]
      if not found:
        if not waiting:
          report(f"waiting for a checkpoint of {workdir}")
        waiting = True
        sleep(poll)
        continue
      waiting = False
      seen.add(step := found[0])
      row = _evaluate(config, workdir, step, steps, load, left.get(step, names), split, report)
      if row is not None:
        file.append([{"step": step, **row}])
        done.append(step)
    if not done:
      report(f"{file.path} has all of it already; another name with --new asks anew")
    return done
  finally:
    file.close()


def _left(rows: list[dict[str, Any]], labels: dict[str, str]) -> dict[int, list[str]]:
  """Step to the evaluations that no row of it has; `labels` are what results are called."""
  known: dict[int, set[str]] = {}
  for row in rows:
    known.setdefault(row["step"], set()).update(
      key.split("/")[1] for key in row if key.startswith("eval/"))
  return {step: [name for name, label in labels.items() if label not in found]
          for step, found in known.items()}


def _evaluate(config: ConfigDict, workdir: str | Path, step: int, steps: Callable, load: Callable,
              names: Iterable[str] | None, split: str | None, report: Callable[[str], None]
              ) -> dict[str, Any] | None:
  """The row of one step; None when its checkpoint went away."""
  try:
    params = load(step)
  except (UsageError, DataError):
    if step in steps():
      raise
    report(f"step {step}: its checkpoint was removed before it could be evaluated")
    return None
  say = lambda line: report(f"step {step}  {line}")
  results = evaluate(config, params, workdir, step=step, names=names, split=split, report=say)
  return {f"eval/{label}/{name}": value for label, numbers in results.items()
          for name, value in scalars(numbers).items()}
