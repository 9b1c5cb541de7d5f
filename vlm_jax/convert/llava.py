"""LLaVA checkpoints of Hugging Face: config.json and safetensors, both directions.

A LLaVA is the strategy `concat` with causal image tokens, tower `vit`, connector `mlp` and language
model `llama` (arXiv:2304.08485; the two-layer projector arXiv:2310.03744). Their towers are CLIP
(class token, pre-norm) or SigLIP (neither); the connector reads hidden state
`vision_feature_layer` of layers + 1, before any last norm.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.core import meta
from ml_collections import ConfigDict

from vlm_jax.convert import safetensors_io, table
from vlm_jax.core import batch as batches
from vlm_jax.core import fusion
from vlm_jax.core.errors import DataError, DiskError, UsageError
from vlm_jax.core.tree import flatten
from vlm_jax.core.typing import Params

# One system, three spellings: files written by transformers 4, the names in memory of transformers
# 5, and files written by transformers 5. The first is written; all are read. The prefixes:
TOWER, CONNECTOR = "vision_tower.vision_model.", "multi_modal_projector."
LLM, HEAD = "language_model.", "language_model.lm_head.weight"
SPELLINGS = (
  (r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)", ""),
  (r"^vision_tower\.(?!vision_model\.)", TOWER),
  (r"^lm_head\.", LLM + "lm_head."),
  (r"^language_model\.(?!model\.|lm_head\.)", LLM + "model."),
)
# Their towers carry a last norm that a LLaVA never reads; weight 1 and bias 0 are written.
UNREAD = (TOWER + "post_layernorm.weight", TOWER + "post_layernorm.bias")
BUFFERS = ("position_ids", "rotary_emb.inv_freq")  # constants that old files store

# Ours to theirs; the first of theirs is written, all are read.
ACTIVATIONS = {
  "gelu": ("gelu",),
  "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new"),
  "quick_gelu": ("quick_gelu",),
  "relu": ("relu",),
  "silu": ("silu", "swish"),
}


class Field(NamedTuple):
  """A field that only changes its name; `default` is what theirs means when it is absent."""

  ours: str
  theirs: str
  default: Any


TEXT = (
  Field("vocab_size", "vocab_size", 32000),
  Field("width", "hidden_size", 4096),
  Field("mlp", "intermediate_size", 11008),
  Field("depth", "num_hidden_layers", 32),
  Field("heads", "num_attention_heads", 32),
  Field("norm_eps", "rms_norm_eps", 1e-6),
)
VISION = (
  Field("width", "hidden_size", 768),
  Field("mlp", "intermediate_size", 3072),
  Field("depth", "num_hidden_layers", 12),
  Field("heads", "num_attention_heads", 12),
  Field("image_size", "image_size", 224),
)


class Family(NamedTuple):
  """A kind of vision tower: how its config.json names it, its defaults, its parts, its pixels."""

  patch: int
  eps: float
  activation: str
  class_token: bool
  pre_norm: bool
  patch_bias: bool
  strategy: str  # the select strategy that drops the class token, or has none to drop
  processor: str
  mean: tuple[float, float, float]
  std: tuple[float, float, float]


FAMILIES = {
  "clip_vision_model": Family(
    32, 1e-5, "quick_gelu", True, True, False, "default", "CLIPImageProcessor",
    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
  "siglip_vision_model": Family(
    16, 1e-6, "gelu_pytorch_tanh", False, False, True, "full", "SiglipImageProcessor",
    (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def read(directory: str | os.PathLike, config: ConfigDict) -> tuple[ConfigDict, Params]:
  """Reads a LLaVA checkpoint.

  Args:
    directory: holds config.json and safetensors weights, in any of the three spellings.
    config: any recipe; everything that does not describe the model stays as it is.

  Returns:
    The config of the checkpoint's model, and its parameters as numpy arrays in the file's dtypes.

  Raises:
    DataError: a file is missing or damaged, keys are missing or unexpected, shapes are wrong.
    UsageError: config.json asks for something that the modules named above do not have.
  """
  theirs = safetensors_io.read_json(Path(directory) / "config.json")
  config = read_config(theirs, config)
  with safetensors_io.Reader(directory) as reader:
    return config, load(reader, config)


def load(source: table.Source, config: ConfigDict) -> Params:
  """The parameters of `config`'s model from their tensors by key, see `table.load`."""
  rename = table.renamer(SPELLINGS)
  tied = config.llm.tie_embeddings
  unread = lambda key: key.endswith(BUFFERS) or key in UNREAD or (tied and key == HEAD)
  params = table.load(source, entries(config), rename, unread)
  for key in source.shapes:
    if tied and rename(key) == HEAD and not np.array_equal(
        source[key], params["llm"]["embed"]["embedding"]):
      raise DataError(f"weights: {key} differs from the embedding although config.json ties them; "
                      "set tie_word_embeddings to false in config.json")
  return params


def write(
  directory: str | os.PathLike,
  config: ConfigDict,
  params: Params,
  image_token: int,
  shard_bytes: int = safetensors_io.SHARD_BYTES,
) -> None:
  """Writes a checkpoint that transformers 4 and 5 load: config, image processor, weights.

  Args:
    directory: made if missing; must not hold a checkpoint.
    config: the config of the model.
    params: its parameters, without metadata boxes; dtypes are kept.
    image_token: the token id that stands for one image slot in their input_ids.
    shard_bytes: largest weight file.

  Raises:
    UsageError: the directory holds a checkpoint, or the config is not a LLaVA.
    DiskError: it cannot be written.
  """
  directory = Path(directory)
  dtype = np.dtype(params["llm"]["embed"]["embedding"].dtype)
  theirs = {**write_config(config, image_token), "dtype": dtype.name}
  tensors = table.export(params, entries(config))
  for name, value in zip(UNREAD, (1, 0), strict=True):
    filler = np.full(config.tower.width, value, dtype)
    tensors[name] = safetensors_io.Tensor(filler.nbytes, lambda filler=filler: filler)
  if directory.exists() and any(directory.glob("*.safetensors*")):
    raise UsageError(f"{directory}: already holds a checkpoint; choose an empty directory")
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise DiskError(f"{directory}: cannot be made ({error}); choose another directory") from error
  safetensors_io.write(directory, tensors, shard_bytes)
  safetensors_io.write_json(directory / "preprocessor_config.json", _processor(config))
  safetensors_io.write_json(directory / "config.json", theirs)


def entries(config: ConfigDict) -> list[table.Entry]:
  """Every tensor of the checkpoint of `config`'s model (the parts name their own KEYS)."""
  parts = (
    ("tower/", TOWER, fusion.find_tower(config).KEYS),
    ("connector/", CONNECTOR, fusion.find_connector(config).KEYS),
    ("llm/", LLM, fusion.find_llm(config).KEYS),
  )
  return table.entries(parts, shapes(config))


def shapes(config: ConfigDict) -> dict[str, tuple[int, ...]]:
  """Path to shape of every parameter of `config`'s model; makes none."""
  module = fusion.find_fusion(config)
  row = batches.from_flat(batches.empty(module.fields(config), module.axes(config), rows=1))
  init = lambda: meta.unbox(module.Model(config).init(jax.random.key(0), row))["params"]
  return {path: leaf.shape for path, leaf in flatten(jax.eval_shape(init)).items()}


def read_config(theirs: dict, config: ConfigDict) -> ConfigDict:
  """A copy of `config` whose model is the one of their config.json.

  Raises:
    UsageError: a setting that our modules do not have; the sentence names it.
  """
  config = config.copy_and_resolve_references()
  _expect(theirs, "config.json", "model_type", "llava", "llava")
  text, vision = theirs.get("text_config", {}), theirs.get("vision_config", {})
  config.fusion.name, config.fusion.image_attention = "concat", "causal"
  config.tower.name, config.connector.name, config.llm.name = "vit", "mlp", "llama"
  _read_text(text, config.llm)
  config.llm.tie_embeddings = bool(
    theirs.get("tie_word_embeddings") or text.get("tie_word_embeddings", False))
  _read_vision(vision, config.tower)
  _read_features(theirs, vision, config.tower)
  config.connector.hidden = config.llm.width
  config.connector.activation = _activation(theirs.get("projector_hidden_act", "gelu"),
                                            "projector_hidden_act")
  config.connector.bias = theirs.get("multimodal_projector_bias", True)
  return config


def _read_text(text: dict, llm: ConfigDict) -> None:
  where = "config.json: text_config"
  _expect(text, where, "model_type", "llama", "llama")
  _expect(text, where, "attention_bias", False, False)
  _expect(text, where, "mlp_bias", False, False)
  for field in TEXT:
    llm[field.ours] = text.get(field.theirs, field.default)
  llm.kv_heads = text.get("num_key_value_heads") or llm.heads
  llm.head_dim = text.get("head_dim") or llm.width // llm.heads
  llm.activation = _activation(text.get("hidden_act", "silu"), "text_config.hidden_act")
  # transformers 4 writes rope_theta and rope_scaling, 5 rope_parameters.
  rope = text.get("rope_parameters") or {"rope_theta": text.get("rope_theta", 10000.0),
                                         **(text.get("rope_scaling") or {})}
  _expect(rope, f"{where}.rope_parameters", "rope_type", rope.get("type", "default"), "default")
  llm.rope_theta = float(rope["rope_theta"])


def _read_vision(vision: dict, tower: ConfigDict) -> None:
  where = "config.json: vision_config"
  kind = vision.get("model_type", "clip_vision_model")
  if kind not in FAMILIES:
    raise UsageError(f"{where}.model_type is '{kind}'; known: {', '.join(FAMILIES)}")
  family = FAMILIES[kind]
  if vision.get("vision_use_head") and kind == "siglip_vision_model":
    raise UsageError(f"{where}.vision_use_head is true; the pooling head is not read by a LLaVA, "
                     "export the checkpoint without it")
  for field in VISION:
    tower[field.ours] = vision.get(field.theirs, field.default)
  tower.patch = vision.get("patch_size", family.patch)
  tower.norm_eps = vision.get("layer_norm_eps", family.eps)
  tower.activation = _activation(vision.get("hidden_act", family.activation),
                                 "vision_config.hidden_act")
  tower.class_token, tower.pre_norm = family.class_token, family.pre_norm
  tower.patch_bias, tower.post_norm, tower.pool = family.patch_bias, False, "none"
  tower.mean, tower.std = family.mean, family.std


def _read_features(theirs: dict, vision: dict, tower: ConfigDict) -> None:
  """Which hidden state is read and whether the class token is dropped."""
  family = FAMILIES[vision.get("model_type", "clip_vision_model")]
  layer = theirs.get("vision_feature_layer", -2)
  if not isinstance(layer, int):
    raise UsageError(f"config.json: vision_feature_layer is {layer}; one layer can be read, "
                     "not several")
  states = tower.depth + 1
  if not -states <= layer < states:
    raise UsageError(f"config.json: vision_feature_layer is {layer} but there are {states} states")
  tower.feature_layer = layer if layer < 0 else layer - states
  _expect(theirs, "config.json", "vision_feature_select_strategy", "default", family.strategy)


def write_config(config: ConfigDict, image_token: int) -> dict:
  """Their config.json of `config`'s model.

  Raises:
    UsageError: the config is not a LLaVA; the sentence names the field.
  """
  for field, needed in (("fusion.name", "concat"), ("fusion.image_attention", "causal"),
                        ("tower.name", "vit"), ("connector.name", "mlp"), ("llm.name", "llama"),
                        ("tower.post_norm", False), ("tower.pool", "none")):
    node, name = field.split(".")
    if config[node][name] != needed:
      raise UsageError(f"config.{field} is {config[node][name]!r}; a LLaVA checkpoint can only say "
                       f"{needed!r}")
  if config.connector.hidden not in (0, config.llm.width):
    raise UsageError(f"config.connector.hidden is {config.connector.hidden}; in a LLaVA checkpoint "
                     f"it is the language model's width, {config.llm.width}")
  kind, family = _family(config)
  tower, llm = config.tower, config.llm
  return {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": image_token,
    "image_seq_length": (tower.image_size // tower.patch) ** 2,
    "vision_feature_layer": tower.feature_layer,
    "vision_feature_select_strategy": family.strategy,
    "projector_hidden_act": ACTIVATIONS[config.connector.activation][0],
    "multimodal_projector_bias": config.connector.bias,
    "tie_word_embeddings": llm.tie_embeddings,
    "text_config": {
      "model_type": "llama",
      **{field.theirs: llm[field.ours] for field in TEXT},
      "num_key_value_heads": llm.kv_heads,
      "head_dim": llm.head_dim or llm.width // llm.heads,
      "hidden_act": ACTIVATIONS[llm.activation][0],
      "rope_theta": llm.rope_theta,  # read by transformers 4
      "rope_parameters": {"rope_type": "default", "rope_theta": llm.rope_theta},
      "max_position_embeddings": config.data.tokens,
      "tie_word_embeddings": llm.tie_embeddings,
    },
    "vision_config": {
      "model_type": kind,
      **{field.theirs: tower[field.ours] for field in VISION},
      "patch_size": tower.patch,
      "num_channels": 3,
      "layer_norm_eps": tower.norm_eps,
      "hidden_act": ACTIVATIONS[tower.activation][0],
      **({"vision_use_head": False} if kind == "siglip_vision_model" else {}),
    },
  }


def _family(config: ConfigDict) -> tuple[str, Family]:
  tower = config.tower
  parts = (tower.class_token, tower.pre_norm, tower.patch_bias)
  for kind, family in FAMILIES.items():
    if parts == (family.class_token, family.pre_norm, family.patch_bias):
      return kind, family
  raise UsageError(f"config.tower: class_token, pre_norm, patch_bias are {parts}, neither CLIP's "
                   "(True, True, False) nor SigLIP's (False, False, True)")


def _processor(config: ConfigDict) -> dict:
  """Their preprocessor_config.json: the same resize and pixel scaling."""
  kind, family = _family(config)
  side = config.tower.image_size
  return {
    "processor_class": "LlavaProcessor", "image_processor_type": family.processor,
    "do_resize": True, "size": {"height": side, "width": side}, "resample": 3,
    "do_center_crop": False, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(config.tower.mean), "image_std": list(config.tower.std),
  }


def _expect(theirs: dict, where: str, name: str, default: Any, needed: Any) -> None:
  value = theirs.get(name, default)
  if value != needed:
    raise UsageError(f"{where}.{name} is {value!r}; only {needed!r} can be imported")


def _activation(name: str, field: str) -> str:
  for ours, theirs in ACTIVATIONS.items():
    if name in theirs:
      return ours
  raise UsageError(f"config.json: {field} is '{name}'; known: "
                   f"{', '.join(name for names in ACTIVATIONS.values() for name in names)}")
