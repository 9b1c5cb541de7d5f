"""A run directory back to a config and parameters: for commands that use a run, and notebooks.

A run of an older version lacks the fields that were added since. What does not decide the model is
taken from `configs/base.py`; a field that does is never guessed.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.configs import base
from vlm_jax.core.errors import UsageError

MODEL = ("fusion", "tower", "connector", "llm", "precision")  # groups that decide what a model is
COMPUTED = ("remat", "unroll", "init")  # but for these: how it is computed, where it began


def arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that name a run."""
  parser.add_argument("--workdir", required=True, help="run directory")
  parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
  parser.add_argument("--root", help="prepared data, if it is not where the run's config says")
  parser.add_argument("--allow-outside", action="store_true",
                      help="let the frozen config name modules outside vlm_jax; they run code")


Load = Callable[[int | None], tuple[dict[str, Any], int]]


def open_run(workdir: str, step: int | None = None, root: str | None = None,
             outside: bool = False) -> tuple[ConfigDict, dict[str, Any], int]:
  """The frozen config, the verified parameters of a checkpoint on one device, and its step.

  Args:
    workdir: run directory.
    step: of the checkpoint, None: the newest.
    root: prepared data, None: where the run's config says.
    outside: let the frozen config name modules outside vlm_jax.

  Raises:
    UsageError: not a run directory, or no such checkpoint.
    DataError: the checkpoint is damaged.
  """
  config, load = open_config(workdir, root, outside)
  params, step = load(step)
  return config, params, step


def open_pieces(workdir: str, step: int | None = None) -> tuple[ConfigDict, dict[str, Any], int]:
  """As `open_run`, the parameters being `Pieces`: for what reads them once and in order.

  Raises:
    UsageError: not a run directory, no such checkpoint, or one of another model.
    DataError: the checkpoint is damaged.
  """
  config = frozen(workdir)
  from vlm_jax.core.fusion import find_fusion
  from vlm_jax.core.tree import unflatten
  from vlm_jax.train import checkpoint, checkpoint_tools, state

  path = checkpoints(workdir)
  step = checkpoint.choose(path, step)
  params = checkpoint_tools.open_sound(path, step)
  _, leaves = state.initializer(find_fusion(config), config)
  saved = {name: {"shape": list(leaf.shape)} for name, leaf in params.items()}
  checkpoint.same_model(saved, unflatten(leaves), step)
  return config.lock(), unflatten(params), step


def open_config(workdir: str, root: str | None = None,
                outside: bool = False) -> tuple[ConfigDict, Load]:
  """The frozen config, and what reads the parameters of a step (None: the newest).

  Nothing in the run directory is locked or written, so a training process is not disturbed.

  Raises:
    UsageError: not a run directory.
  """
  config = frozen(workdir, root, outside)
  import jax

  from vlm_jax.core.fusion import find_fusion
  from vlm_jax.core.mesh import make_mesh
  from vlm_jax.train import loop, state
  from vlm_jax.train.checkpoint import load_params

  config.mesh = base.get_config().mesh  # the run's own may want more devices than there are here
  loop.set_up_cache(config)
  _, leaves = state.initializer(find_fusion(config), config)
  abstract = state.abstract_params(leaves, make_mesh(config, jax.devices()[:1]))
  return config.lock(), lambda step: load_params(checkpoints(workdir), abstract, step)


def frozen(workdir: str | Path, root: str | None = None, outside: bool = False) -> ConfigDict:
  """The frozen config of a run with every field there is now; says in a line what it filled in.

  Raises:
    UsageError: not a run directory, or it lacks a field that decides the model.
  """
  from vlm_jax.train.workdir import load_config

  config = load_config(workdir, outside=outside)
  path = Path(workdir) / "config.json"
  if filled := fill(config, str(path)):
    print(f"{path} is of an older version; from configs/base.py: {', '.join(filled)}",
          file=sys.stderr)
  if root:
    config.data.root = root
  return config


def fill(config: ConfigDict, path: str) -> list[str]:
  """Adds the fields of `configs/base.py` that a config lacks, and returns them as "name=value".

  Raises:
    UsageError: one of them decides the model; the sentence names `path`, where it belongs.
  """
  models, filled = {"data.sources": base.source(), "evals": base.evaluation()}, []

  def visit(node: ConfigDict, model: ConfigDict, prefix: str) -> None:
    if prefix in models:
      for name in node:
        visit(node[name], models[prefix], f"{prefix}.{name}")
      return
    if prefix == "fusion.objectives":
      return  # the strategy names them, and training has refused what is none
    for name, default in model.items():
      field = f"{prefix}.{name}" if prefix else name
      if name in node:
        if isinstance(default, ConfigDict):
          visit(node[name], default, field)
        continue
      if field.split(".")[0] in MODEL and name not in COMPUTED:
        raise UsageError(f"{path} has no config.{field}, which decides what the model is; write it "
                         f"there as it was in the version that trained it (now: {default!r})")
      node[name] = default
      filled.append(f"{field}={default!r}" if not isinstance(default, ConfigDict) else field)

  visit(config, base.get_config(), "")
  return filled


def checkpoints(workdir: str) -> Path:
  """The folder of a run's checkpoints."""
  return Path(workdir).absolute() / "checkpoints"
