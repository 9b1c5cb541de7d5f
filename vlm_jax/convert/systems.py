"""Published systems of Hugging Face and others, config.json and safetensors, both directions.

A converter is a module that says how one family of systems is written down; reading and writing is
here. It has

  MODEL_TYPES, FUSIONS                  theirs that it reads, ours (`config.fusion.name`) it writes
  SPELLINGS                             how keys are spelled in other files (`table.renamer`)
  HEAD                                  the key of the language model's head, None: it has none
  UNREAD                                keys of vectors [config.tower.width] that no model reads,
                                        and what they are filled with
  UNSAID                                optional: patterns of our parameters that no file has, and
                                        what they are then; None: they are not in what is read
  LLM                                   where the language model's tensors are, if it has any
  parts(config)                         where each module's tensors are (`table.Part`)
  read_config(theirs, config)           a copy of `config` with the model of their config.json
  write_config(config, image_token)     their config.json
  pixels(config, theirs)                their preprocessor_config.json
  CONFIG, WEIGHTS                       of files that are not Hugging Face's, whose config names no
                                        model_type and holds the pixels: the name of the config,
                                        and those of weights, the first of which is written
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from flax.core import meta
from ml_collections import ConfigDict

from vlm_jax.convert import (
  blip2,
  coca,
  hf_text,
  idefics,
  instructblip,
  llava,
  nodes,
  paligemma,
  processor,
  safetensors_io,
  sources,
  table,
  two_towers,
)
from vlm_jax.core import batch as batches
from vlm_jax.core import fusion, pieces, precision
from vlm_jax.core.errors import DataError, DiskError, UsageError, nearest
from vlm_jax.core.pieces import Pieces
from vlm_jax.core.tree import flatten
from vlm_jax.core.typing import Params
from vlm_jax.core.writing import new_directory, write_atomically
from vlm_jax.data import pipeline

CONFIG = "config.json"
CONVERTERS = (blip2, coca, idefics, instructblip, llava, paligemma, two_towers)


def is_published(directory: str | os.PathLike) -> bool:
  """Whether a directory holds a checkpoint that a converter may read."""
  if _named(directory) is not None:
    return True
  try:
    found = json.loads((Path(directory) / CONFIG).read_text())
  except (OSError, ValueError):
    return False
  return isinstance(found, dict) and "model_type" in found


def read_theirs(directory: str | os.PathLike) -> dict[str, Any]:
  """The config of a checkpoint, config.json or a converter's own file, with a model_type.

  Raises:
    DataError: there is no readable one.
  """
  module = _named(directory)
  if module is None:
    return safetensors_io.read_json(Path(directory) / CONFIG)
  return {**safetensors_io.read_json(Path(directory) / module.CONFIG),
          "model_type": module.MODEL_TYPES[0]}


def _named(directory: str | os.PathLike) -> ModuleType | None:
  """The converter whose own config file a directory has."""
  return next((module for module in CONVERTERS if hasattr(module, "CONFIG")
               and (Path(directory) / module.CONFIG).is_file()), None)


def config_name(config: ConfigDict) -> str:
  """The file that a checkpoint of `config`'s model has its config in; errors as `converter`."""
  return getattr(converter(config), "CONFIG", CONFIG)


def _weights(directory: str | os.PathLike, config: ConfigDict) -> Path:
  """The file or directory of the weights of a checkpoint of `config`'s model."""
  names = getattr(converter(config), "WEIGHTS", ())
  found = [Path(directory) / name for name in names if (Path(directory) / name).is_file()]
  if names and not found:
    raise DataError(f"{directory}: holds neither of {', '.join(names)}; give the directory of the "
                    "whole checkpoint")
  return found[0] if found else Path(directory)


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


def converter(config: ConfigDict) -> ModuleType:
  """The converter of the models of a config.

  Raises:
    UsageError: there is none for its strategy.
  """
  known = {name: module for module in CONVERTERS for name in module.FUSIONS}
  name = config.fusion.name
  if name not in known:
    raise UsageError(f"config.fusion.name is '{name}', of which --to=hf knows no published "
                     f"checkpoint; {nearest(name, known)}")
  return known[name]


def shapes(config: ConfigDict) -> dict[str, tuple[int, ...]]:
  """Path to shape of every parameter of `config`'s model; makes none."""
  module = fusion.find_fusion(config)
  row = batches.from_flat(batches.empty(module.fields(config), module.axes(config), rows=1))
  init = lambda: meta.unbox(module.Model(config).init(jax.random.key(0), row))["params"]
  return {path: leaf.shape for path, leaf in flatten(jax.eval_shape(init)).items()}


def entries(config: ConfigDict) -> list[table.Entry]:
  """Every tensor of the checkpoint of `config`'s model."""
  module, whole = converter(config), shapes(config)
  said = {path: shape for path, shape in whole.items() if not _unsaid(module, path)}
  return table.entries(module.parts(config), said)


def _unsaid(module: ModuleType, path: str) -> str | None:
  """The pattern of a parameter that no file of theirs has, None: they have it."""
  return next((pattern for pattern in getattr(module, "UNSAID", {})
               if re.fullmatch(pattern, path)), None)


def read_config(directory: str | os.PathLike, config: ConfigDict) -> ConfigDict:
  """A copy of `config` whose model and pixels are those of a directory.

  Args:
    directory: holds config.json; a preprocessor_config.json is read too.
    config: any recipe; everything that does not describe the model stays as it is.

  Raises:
    UsageError: no converter reads it, or it asks for what our modules do not have.
    DataError: there is no readable config.json.
  """
  theirs = read_theirs(directory)
  config = reader(theirs).read_config(theirs, config)
  _read_processor(Path(directory), config)
  return config


def _read_processor(directory: Path, config: ConfigDict) -> None:
  """Sets how the image processor of a checkpoint, if there is one, makes pixels.

  It is a node of processor_config.json, as transformers 5 writes it, or a file of its own.
  """
  whole, alone = directory / processor.WHOLE, directory / processor.FILE
  theirs = safetensors_io.read_json(whole).get(processor.NODE) if whole.exists() else None
  if theirs is None:
    if not alone.exists():
      return
    theirs = safetensors_io.read_json(alone)
  tower, decode = processor.read(theirs)
  if decode["fit"] == "naflex":  # which may give a tower more patches than it has positions
    native = config.tower.position_size or config.tower.image_size
    config.tower.position_size = 0 if tower["image_size"] == native else native
  elif tower["image_size"] != config.tower.image_size:
    raise UsageError(f"{processor.FILE}: images of {tower['image_size']} pixels, but config.json's "
                     f"tower sees {config.tower.image_size}; they are not of one checkpoint")
  config.tower.update(tower)
  config.data.decode.update(decode)


def read(directory: str | os.PathLike, config: ConfigDict,
         dtype: np.dtype | None = None) -> tuple[ConfigDict, Params]:
  """Reads a checkpoint of any published system.

  Args:
    directory: holds config.json and safetensors weights, in any spelling of their keys.
    config: any recipe; everything that does not describe the model stays as it is.
    dtype: of the parameters; None: the file's.

  Returns:
    The config of the checkpoint's model, and its parameters as numpy arrays.

  Raises:
    UsageError: as `read_config`.
    DataError: a file is missing or damaged, keys are missing or unexpected, shapes are wrong.
  """
  config = read_config(directory, config)
  with sources.open_source(_weights(directory, config)) as source:
    return config, load(source, config, dtype)


def load(source: table.Source, config: ConfigDict, dtype: np.dtype | None = None) -> Params:
  """The parameters of `config`'s model from their tensors by key; errors as `read`."""
  return _read(source, config, dtype, table.load)


@contextlib.contextmanager
def open_pieces(directory: str | os.PathLike, config: ConfigDict,
                dtype: np.dtype | None = None) -> Iterator[dict[str, Pieces]]:
  """The parameters of `config`'s model by path, read from their files when asked for.

  Args:
    directory: holds safetensors weights.
    config: from `read_config`.
    dtype: of the parameters; None: the file's.

  Raises:
    DataError: as `read`.
  """
  with sources.open_source(_weights(directory, config)) as source:
    yield _read(source, config, dtype, table.open_pieces)


def _read(source: table.Source, config: ConfigDict, dtype: np.dtype | None, how: Any) -> Any:
  module = converter(config)
  tied = module.HEAD if config.llm.tie_embeddings else None
  copies = getattr(fusion.find_llm(config), "UNREAD", ())
  unread = (*module.UNREAD, *(module.LLM + key for key in copies))
  found = nodes.load(source, entries(config), tied, table.renamer(module.SPELLINGS), unread, dtype,
                     how)
  for path, shape in shapes(config).items():
    if (pattern := _unsaid(module, path)) and (value := module.UNSAID[pattern]) is not None:
      kind = next(iter(flatten(found).values())).dtype
      array = np.full(shape, value, kind)
      found[path] = array if how is table.load else pieces.of(array)
  return found


def write(
  directory: str | os.PathLike,
  config: ConfigDict,
  params: Params,
  image_token: int,
  shard_bytes: int = safetensors_io.SHARD_BYTES,
  dtype: np.dtype | None = None,
) -> None:
  """Writes a checkpoint that its publisher's program loads: config, image processor, weights.

  Args:
    directory: made if missing; must not hold a checkpoint.
    config: the config of the model.
    params: its parameters without metadata boxes, arrays or `Pieces`.
    image_token: the token id that stands for one image slot in their input_ids, if any does.
    shard_bytes: largest weight file.
    dtype: of the file; None: the parameters'.

  Raises:
    UsageError: the directory holds a checkpoint, or the config is of no published system.
    DiskError: it cannot be written.
  """
  module = converter(config)
  kind = np.dtype(dtype or next(iter(flatten(params).values())).dtype)
  theirs = module.write_config(config, image_token)
  tensors = table.export(params, entries(config), dtype)
  for name, value in module.UNREAD.items():
    filler = np.full(config.tower.width, value, kind)
    tensors[name] = safetensors_io.Tensor(filler.shape, kind, lambda filler=filler: filler)
  directory = safetensors_io.new_directory(directory)
  if names := getattr(module, "WEIGHTS", ()):
    safetensors_io.write_file(directory / names[0], tensors)
    return safetensors_io.write_json(directory / module.CONFIG, theirs)
  safetensors_io.write(directory, tensors, shard_bytes)
  safetensors_io.write_json(directory / processor.FILE, module.pixels(config, theirs))
  safetensors_io.write_json(directory / CONFIG, {**theirs, "dtype": kind.name})


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
    config: of its model; `data.tokenizer`, `data.template` and, where a connector reads,
      `data.instruction_tokenizer` are changed.
    folder: made if missing; of this checkpoint alone.

  Returns:
    A line for every mark that the model has yet to learn, see `hf_text.adopt`.

  Raises:
    UsageError, DataError: as `hf_text.read`, `hf_text.adopt_reader` and
      `pipeline.load_tokenizer`.
    DiskError: it cannot be written.
  """
  directory = Path(directory)
  kept, new = hf_text.convention(directory, config), []
  path = Path(folder) / (hf_text.FOLDER if kept else hf_text.TOKENIZER)
  config.data.tokenizer = str(path)
  hf_text.adopt_reader(directory, config, Path(folder))
  if kept:
    config.data.template = kept
    if not path.exists():
      try:
        with new_directory(path, "config.data.tokenizer") as made:
          hf_text.keep(directory, made)
      except (DiskError, UsageError):
        if not path.exists():  # else a process beside this one has written the same
          raise
    pipeline.load_tokenizer(config)
  else:
    tokenizer, new = hf_text.read(directory, fusion.vocabulary(config), config.data.template)
    if not path.exists():
      write_atomically(path, tokenizer.to_str())
  return new
