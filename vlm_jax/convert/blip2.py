"""BLIP-2 checkpoints of Hugging Face: config.json and safetensors, both directions.

One model_type, three models (arXiv:2301.12597): the first stage without its captions is
Blip2ForImageTextRetrieval (the strategy `blip2_qformer`), the second Blip2ForConditionalGeneration,
with a decoder (`blip2`) or an encoder-decoder (`blip2_t5`). The tower is EVA's ViT, whose class
token is a feature, too; the connector is the Q-Former. The temperature of the first stage is in no
file of theirs: it is lost by export, and as at first after import.
"""

from typing import Any

from ml_collections import ConfigDict

from vlm_jax.connectors import qformer
from vlm_jax.convert import nodes, processor, table
from vlm_jax.core import fusion, hf
from vlm_jax.core.errors import UsageError

TOWER, LLM, HEAD = "vision_model.", "language_model.", "language_model.lm_head.weight"
MODEL_TYPES, FUSIONS = ("blip-2",), ("blip2", "blip2_t5", "blip2_qformer")
SPELLINGS, UNREAD = (), {}
# Parameters that no file says, and what they are at first; those of captions are not read.
UNSAID = {"temperature": 0.07, "caption/.*": None}
RETRIEVAL, SPEAKS = "Blip2ForImageTextRetrieval", "Blip2ForConditionalGeneration"
STRATEGIES = {"decoder": "blip2", "encoder-decoder": "blip2_t5"}
VISION, QFORMER = "blip_2_vision_model", "blip_2_qformer"
FIELDS = (
  hf.Field("slot_width", "hidden_size", 768),
  hf.Field("hidden", "intermediate_size", 3072),
  hf.Field("depth", "num_hidden_layers", 12),
  hf.Field("heads", "num_attention_heads", 12),
  hf.Field("norm_eps", "layer_norm_eps", 1e-12),
  hf.Field("cross_every", "cross_attention_frequency", 2),
)
WORDS = (hf.Field("vocab_size", "vocab_size", 30522),
         hf.Field("positions", "max_position_embeddings", 512))
LENGTH = 32  # of a text, which no file says
# What a config must be beside the nodes of its parts.
NEEDED = (("connector.name", "qformer"), ("tower.name", "eva"), ("tower.read_class", True),
          ("tower.pool", "none"), ("tower.feature_layer", -1))


def pixels(config: ConfigDict, theirs: dict) -> dict:
  """Their preprocessor_config.json."""
  del theirs
  return processor.write(config)


def parts(config: ConfigDict) -> tuple[table.Part, ...]:
  """Where each module's tensors are; the modules name their own KEYS."""
  found = (("tower/", TOWER, fusion.find_tower(config).KEYS),
           ("connector/", "", qformer.keys(config.connector.cross_every)))
  if config.fusion.name == "blip2_qformer":
    return (*found, ("", "", fusion.find_fusion(config).KEYS))
  return (*found, ("llm/", LLM, fusion.find_llm(config).KEYS))


def read_config(theirs: dict[str, Any], config: ConfigDict) -> ConfigDict:
  """A copy of `config` whose model is the one of their config.json.

  Raises:
    UsageError: a setting that our modules do not have; the sentence names it.
  """
  config = config.copy_and_resolve_references()
  hf.expect(theirs, "model_type", "blip-2", "blip-2")
  read_bridge(theirs, config, VISION)
  if RETRIEVAL in (theirs.get("architectures") or ()):
    words = hf.read(theirs.get("qformer_config") or {}, WORDS)
    config.fusion.name, config.data.template = "blip2_qformer", "caption"
    config.fusion.width = theirs.get("image_text_hidden_size", 256)
    config.fusion.objectives = ConfigDict({"itc": 1.0, "itm": 1.0})
    config.connector.update(words)
    config.llm.update(vocab_size=words["vocab_size"], positions=min(words["positions"], LENGTH))
    return config
  config.llm.update(nodes.read(theirs.get("text_config") or {}, "llm", "opt"))
  config.fusion.name = STRATEGIES[fusion.find_llm(config).KIND]
  config.connector.vocab_size = 0
  return config


def read_bridge(theirs: dict[str, Any], config: ConfigDict, vision: str) -> None:
  """Sets the tower and the connector of a BLIP-2 or InstructBLIP, whose tower is a `vision`."""
  config.tower.update(nodes.read(theirs.get("vision_config") or {}, "towers", vision))
  config.tower.read_class = True
  node = theirs.get("qformer_config") or {}
  config.connector.update(hf.read(node, FIELDS))
  config.connector.update(name="qformer", latents=theirs.get("num_query_tokens", 32),
                          activation=hf.activation(node, "hidden_act", "gelu"))


def write_config(config: ConfigDict, image_token: int) -> dict[str, Any]:
  """Their config.json of `config`'s model.

  Raises:
    UsageError: the config is not a BLIP-2; the sentence names the field.
  """
  retrieves = config.fusion.name == "blip2_qformer"
  theirs = write_bridge(config, VISION, QFORMER)
  theirs["qformer_config"]["use_qformer_text_input"] = retrieves
  if retrieves:
    return {**theirs, "architectures": [RETRIEVAL], "model_type": "blip-2",
            "image_text_hidden_size": config.fusion.width, "image_token_index": None}
  return {**theirs, "architectures": [SPEAKS], "model_type": "blip-2",
          "image_token_index": image_token, "text_config": nodes.write(config.llm, "llm")}


def write_bridge(config: ConfigDict, vision: str, reader: str) -> dict[str, Any]:
  """Their nodes of the tower, a `vision`, and of the connector, a `reader`.

  Raises:
    UsageError: as `write_config`.
  """
  for field, needed in NEEDED:
    node, name = field.split(".")
    if config[node][name] != needed:
      raise UsageError(f"config.{field} is {config[node][name]!r}; a checkpoint of "
                       f"'{config.fusion.name}' can only say {needed!r}")
  connector = config.connector
  words = hf.write(connector, WORDS) if connector.vocab_size else {}
  return {
    "num_query_tokens": connector.latents,
    "vision_config": {**nodes.write(config.tower, "towers"), "model_type": vision},
    "qformer_config": {
      "model_type": reader, **hf.write(connector, FIELDS), **words,
      "intermediate_size": connector.hidden or 4 * connector.slot_width,
      "hidden_act": hf.ACTIVATIONS[connector.activation][0],
      "encoder_hidden_size": config.tower.width},
  }
