"""PaliGemma checkpoints of Hugging Face: config.json and safetensors, both directions.

A PaliGemma (arXiv:2407.07726) and a PaliGemma 2 (2412.03555) are the strategy `prefix_lm`, tower
`vit` (SigLIP, behind its last norm), connector `linear`, and a Gemma or Gemma 2. What the tower
says goes in among tokens that were multiplied with sqrt(D), and is not multiplied itself. Theirs
counts positions from 1, which rotary embeddings do not see. The embedding of the published files
has 257,216 rows, of which a tokenizer uses 257,152.

Called without token_type_ids their model is causal, the prefix too: another one.
"""

from ml_collections import ConfigDict

from vlm_jax.convert import llava, nodes, processor, table
from vlm_jax.convert.llava import CONNECTOR, LLM, TOWER
from vlm_jax.core import fusion, hf
from vlm_jax.core.errors import UsageError

MODEL_TYPES, FUSIONS = ("paligemma",), ("prefix_lm",)
SPELLINGS, HEAD, UNREAD = llava.SPELLINGS, llava.HEAD, {}
TEXTS, VISION = ("gemma", "gemma2"), "siglip_vision_model"
# What a config must be beside the nodes of its parts.
NEEDED = (("fusion.name", "prefix_lm"), ("connector.name", "linear"), ("connector.bias", True),
          ("tower.name", "vit"), ("tower.post_norm", True), ("tower.pool", "none"),
          ("tower.feature_layer", -1))


def pixels(config: ConfigDict, theirs: dict) -> dict:
  """Their preprocessor_config.json."""
  del theirs
  return processor.write(config) | {
    "processor_class": "PaliGemmaProcessor", "image_seq_length": _slots(config)}


def parts(config: ConfigDict) -> tuple[table.Part, ...]:
  """Where each module's tensors are; the modules name their own KEYS."""
  return (
    ("tower/", TOWER, fusion.find_tower(config).KEYS),
    ("connector/", CONNECTOR + "linear.", fusion.find_connector(config).KEYS),
    ("llm/", LLM, fusion.find_llm(config).KEYS),
  )


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
