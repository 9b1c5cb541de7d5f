"""The converter of a published system, found by its config.json or by our config.

A converter is a module with MODEL_TYPES, FUSIONS (the strategies that it writes) and these:

  read_config(theirs, config)                                          ConfigDict
  read(directory, config, dtype)                                       ConfigDict, Params
  write(directory, config, params, image_token, shard_bytes, dtype)    None
  shapes(config), parts(config), entries(config)                       parameters, their tensors
"""

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.convert import llava, paligemma, safetensors_io, two_towers
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.typing import Params

CONVERTERS = (llava, paligemma, two_towers)


def reader(theirs: dict[str, Any]) -> ModuleType:
  """The converter that reads their config.json.

  Raises:
    UsageError: there is none for its model_type.
  """
  known = {kind: module for module in CONVERTERS for kind in module.MODEL_TYPES}
  kind = theirs.get("model_type", "")
  if kind not in known:
    raise UsageError(f"config.json: model_type is '{kind}', which --from=hf cannot make a run of; "
                     f"{nearest(kind, known)}; config.llm.init and config.tower.init read modules "
                     "alone")
  return known[kind]


def writer(config: ConfigDict) -> ModuleType:
  """The converter that writes the models of a config.

  Raises:
    UsageError: there is none for its strategy.
  """
  known = {name: module for module in CONVERTERS for name in module.FUSIONS}
  name = config.fusion.name
  if name not in known:
    raise UsageError(f"config.fusion.name is '{name}', of which --to=hf knows no published "
                     f"checkpoint; {nearest(name, known)}")
  return known[name]


def read_config(directory: str | os.PathLike, config: ConfigDict) -> ConfigDict:
  """A copy of `config` whose model is the one of a directory's config.json.

  Raises:
    UsageError: no converter reads it, or it lacks a setting.
    DataError: there is no readable config.json.
  """
  theirs = safetensors_io.read_json(Path(directory) / "config.json")
  return reader(theirs).read_config(theirs, config)


def read(directory: str | os.PathLike, config: ConfigDict,
         dtype: np.dtype | None = None) -> tuple[ConfigDict, Params]:
  """Reads a checkpoint of any published system.

  Args:
    directory: holds config.json and safetensors weights.
    config: any recipe; everything that does not describe the model stays as it is.
    dtype: of the parameters; None: the file's.

  Returns:
    The config of the checkpoint's model, and its parameters as numpy arrays.

  Raises:
    UsageError: as `read_config`.
    DataError: a file is missing or damaged, keys are missing or unexpected, shapes are wrong.
  """
  theirs = safetensors_io.read_json(Path(directory) / "config.json")
  return reader(theirs).read(directory, config, dtype)
