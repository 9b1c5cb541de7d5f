"""What a run directory holds, read once, with nothing required but the config."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vlm_jax import bundle, runs
from vlm_jax.configs import base
from vlm_jax.core.errors import DataError
from vlm_jax.core.typing import Params
from vlm_jax.evals import run as results
from vlm_jax.train import trackers
from vlm_jax.train.checkpoint_tools import FOLDER, Entry, entries

Evals = dict[int, dict[str, dict[str, Any]]]  # step to label to numbers


@dataclasses.dataclass(frozen=True)
class Run:
  """A run directory.

  Attributes:
    path: where.
    config: frozen.
    fields: every field of the config by its dotted name, and its default (None: it has none).
    metrics, timing: the rows of the files.
    evals: as written by the evaluations.
    commands: one a start.
    environment: env.json, {} without one.
    sources: the data manifest's sources, {} when the data is not there.
    checkpoints: what is below checkpoints/.
    shapes: shape of every parameter, from the newest checkpoint's manifest.
    params: reads and verifies the parameters of a step; UserError when there is no such checkpoint.
  """

  path: Path
  config: ConfigDict
  fields: dict[str, tuple[Any, Any]]
  metrics: list[dict[str, Any]]
  timing: list[dict[str, Any]]
  evals: Evals
  commands: list[str]
  environment: dict[str, Any]
  sources: dict[str, dict[str, Any]]
  checkpoints: list[Entry]
  shapes: dict[str, list[int]]
  params: Callable[[int], Params]


def read(workdir: str | Path, root: str | None = None, outside: bool = False) -> Run:
  """Reads a run directory.

  Args:
    workdir: the directory.
    root: the prepared data, None: where the config says.
    outside: whether the config may name modules outside vlm_jax.

  Raises:
    UsageError: it is not the directory of a run.
    DataError: a file of it is damaged.
  """
  path = Path(workdir)
  config = runs.frozen(path, root, outside)
  folder = path / FOLDER
  checkpoints = entries(folder) if folder.is_dir() else []
  commands = path / "command.txt"
  evals = {}
  for file in (path / "evals").glob("*.json"):
    step, found = results.read(file)
    evals[step] = found
  return Run(
    path=path,
    config=config,
    fields=fields(config),
    metrics=trackers.read(path / "metrics.jsonl"),
    timing=trackers.read(path / "timing.jsonl"),
    evals=dict(sorted(evals.items())),
    commands=commands.read_text(errors="replace").splitlines() if commands.exists() else [],
    environment=_json(path / "env.json"),
    sources=_json(Path(config.data.root) / "manifest.json").get("sources", {}),
    checkpoints=checkpoints,
    shapes=_shapes(checkpoints),
    params=functools.cache(
      lambda step: bundle.load(path, step=step, root=root, outside=outside).params),
  )


def _json(path: Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return {}
  except ValueError as error:
    raise DataError(f"{path} is not JSON ({error}); remove it or restore a copy") from error


def _shapes(checkpoints: list[Entry]) -> dict[str, list[int]]:
  for entry in reversed(checkpoints):
    file = entry.path / "manifest" / "metadata"
    if entry.kind == "checkpoint" and file.is_file():
      arrays = _json(file).get("arrays", {})
      return {name.removeprefix("params/"): found["shape"] for name, found in arrays.items()
              if name.startswith("params/")}
  return {}


def fields(config: ConfigDict) -> dict[str, tuple[Any, Any]]:
  """Every field by its dotted name: (value, default); None where base.py has no such field."""
  models = base.entries()
  flat: dict[str, tuple[Any, Any]] = {}

  def visit(node: Any, model: Any, prefix: str) -> None:
    for name, value in node.items():
      field = f"{prefix}.{name}" if prefix else name
      default = models.get(prefix, model.get(name) if hasattr(model, "get") else None)
      if isinstance(value, ConfigDict):
        visit(value, default, field)
      else:
        flat[field] = (value, default)

  visit(config, base.get_config(), "")
  flat.pop("outside", None)  # about who may read the file, not about the run
  return flat


def column(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
  """Steps and values of one number, where it was logged."""
  found = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
  return [step for step, _ in found], [value for _, value in found]
