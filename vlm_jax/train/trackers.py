"""Where the numbers of a run go: JSON lines always, TensorBoard and Weights & Biases when asked.

A tracker is anything with `log(step, row)` and `close()`. Only the first host has any. None of them
writes an API key or the environment into the run directory.
"""

import hashlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from ml_collections import ConfigDict

from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.writing import write_atomically

Row = Mapping[str, Any]


class Tracker(Protocol):
  """Takes rows of numbers in the order of their steps; several rows may have one step."""

  def log(self, step: int, row: Row) -> None:
    """Takes one row."""

  def close(self) -> None:
    """Finishes what is still to be written."""


class Jsonl:
  """A row a line; the rows of steps that will be done again are taken away first.

  Args:
    path: the file.
    step: the step the run continues from.
  """

  def __init__(self, path: Path, step: int):
    if path.exists():
      lines = [json.dumps(row) + "\n" for row in read(path) if row["step"] <= step]
      write_atomically(path, "".join(lines))
    self._file = open(path, "a")

  def log(self, step: int, row: Row) -> None:
    """Appends the row, and hands it to the kernel: a killed process loses nothing it has logged."""
    self._file.write(json.dumps({"step": step, **row}) + "\n")
    self._file.flush()

  def sync(self) -> None:
    """Forces the rows to the disk."""
    os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


class TensorBoard:
  """Event files for `tensorboard --logdir=RUN`; rows behind `step` are hidden when it is read."""

  def __init__(self, path: Path, step: int, config: ConfigDict):
    del config
    writer = _summary_writer()
    self._writer = writer(str(path), purge_step=step + 1 if step else None, flush_secs=30)

  def log(self, step: int, row: Row) -> None:
    """Writes every finite number as a scalar."""
    for name, value in numbers(row).items():
      self._writer.add_scalar(name, value, step)

  def close(self) -> None:
    """Closes the event file."""
    self._writer.close()


class WandB:
  """Weights & Biases. Offline unless WANDB_MODE says otherwise: `wandb sync RUN/wandb/*` uploads.

  A continued run is the same W&B run; WANDB_PROJECT and WANDB_ENTITY say whose.
  """

  def __init__(self, path: Path, step: int, config: ConfigDict):
    del step  # W&B itself ignores the rows of steps that it has
    import wandb

    # No copy of the code, the command, the machine or its environment: command.txt and env.json
    # have what is needed of them, and neither can hold a secret of the environment.
    settings = wandb.Settings(console="off", save_code=False, disable_git=True,
                              x_disable_meta=True, x_disable_stats=True)
    self._run = wandb.init(
      dir=str(path), name=path.name, id=hashlib.sha256(str(path).encode()).hexdigest()[:16],
      resume="allow", mode=os.environ.get("WANDB_MODE", "offline"),
      config=json.loads(config.to_json()), settings=settings)

  def log(self, step: int, row: Row) -> None:
    """Sends every finite number."""
    self._run.log(numbers(row), step=step)

  def close(self) -> None:
    """Waits for what is still to be written."""
    self._run.finish()


KINDS: Mapping[str, Callable[[Path, int, ConfigDict], Tracker]] = MappingProxyType(
  {"tensorboard": TensorBoard, "wandb": WandB})


def check(config: ConfigDict) -> None:
  """Raises a UsageError for an unknown tracker, or one whose package is missing."""
  for name in config.train.trackers:
    if name not in KINDS:
      raise UsageError(f"config.train.trackers names '{name}'; {nearest(name, KINDS)}")
    if name == "wandb" and importlib.util.find_spec("wandb") is None:
      raise UsageError("config.train.trackers names wandb, which is not installed; run "
                       "`pip install 'vlm_jax[wandb]'` or take it out")


def make(config: ConfigDict, path: Path, step: int) -> list[Tracker]:
  """The trackers of `config.train.trackers`, which were checked.

  Args:
    config: of the run.
    path: the run directory.
    step: the step the run continues from.
  """
  return [KINDS[name](path, step, config) for name in config.train.trackers]


def numbers(row: Row) -> dict[str, float]:
  """The finite numbers of a row."""
  return {name: value for name, value in row.items()
          if isinstance(value, int | float) and math.isfinite(value)}


def read(path: Path) -> list[dict[str, Any]]:
  """The rows of a jsonl file; a last line that was cut off by a kill is left out."""
  rows = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      rows.append(json.loads(line))
    except ValueError:
      break
  return rows


def _summary_writer() -> Callable[..., Any]:
  """TensorBoard's writer, without the torch that tensorboardX imports where it finds it."""
  hidden = "torch" not in sys.modules
  if hidden:
    sys.modules["torch"] = None  # makes `import torch` an ImportError, which tensorboardX expects
  try:
    from tensorboardX import SummaryWriter
  finally:
    if hidden:
      del sys.modules["torch"]
  return SummaryWriter
