"""What the loop does with a finished step: numbers, files, checkpoints, evaluations."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vlm_jax.core import stopping
from vlm_jax.core.errors import NumericsError
from vlm_jax.core.tree import flatten, unite
from vlm_jax.core.typing import Params
from vlm_jax.core.writing import write_atomically
from vlm_jax.train import metrics as metrics_lib
from vlm_jax.train import trackers
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.train.signals import Signals
from vlm_jax.train.state import State
from vlm_jax.train.step import Numbers
from vlm_jax.train.workdir import environment

Evaluate = Callable[[str, Params, int], dict[str, float]]
EMPTY = 0.6  # a fill of the rows below this is told once


class Run:
  """An open run directory with all that is written into it.

  Attributes:
    config, path, checkpoints, progress: of the run.
    writer, clock: of its rows.
  """

  def __init__(self, config: ConfigDict, path: Path, work: metrics_lib.Work, mesh: dict[str, int],
               checkpoints: Checkpoints, progress: metrics_lib.Progress, evaluate: Evaluate | None,
               first: int):
    """Goes on behind step `first`; `mesh` is told in checkpoints."""
    self.config, self.path, self.checkpoints, self.progress = config, path, checkpoints, progress
    self.writer, self.clock = metrics_lib.Writer(config, path, first), metrics_lib.Clock()
    self._work = work
    self._evaluate = evaluate
    self._sources, self._first_log = sorted(config.data.sources), True
    self._meta = {"seed": config.seed, "prng": jax.config.jax_default_prng_impl,
                  "config": json.loads(config.to_json()), "environment": environment(),
                  "mesh": mesh}

  def should_stop(self, step: int, signals: Signals) -> bool:
    """Whether a signal came; with many hosts they agree about it on log steps."""
    if jax.process_count() == 1:
      return signals.received is not None
    if step % self.config.train.log_every:
      return False
    numbers = multihost_utils.process_allgather(np.int32(signals.received or 0))
    signals.received = int(numbers.max()) or None
    return signals.received is not None

  def row(self, step: int, state: State, numbers: Numbers, flat: dict,
          info: dict) -> dict[str, Any]:
    """The deterministic numbers of a step.

    Raises:
      NumericsError: loss or gradient norm is not finite; leaves a record and the batch behind.
    """
    row = metrics_lib.row_of(jax.device_get(numbers), self._sources, flat)
    for kind in ("documents", "bad", "epochs"):
      row |= {f"{kind}/{name}": number for name, number in sorted(info.get(kind, {}).items())}
    if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
      return row
    bad = [path for path, leaf in flatten(state.params).items()
           if not bool(np.isfinite(jax.numpy.sum(leaf)))]
    record = self.path / f"numerics-{step}.json"
    if jax.process_index() == 0:
      plain = {name: value if math.isfinite(value) else str(value) for name, value in row.items()}
      text = json.dumps({"step": step, "row": plain, "parameters_not_finite": bad}, indent=2)
      write_atomically(record, text)
      np.savez(record.with_suffix(".npz"), **{path.replace("/", "."): flat[path] for path in flat})
    what = "loss" if not math.isfinite(row["loss"]) else "gradient"
    raise NumericsError(f"the {what} is not finite at step {step} (since this step or one after "
                        f"the last log); {record} and its batch say more, nothing was saved; "
                        "lower config.optim.lr or look at the data")

  def log(self, step: int, row: dict[str, Any]) -> None:
    """Writes the rows of a step and a line of progress."""
    used = {name: row[name] for name in self._work.slots}
    pairs = {name.removeprefix("pairs/"): value for name, value in row.items()
             if name.startswith("pairs/")}
    timing = self.clock.row(used, self._work.attention(pairs)) | self._work.fills(used)
    self.checkpoints.check()
    if self.checkpoints.failures:
      timing["checkpoint_failures"] = self.checkpoints.failures
    self.writer.metrics(step, row)
    self.writer.timing(step, timing)
    self.progress.step(step, row, timing)
    if self._first_log and (share := timing.get("token_fill", 1.0)) < EMPTY:
      self.progress.say(
        f"only {share:.0%} of the slots of the rows hold tokens, and the others cost as much; lower"
        " config.data.tokens, raise config.data.images, or change the ratios in config.data.sources"
        " (`vlm-jax data inspect` shows what is full first)")
    self._first_log = False

  def save(self, step: int, state: State, loader: Any) -> None:
    """Starts the checkpoint of a step; its rows are on the disk first."""
    self.writer.sync()
    data = unite(gather(loader.state()))
    self.checkpoints.save(step, state, data, self._meta | {"step": step})

  def evaluate_if_due(self, step: int, params: Params, signals: Signals) -> None:
    """Runs every evaluation of the config when this step has one and its row is missing.

    A signal ends it between two batches, and at the next start all of it is done. Many hosts, which
    would have to agree at every batch, hear it behind the evaluations.

    Raises:
      Interrupted: a signal came; the step is to be saved, if it is not.
    """
    every = self.config.train.eval_every
    due = step == self.config.train.steps or every and step and step % every == 0
    if self._evaluate is None or not self.config.evals or not due or self._evaluated(step):
      return
    row = {}
    stopped = (f"stopped in the evaluation of step {step}, which is saved in {self.path}; the same "
               "command evaluates it and continues")
    check = lambda: signals.check(stopped) if jax.process_count() == 1 else None
    with stopping.stoppable(check):
      for name in sorted(self.config.evals):
        stopping.point()
        for key, value in self._evaluate(name, params, step).items():
          row[f"eval/{name}/{key}"] = value
    self.writer.metrics(step, row)
    self.progress.say(f"step {step}  " + "  ".join(
      f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float)))
    self.clock.reset()

  def _evaluated(self, step: int) -> bool:
    rows = trackers.read(self.path / "metrics.jsonl")
    here = any(row["step"] == step and any(key.startswith("eval/") for key in row) for row in rows)
    return bool(np.all(gather(here)))

  def result(self) -> dict[str, Any]:
    """The last logged row, joined with the last evaluation's."""
    joined: dict[str, Any] = {}
    for row in trackers.read(self.path / "metrics.jsonl"):
      joined |= row
    return joined


def gather(value: Any) -> list:
  """A JSON value of every host, in host order."""
  if jax.process_count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(text))).reshape(-1)
  padded = np.pad(text, (0, int(sizes.max()) - len(text)))
  texts = multihost_utils.process_allgather(padded)
  return [json.loads(bytes(text[:size])) for text, size in zip(texts, sizes, strict=True)]
