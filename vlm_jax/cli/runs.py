"""A run directory back to a config and parameters: for commands that use a run, and notebooks."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict


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


def open_config(workdir: str, root: str | None = None,
                outside: bool = False) -> tuple[ConfigDict, Load]:
  """The frozen config, and what reads the parameters of a step (None: the newest).

  Nothing in the run directory is locked or written, so a training process is not disturbed.

  Raises:
    UsageError: not a run directory.
  """
  from vlm_jax.train.workdir import load_config

  config = load_config(workdir, outside=outside)
  if root:
    config.data.root = root
  import jax

  from vlm_jax.configs import base
  from vlm_jax.core.fusion import find_fusion
  from vlm_jax.core.mesh import make_mesh
  from vlm_jax.train import loop, state
  from vlm_jax.train.checkpoint import load_params

  config.mesh = base.get_config().mesh  # the run's own may want more devices than there are here
  loop.set_up_cache(config)
  _, leaves = state.initializer(find_fusion(config), config)
  abstract = state.abstract_params(leaves, make_mesh(config, jax.devices()[:1]))
  return config.lock(), lambda step: load_params(checkpoints(workdir), abstract, step)


def checkpoints(workdir: str) -> Path:
  """The folder of a run's checkpoints."""
  return Path(workdir).absolute() / "checkpoints"
