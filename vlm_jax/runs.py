"""The frozen config and the checkpoints of a run directory; `vlm_jax.load` is the way to use them.

The config of an older version is filled first, see `configs/older.py`.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.configs import base, older

Load = Callable[[int | None], tuple[dict[str, Any], int]]


def open_pieces(workdir: str, step: int | None = None) -> tuple[ConfigDict, dict[str, Any], int]:
  """The frozen config, the parameters of a checkpoint as `Pieces`, and its step.

  For what reads parameters once and in order.

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
  if filled := older.fill(config, str(path)):
    print(f"{path} is of an older version; from configs/base.py: {', '.join(filled)}",
          file=sys.stderr)
  if root:
    config.data.root = root
  return config


def checkpoints(workdir: str) -> Path:
  """The folder of a run's checkpoints."""
  return Path(workdir).absolute() / "checkpoints"
