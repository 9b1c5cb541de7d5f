"""CLIP and SigLIP checkpoints of Hugging Face: config.json and safetensors, both directions.

A CLIP is the strategy `clip`, a SigLIP or a SigLIP 2 the strategy `siglip`; the towers are whatever
module has the model_type of their nodes. The checkpoints of SigLIP 2 for one resolution call
themselves "siglip"; those that call themselves "siglip2" give every image a grid of its own.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.convert import files, nodes, processor, safetensors_io, table
from vlm_jax.convert.files import shapes
from vlm_jax.core import fusion
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.typing import Params

TOWER, TEXT = "vision_model.", "text_model."


class System(NamedTuple):
  """A published system: our strategy, what the tower pools, their class."""

  fusion: str
  pool: str
  architecture: str


SYSTEMS = {
  "clip": System("clip", "tok", "CLIPModel"),
  "siglip": System("siglip", "map", "SiglipModel"),
  "siglip2": System("siglip", "map", "Siglip2Model"),
}
MODEL_TYPES, FUSIONS = tuple(SYSTEMS), ("clip", "siglip")


def read(directory: str | os.PathLike, config: ConfigDict,
         dtype: np.dtype | None = None) -> tuple[ConfigDict, Params]:
  """Reads a checkpoint.

  Args:
    directory: holds config.json and safetensors weights; a preprocessor_config.json is read too.
    config: any recipe; everything that does not describe the model stays as it is.
    dtype: of the parameters; None: the file's.

  Returns:
    The config of the checkpoint's model, and its parameters as numpy arrays.

  Raises:
    DataError: a file is missing or damaged, keys are missing or unexpected, shapes are wrong.
    UsageError: config.json asks for something that our modules do not have.
  """
  theirs = safetensors_io.read_json(Path(directory) / "config.json")
  config = read_config(theirs, config)
  files.read_processor(directory, config)
  with safetensors_io.Reader(directory) as reader:
    return config, load(reader, config, dtype)


def load(source: table.Source, config: ConfigDict, dtype: np.dtype | None = None) -> Params:
  """The parameters of `config`'s model from their tensors by key, see `nodes.load`."""
  return nodes.load(source, entries(config), dtype=dtype)


def write(
  directory: str | os.PathLike,
  config: ConfigDict,
  params: Params,
  image_token: int,
  shard_bytes: int = safetensors_io.SHARD_BYTES,
  dtype: np.dtype | None = None,
) -> None:
  """Writes a checkpoint that transformers loads: config, image processor, weights.

  Args:
    directory: made if missing; must not hold a checkpoint.
    config: the config of the model.
    params: its parameters, without metadata boxes.
    image_token: of no meaning here: no text holds a picture.
    shard_bytes: largest weight file.
    dtype: of the file; None: the parameters'.

  Raises:
    UsageError: the directory holds a checkpoint, or the config is of no such system.
    DiskError: it cannot be written.
  """
  del image_token
  theirs = {**write_config(config), "dtype": files.dtype_of(params, dtype).name}
  pixels = config
  if theirs["model_type"] == "siglip2":  # which reads nothing else
    pixels = config.copy_and_resolve_references()
    pixels.data.decode.fit = "naflex"
  pixels = processor.write(pixels)
  tensors = table.export(params, entries(config), dtype)
  files.write(directory, tensors, theirs, pixels, shard_bytes)


def parts(config: ConfigDict) -> tuple[table.Part, ...]:
  """Where each module's tensors are; the modules name their own KEYS."""
  return (
    ("tower/", TOWER, fusion.find_tower(config).KEYS),
    ("llm/", TEXT, fusion.find_llm(config).KEYS),
    ("", "", fusion.find_fusion(config).KEYS),
  )


def entries(config: ConfigDict) -> list[table.Entry]:
  """Every tensor of the checkpoint of `config`'s model."""
  return table.entries(parts(config), shapes(config))


def read_config(theirs: dict[str, Any], config: ConfigDict) -> ConfigDict:
  """A copy of `config` whose model is the one of their config.json.

  Raises:
    UsageError: a setting that our modules do not have; the sentence names it.
  """
  kind = theirs.get("model_type", "")
  if kind not in SYSTEMS:
    raise UsageError(f"config.json: model_type is '{kind}'; {nearest(kind, SYSTEMS)}")
  config, system = config.copy_and_resolve_references(), SYSTEMS[kind]
  text, vision = theirs.get("text_config") or {}, theirs.get("vision_config") or {}
  config.fusion.name, config.data.template = system.fusion, "caption"
  config.fusion.objectives = ConfigDict({"contrast": 1.0})
  config.fusion.width = theirs.get("projection_dim", 512)
  config.llm.update(nodes.read(text, "llm", f"{kind}_text_model"))
  config.tower.update(nodes.read(vision, "towers", f"{kind}_vision_model"))
  config.tower.pool = system.pool
  if kind == "siglip2":
    config.data.decode.update(fit="naflex", kernel="bilinear")
  if kind != "clip":
    size = text.get("projection_size") or config.llm.width
    if not vision.get("vision_use_head", True) or size != config.tower.width:
      raise UsageError(f"config.json: texts are projected to {size} and vision_use_head is "
                       f"{vision.get('vision_use_head', True)}; pictures need the pooling head, "
                       f"and texts their width, {config.tower.width}")
  return config


def write_config(config: ConfigDict, image_token: int = 0) -> dict[str, Any]:
  """Their config.json of `config`'s model; no text holds a picture, so `image_token` means nothing.

  Raises:
    UsageError: the config is of no such system; the sentence names the field.
  """
  del image_token
  text, vision = nodes.write(config.llm, "llm"), nodes.write(config.tower, "towers")
  kind = vision["model_type"].removesuffix("_vision_model")
  if kind not in SYSTEMS or SYSTEMS[kind].fusion != config.fusion.name:
    raise UsageError(f"config.fusion.name is '{config.fusion.name}' and the tower's model_type "
                     f"'{vision['model_type']}'; a checkpoint has both of 'clip' or of 'siglip'")
  system = SYSTEMS[kind]
  if config.tower.pool != system.pool or not config.tower.post_norm:
    raise UsageError(f"config.tower.pool is '{config.tower.pool}' and post_norm "
                     f"{config.tower.post_norm}; a {kind} checkpoint can only say '{system.pool}' "
                     "and True")
  if text["model_type"].split("_")[0] != system.fusion:
    raise UsageError(f"config.llm: the text tower is that of a {text['model_type']}; a {kind} "
                     "checkpoint needs its own attends and pool")
  text["model_type"] = f"{kind}_text_model"
  theirs = {"architectures": [system.architecture], "model_type": kind}
  if kind == "clip":
    text["projection_dim"] = vision["projection_dim"] = config.fusion.width
    return {**theirs, "projection_dim": config.fusion.width, "text_config": text,
            "vision_config": vision}
  text["projection_size"] = config.tower.width
  return {**theirs, "text_config": text, "vision_config": {**vision, "vision_use_head": True}}
