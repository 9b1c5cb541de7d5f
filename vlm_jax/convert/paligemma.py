"""PaliGemma checkpoints of Hugging Face: config.json and safetensors, both directions.

A PaliGemma (arXiv:2407.07726) and a PaliGemma 2 (2412.03555) are the strategy `prefix_lm`, tower
`vit` (SigLIP, behind its last norm), connector `linear`, and a Gemma or Gemma 2. What the tower
says goes in among tokens that were multiplied with sqrt(D), and is not multiplied itself. Theirs
counts positions from 1, which rotary embeddings do not see. The embedding of the published files
has 257,216 rows, of which a tokenizer uses 257,152.

Called without token_type_ids their model is causal, the prefix too: another one.
"""

import os
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.convert import files, nodes, processor, safetensors_io, table
from vlm_jax.convert.files import shapes
from vlm_jax.convert.llava import CONNECTOR, HEAD, LLM, SPELLINGS, TOWER
from vlm_jax.core import fusion, hf
from vlm_jax.core.errors import UsageError
from vlm_jax.core.typing import Params

MODEL_TYPES, FUSIONS = ("paligemma",), ("prefix_lm",)
TEXTS, VISION = ("gemma", "gemma2"), "siglip_vision_model"
# What a config must be beside the nodes of its parts.
NEEDED = (("fusion.name", "prefix_lm"), ("connector.name", "linear"), ("connector.bias", True),
          ("tower.name", "vit"), ("tower.post_norm", True), ("tower.pool", "none"),
          ("tower.feature_layer", -1))


def read(directory: str | os.PathLike, config: ConfigDict,
         dtype: np.dtype | None = None) -> tuple[ConfigDict, Params]:
  """Reads a PaliGemma checkpoint, in any spelling of its keys.

  Args:
    directory: holds config.json and safetensors weights.
    config: any recipe; everything that does not describe the model stays as it is.
    dtype: of the parameters; None: the file's.

  Returns:
    The config of the checkpoint's model, and its parameters as numpy arrays.

  Raises:
    DataError: a file is missing or damaged, keys are missing or unexpected, shapes are wrong.
    UsageError: config.json asks for something that the modules named above do not have.
  """
  config = read_config(safetensors_io.read_json(Path(directory) / "config.json"), config)
  files.read_processor(directory, config)
  with safetensors_io.Reader(directory) as reader:
    return config, load(reader, config, dtype)


def load(source: table.Source, config: ConfigDict, dtype: np.dtype | None = None) -> Params:
  """The parameters of `config`'s model from their tensors by key, see `nodes.load`."""
  tied = HEAD if config.llm.tie_embeddings else None
  return nodes.load(source, entries(config), tied, table.renamer(SPELLINGS), dtype=dtype)


def write(
  directory: str | os.PathLike,
  config: ConfigDict,
  params: Params,
  image_token: int,
  shard_bytes: int = safetensors_io.SHARD_BYTES,
  dtype: np.dtype | None = None,
) -> None:
  """Writes a checkpoint that transformers 4 and 5 load: config, image processor, weights.

  Args:
    directory: made if missing; must not hold a checkpoint.
    config: the config of the model.
    params: its parameters, without metadata boxes.
    image_token: the token id that stands for one image slot in their input_ids.
    shard_bytes: largest weight file.
    dtype: of the file; None: the parameters'.

  Raises:
    UsageError: the directory holds a checkpoint, or the config is not a PaliGemma.
    DiskError: it cannot be written.
  """
  theirs = {**write_config(config, image_token), "dtype": files.dtype_of(params, dtype).name}
  pixels = processor.write(config) | {
    "processor_class": "PaliGemmaProcessor", "image_seq_length": _slots(config)}
  tensors = table.export(params, entries(config), dtype)
  files.write(directory, tensors, theirs, pixels, shard_bytes)


def parts(config: ConfigDict) -> tuple[table.Part, ...]:
  """Where each module's tensors are; the modules name their own KEYS."""
  return (
    ("tower/", TOWER, fusion.find_tower(config).KEYS),
    ("connector/", CONNECTOR + "linear.", fusion.find_connector(config).KEYS),
    ("llm/", LLM, fusion.find_llm(config).KEYS),
  )


def entries(config: ConfigDict) -> list[table.Entry]:
  """Every tensor of the checkpoint of `config`'s model."""
  return table.entries(parts(config), shapes(config))


def read_config(theirs: dict, config: ConfigDict) -> ConfigDict:
  """A copy of `config` whose model is the one of their config.json.

  Raises:
    UsageError: a setting that our modules do not have; the sentence names it.
  """
  config = config.copy_and_resolve_references()
  hf.expect(theirs, "model_type", "paligemma", "paligemma")
  text, vision = dict(theirs.get("text_config", {})), theirs.get("vision_config", {})
  # Theirs says so of the prefix, which is the strategy's to say.
  text.pop("use_bidirectional_attention", None)
  for node, known, default in ((text, TEXTS, "gemma"), (vision, (VISION,), VISION)):
    if (kind := node.get("model_type", default)) not in known:
      raise UsageError(f"config.json: model_type is '{kind}', which no PaliGemma has; "
                       f"use {' or '.join(known)}")
  config.fusion.name, config.data.template = "prefix_lm", "newline"
  config.llm.update(nodes.read(text, "llm", "gemma"))
  config.llm.tie_embeddings = theirs.get("tie_word_embeddings", True)
  config.tower.update(nodes.read(vision, "towers", VISION))
  if vision.get("vision_use_head"):
    raise UsageError("config.json: vision_config.vision_use_head is true; the pooling head is not "
                     "read by a PaliGemma, export the checkpoint without it")
  width = theirs.get("projection_dim", 2048)
  if width != config.llm.width:
    raise UsageError(f"config.json: projection_dim is {width} but the language model's width is "
                     f"{config.llm.width}")
  config.connector.update(name="linear", bias=True)
  return config


def write_config(config: ConfigDict, image_token: int) -> dict:
  """Their config.json of `config`'s model.

  Raises:
    UsageError: the config is not a PaliGemma; the sentence names the field.
  """
  for field, needed in NEEDED:
    node, name = field.split(".")
    if config[node][name] != needed:
      raise UsageError(f"config.{field} is {config[node][name]!r}; a PaliGemma checkpoint can only "
                       f"say {needed!r}")
  text, vision = nodes.write(config.llm, "llm"), nodes.write(config.tower, "towers")
  for field, node, known in (("llm", text, TEXTS), ("tower", vision, (VISION,))):
    if node["model_type"] not in known:
      raise UsageError(f"config.{field} is a '{node['model_type']}'; that of a PaliGemma is "
                       f"{' or '.join(known)}")
  if vision["image_size"] != config.tower.image_size:
    raise UsageError(f"config.tower.position_size is {config.tower.position_size}; in a PaliGemma "
                     f"checkpoint it is image_size, {config.tower.image_size}")
  width = config.llm.width
  return {
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "model_type": "paligemma",
    "image_token_index": image_token,
    "vocab_size": config.llm.vocab_size,
    "projection_dim": width,
    "hidden_size": width,
    "tie_word_embeddings": config.llm.tie_embeddings,
    "text_config": text | {"max_position_embeddings": config.data.tokens,
                           "num_image_tokens": _slots(config)},
    "vision_config": vision | {"projection_dim": width, "vision_use_head": False},
  }


def _slots(config: ConfigDict) -> int:
  """How many slots an image has."""
  return len(fusion.find_fusion(config).rows(config))
