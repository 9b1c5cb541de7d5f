"""Where a new run's parameters come from beside the draw of its seed: `init` of config nodes.

`config.fusion.init` names a whole model, a run, a checkpoint of Hugging Face, big_vision's .npz or
a BLIP-2 of LAVIS as .pth, which may lack what other fields then name;
`config.tower.init`, `config.connector.init` and `config.llm.init` name weights of single modules in
any known format (`convert.sources`) or another run, and replace what the whole model has;
`config.lora.init` names adapters of PEFT. They are read once: a resumed run has its own checkpoint
and does not need them.
"""

import re
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from vlm_jax.convert import adapters, sources, systems
from vlm_jax.core import fusion
from vlm_jax.core.adapters import is_adapter
from vlm_jax.core.errors import DataError
from vlm_jax.core.tree import flatten, unflatten
from vlm_jax.core.typing import Params
from vlm_jax.train import checkpoint_tools
from vlm_jax.train.state import Leaf
from vlm_jax.train.workdir import load_config

NODES = tuple(sources.FLOORS)


def read(config: ConfigDict, leaves: dict[str, Leaf]) -> dict[str, np.ndarray]:
  """The parameters that the config's `init` fields name; {} when they name nothing.

  Args:
    config: every field.
    leaves: path to Leaf of every parameter.

  Returns:
    Path to array, in the dtypes of the leaves.

  Raises:
    UsageError: there are no weights of a known kind.
    DataError: they are damaged or of another model; the sentence names field and tensor.
  """
  found = _whole(config, leaves) if config.fusion.init else {}
  for node in NODES:
    if not config[node].init:
      continue
    mine = {path.partition("/")[2]: leaf for path, leaf in leaves.items()
            if path.startswith(f"{node}/") and not is_adapter(path)}
    dtype = np.dtype(next(iter(mine.values())).dtype)
    if (Path(config[node].init) / checkpoint_tools.FOLDER).is_dir():
      module = fusion.find(sources.FLOORS[node], config[node].name, outside=config.outside)
      arrays = _of_run(config[node].init, node, mine, dtype, getattr(module, "STAGED", ()))
    else:
      shapes = {path: leaf.shape for path, leaf in mine.items()}
      arrays = sources.load_node(config[node].init, node, config, shapes, dtype)
    found |= {f"{node}/{path}": array for path, array in arrays.items()}
  if config.lora.init:
    found |= {path: array.astype(leaves[path].dtype)
              for path, array in adapters.read(config.lora.init, config).items()}
  return found


def place(params: Params, found: dict[str, np.ndarray]) -> Params:
  """`params` with the arrays of `read` in their places, each where the old leaf lies."""
  flat = flatten(params)
  return unflatten({
    path: jax.make_array_from_callback(leaf.shape, leaf.sharding, found[path].__getitem__)
    if path in found else leaf for path, leaf in flat.items()
  })


def _whole(config: ConfigDict, leaves: dict[str, Leaf]) -> dict[str, np.ndarray]:
  """All parameters but adapters: those of the newest or the named checkpoint of a run, with its own
  adapters merged, or those of a checkpoint of Hugging Face or big_vision."""
  init = Path(config.fusion.init)
  mine = {path: leaf for path, leaf in leaves.items() if not is_adapter(path)}
  if read := {".npz": sources.load_npz, ".pth": sources.load_pth}.get(init.suffix):
    return read(init, config, {path: leaf.shape for path, leaf in mine.items()},
                np.dtype(next(iter(mine.values())).dtype))
  if systems.is_published(init):
    plain = config.copy_and_resolve_references()
    with plain.unlocked():
      plain.lora.rank = 0  # their files know nothing of adapters that are to be trained
    _, params = systems.read(init, plain)
  else:
    folder, step = checkpoint_tools.locate(init)
    contents = checkpoint_tools.sound(folder, step, ("params",))
    params = unflatten(contents.arrays)["params"]
    if any(map(is_adapter, contents.arrays)):
      params, _ = adapters.merge(params, load_config(folder.parent))
  flat = flatten(params)
  _same(f"config.fusion.init={init}", flat, mine)
  return {path: array.astype(mine[path].dtype) for path, array in flat.items()}


def _same(field: str, theirs: dict[str, np.ndarray], leaves: dict[str, Leaf], node: str = ""
          ) -> None:
  """Raises a DataError that names the field when the parameters are not those of the model."""
  for path in sorted(theirs.keys() | leaves.keys()):
    shape = theirs[path].shape if path in theirs else "missing"
    expected = leaves[path].shape if path in leaves else "no such parameter"
    if shape != expected:
      raise DataError(f"{field}: {node}{path} is {shape}, expected {expected}; the weights are of "
                      "another model")


def _of_run(run: str, node: str, leaves: dict[str, Leaf], dtype: np.dtype,
            staged: tuple[str, ...]) -> dict[str, np.ndarray]:
  """The node's parameters in the newest checkpoint of a run.

  Those of the patterns `staged` may be of one stage of a system alone: what only the run has is
  left out, and what only the new model has stays as it was drawn.
  """
  contents = checkpoint_tools.sound(*checkpoint_tools.locate(run), ("params",))
  prefix = f"params/{node}/"
  theirs = {path.removeprefix(prefix): array for path, array in contents.arrays.items()
            if path.startswith(prefix) and not is_adapter(path)}
  own = lambda path: any(re.fullmatch(pattern, path) for pattern in staged)
  theirs = {path: array for path, array in theirs.items() if path in leaves or not own(path)}
  leaves = {path: leaf for path, leaf in leaves.items() if path in theirs or not own(path)}
  _same(f"config.{node}.init={run}", theirs, leaves, f"{node}/")
  return {path: array.astype(dtype) for path, array in theirs.items()}
