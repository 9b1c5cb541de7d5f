"""LLaVA and LLaVA-NeXT checkpoints of Hugging Face: config.json and safetensors, both directions.

A LLaVA is the strategy `concat` with causal image tokens, tower `vit`, connector `mlp` and any
published language model (arXiv:2304.08485; the two-layer projector arXiv:2310.03744). A LLaVA-NeXT
is the strategy `llava_next`, with grids of tiles and a newline besides. Their towers are CLIP
(class token, pre-norm) or SigLIP (neither); the connector reads hidden state
`vision_feature_layer` of layers + 1, before any last norm.
"""

from ml_collections import ConfigDict

from vlm_jax.convert import nodes, processor, table
from vlm_jax.core import fusion, hf
from vlm_jax.core.errors import UsageError, nearest

# One system, three spellings: files written by transformers 4, the names in memory of transformers
# 5, and files written by transformers 5. The first is written; all are read. The prefixes:
TOWER, CONNECTOR = "vision_tower.vision_model.", "multi_modal_projector."
LLM, HEAD = "language_model.", "language_model.lm_head.weight"
SPELLINGS = (
  (r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.|image_newline$)", ""),
  (r"^vision_tower\.(?!vision_model\.)", TOWER),
  (r"^lm_head\.", LLM + "lm_head."),
  (r"^language_model\.(?!model\.|lm_head\.)", LLM + "model."),
)
# Their towers carry a last norm that a LLaVA never reads; these are written.
UNREAD = {TOWER + "post_layernorm.weight": 1, TOWER + "post_layernorm.bias": 0}
# Their model_type to our strategy.
STRATEGIES = {"llava": "concat", "llava_next": "llava_next"}
MODEL_TYPES, FUSIONS = tuple(STRATEGIES), tuple(STRATEGIES.values())
ARCHITECTURES = {"concat": "LlavaForConditionalGeneration",
                 "llava_next": "LlavaNextForConditionalGeneration"}
NEWLINE = (("newline", "image_newline", "copy"),)
TOWER_TYPES = ("clip_vision_model", "siglip_vision_model")


def pixels(config: ConfigDict, theirs: dict) -> dict:
  """Their preprocessor_config.json."""
  del theirs
  of = "LlavaNextProcessor" if config.data.decode.grids else "LlavaProcessor"
  return {"processor_class": of, **processor.write(config)}


def parts(config: ConfigDict) -> tuple[table.Part, ...]:
  """Where each module's tensors are; the modules name their own KEYS."""
  return (
    ("tower/", TOWER, fusion.find_tower(config).KEYS),
    ("connector/", CONNECTOR, fusion.find_connector(config).KEYS),
    ("llm/", LLM, fusion.find_llm(config).KEYS),
    ("", "", NEWLINE),
  )


def read_config(theirs: dict, config: ConfigDict) -> ConfigDict:
  """A copy of `config` whose model is the one of their config.json.

  Raises:
    UsageError: a setting that our modules do not have; the sentence names it.
  """
  config = config.copy_and_resolve_references()
  kind = theirs.get("model_type", "llava")
  if kind not in STRATEGIES:
    raise UsageError(f"config.json: model_type is '{kind}'; {nearest(kind, STRATEGIES)}")
  text, vision = theirs.get("text_config", {}), theirs.get("vision_config", {})
  config.fusion.name, config.fusion.image_attention = STRATEGIES[kind], "causal"
  config.llm.update(nodes.read(text, "llm", "llama"))
  config.llm.tie_embeddings |= bool(theirs.get("tie_word_embeddings"))
  _check_tower(vision.get("model_type", "clip_vision_model"))
  config.tower.update(nodes.read(vision, "towers", "clip_vision_model"))
  config.llm.final_soft_cap = 0.0  # their LLaVA never reads it
  config.tower.post_norm, config.tower.pool = False, "none"
  if vision.get("vision_use_head"):
    raise UsageError("config.json: vision_config.vision_use_head is true; the pooling head is not "
                     "read by a LLaVA, export the checkpoint without it")
  _read_features(theirs, config.tower)
  pinpoints = theirs.get("image_grid_pinpoints") or processor.PINPOINTS
  config.data.decode.grids = ()
  if kind == "llava_next":
    config.data.decode.update(fit="stretch", border=processor.BLACK, grids=processor.grids(
      pinpoints, config.tower.image_size))
  config.connector.name, config.connector.hidden = "mlp", config.llm.width
  config.connector.activation = hf.activation(theirs, "projector_hidden_act", "gelu")
  config.connector.bias = theirs.get("multimodal_projector_bias", True)
  return config


def _check_tower(kind: str) -> None:
  if kind not in TOWER_TYPES:
    raise UsageError(f"the vision tower's model_type is '{kind}'; the towers of LLaVA checkpoints "
                     f"are {', '.join(TOWER_TYPES)}")


def _read_features(theirs: dict, tower: ConfigDict) -> None:
  """Which hidden state is read and whether the class token is dropped."""
  layer = theirs.get("vision_feature_layer", -2)
  if not isinstance(layer, int):
    raise UsageError(f"config.json: vision_feature_layer is {layer}; one layer can be read, "
                     "not several")
  states = tower.depth + 1
  if not -states <= layer < states:
    raise UsageError(f"config.json: vision_feature_layer is {layer} but there are {states} states")
  tower.feature_layer = layer if layer < 0 else layer - states
  hf.expect(theirs, "vision_feature_select_strategy", "default", _strategy(tower))


def _strategy(tower: ConfigDict) -> str:
  """The select strategy that drops the class token, or has none to drop."""
  return "default" if tower.class_token else "full"


def write_config(config: ConfigDict, image_token: int) -> dict:
  """Their config.json of `config`'s model.

  Raises:
    UsageError: the config is not a LLaVA; the sentence names the field.
  """
  strategy = config.fusion.name
  if strategy not in ARCHITECTURES:
    raise UsageError(f"config.fusion.name is '{strategy}'; that of a LLaVA checkpoint is "
                     f"{' or '.join(ARCHITECTURES)}")
  tower = config.tower
  vision = nodes.write(tower, "towers")
  _check_tower(vision["model_type"])
  for field, needed in (("fusion.image_attention", "causal"), ("connector.name", "mlp"),
                        ("tower.post_norm", False), ("tower.pool", "none"),
                        ("lora.rank", 0), ("llm.final_soft_cap", 0.0)):
    node, name = field.split(".")
    if config[node][name] != needed:
      raise UsageError(f"config.{field} is {config[node][name]!r}; a LLaVA checkpoint can only say "
                       f"{needed!r}")
  if config.connector.hidden not in (0, config.llm.width):
    raise UsageError(f"config.connector.hidden is {config.connector.hidden}; in a LLaVA checkpoint "
                     f"it is the language model's width, {config.llm.width}")
  if vision["image_size"] != tower.image_size:
    raise UsageError(f"config.tower.position_size is {tower.position_size}; in a LLaVA checkpoint "
                     f"it is image_size, {tower.image_size}, for positions are not resized there")
  return {
    "architectures": [ARCHITECTURES[strategy]],
    "model_type": next(kind for kind, name in STRATEGIES.items() if name == strategy),
    "image_token_index": image_token,
    "image_seq_length": (tower.image_size // tower.patch) ** 2,
    "vision_feature_layer": tower.feature_layer,
    "vision_feature_select_strategy": _strategy(tower),
    "projector_hidden_act": hf.ACTIVATIONS[config.connector.activation][0],
    "multimodal_projector_bias": config.connector.bias,
    "tie_word_embeddings": config.llm.tie_embeddings,
    "text_config": nodes.write(config.llm, "llm") | {
      "max_position_embeddings": config.data.tokens},
    "vision_config": vision,
    **({"image_grid_pinpoints": processor.pinpoints(config)} if strategy == "llava_next" else {}),
  }
