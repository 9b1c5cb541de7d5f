"""What the converters of published systems share: shapes, the image processor, writing of files."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.core import meta
from ml_collections import ConfigDict

from vlm_jax.convert import processor, safetensors_io
from vlm_jax.core import batch as batches
from vlm_jax.core import fusion
from vlm_jax.core.errors import UsageError
from vlm_jax.core.tree import flatten
from vlm_jax.core.typing import Params


def shapes(config: ConfigDict) -> dict[str, tuple[int, ...]]:
  """Path to shape of every parameter of `config`'s model; makes none."""
  module = fusion.find_fusion(config)
  row = batches.from_flat(batches.empty(module.fields(config), module.axes(config), rows=1))
  init = lambda: meta.unbox(module.Model(config).init(jax.random.key(0), row))["params"]
  return {path: leaf.shape for path, leaf in flatten(jax.eval_shape(init)).items()}


def read_processor(directory: str | os.PathLike, config: ConfigDict) -> None:
  """Sets how the image processor of a checkpoint, if there is one, makes pixels.

  It is a node of processor_config.json, as transformers 5 writes it, or a file of its own.

  Raises:
    UsageError: it makes other pixels than the tower of `config` sees, or as `processor.read`.
  """
  whole, alone = (Path(directory) / name for name in (processor.WHOLE, processor.FILE))
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


def dtype_of(params: Params, dtype: np.dtype | None) -> np.dtype:
  """What config.json says of a file in `dtype`; None: the parameters', as the embedding has it."""
  return np.dtype(dtype or params["llm"]["embed"]["embedding"].dtype)


def write(
  directory: str | os.PathLike,
  tensors: dict[str, safetensors_io.Tensor],
  theirs: dict[str, Any],
  pixels: dict[str, Any],
  shard_bytes: int,
) -> None:
  """Writes a checkpoint.

  Args:
    directory: made if missing; must not hold a checkpoint.
    tensors: by their keys.
    theirs: the content of config.json.
    pixels: the content of preprocessor_config.json.
    shard_bytes: largest weight file.

  Raises:
    UsageError: the directory holds a checkpoint.
    DiskError: it cannot be written.
  """
  directory = safetensors_io.new_directory(directory)
  safetensors_io.write(directory, tensors, shard_bytes)
  safetensors_io.write_json(directory / processor.FILE, pixels)
  safetensors_io.write_json(directory / "config.json", theirs)
