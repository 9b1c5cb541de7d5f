"""CLIP and SigLIP checkpoints of Hugging Face: config.json and safetensors, both directions.

A CLIP is the strategy `clip`, a SigLIP or a SigLIP 2 the strategy `siglip`; the towers are whatever
module has the model_type of their nodes. The checkpoints of SigLIP 2 for one resolution call
themselves "siglip"; those that call themselves "siglip2" give every image a grid of its own.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vlm_jax.convert import nodes, processor, table
from vlm_jax.core import fusion
from vlm_jax.core.errors import UsageError, nearest

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
SPELLINGS, HEAD, UNREAD = (), None, {}


def parts(config: ConfigDict) -> tuple[table.Part, ...]:
  """Where each module's tensors are; the modules name their own KEYS."""
  return (
    ("tower/", TOWER, fusion.find_tower(config).KEYS),
    ("llm/", TEXT, fusion.find_llm(config).KEYS),
    ("", "", fusion.find_fusion(config).KEYS),
  )


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


def write_config(config: ConfigDict, image_token: int) -> dict[str, Any]:
  """Their config.json of `config`'s model; its texts hold no picture, so `image_token` is nothing.

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


def pixels(config: ConfigDict, theirs: dict[str, Any]) -> dict[str, Any]:
  """Their preprocessor_config.json: the same resize and pixel scaling."""
  if theirs["model_type"] == "siglip2":  # which reads nothing else
    config = config.copy_and_resolve_references()
    config.data.decode.fit = "naflex"
  return processor.write(config)
