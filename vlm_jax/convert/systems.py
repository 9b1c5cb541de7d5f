"""The converter of a published system, found by its config.json or by our config.

A converter is a module with MODEL_TYPES, FUSIONS (the strategies that it writes) and these:

  read_config(theirs, config)                                          ConfigDict
  read(directory, config, dtype)                                       ConfigDict, Params
  write(directory, config, params, image_token, shard_bytes, dtype)    None
  shapes(config), parts(config), entries(config)                       parameters, their tensors
"""

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.convert import hf_text, llava, paligemma, safetensors_io, two_towers
from vlm_jax.core import precision
from vlm_jax.core.errors import DataError, UsageError, nearest
from vlm_jax.core.tree import flatten
from vlm_jax.core.typing import Params
from vlm_jax.core.writing import new_directory, write_atomically
from vlm_jax.data import pipeline

CONVERTERS = (llava, paligemma, two_towers)


def is_published(directory: str | os.PathLike) -> bool:
  """Whether a directory holds a checkpoint of Hugging Face."""
  try:
    found = json.loads((Path(directory) / "config.json").read_text())
  except (OSError, ValueError):
    return False
  return isinstance(found, dict) and "model_type" in found


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


def one_dtype(params: Params) -> str:
  """The dtype that all parameters have, the only one that a run can have.

  Raises:
    DataError: there are several.
  """
  kinds: dict[str, str] = {}
  for path, leaf in flatten(params).items():
    kinds.setdefault(str(leaf.dtype), path)
  if len(kinds) > 1 or not set(kinds) <= set(precision.DTYPES):
    told = ", ".join(f"{path} is {kind}" for kind, path in kinds.items())
    raise DataError(f"weights: {told}; a run has one of {' or '.join(precision.DTYPES)}, ask for "
                    "it with --dtype")
  return next(iter(kinds))


def adopt_tokenizer(directory: str | os.PathLike, config: ConfigDict, folder: str | os.PathLike
                    ) -> list[str]:
  """Puts a checkpoint's tokenizer into `folder` and has `config.data` use it.

  It is kept as it is where it writes turns or captions itself (`hf_text.convention`), and
  otherwise gets our marks. What is there already stays.

  Args:
    directory: of the checkpoint.
    config: of its model; `data.tokenizer` and `data.template` are changed.
    folder: made if missing; of this checkpoint alone.

  Returns:
    A line for every mark that the model has yet to learn, see `hf_text.adopt`.

  Raises:
    UsageError, DataError: as `hf_text.read` and `pipeline.load_tokenizer`.
    DiskError: it cannot be written.
  """
  directory = Path(directory)
  kept, new = hf_text.convention(directory, config), []
  path = Path(folder) / (hf_text.FOLDER if kept else hf_text.TOKENIZER)
  config.data.tokenizer = str(path)
  if kept:
    config.data.template = kept
    if not path.exists():
      with new_directory(path) as made:
        hf_text.keep(directory, made)
    pipeline.load_tokenizer(config)
  else:
    tokenizer, new = hf_text.read(directory, config.llm.vocab_size, config.data.template)
    if not path.exists():
      write_atomically(path, tokenizer.to_str())
  return new
