"""IDEFICS checkpoints of Hugging Face (the open Flamingo, arXiv:2306.16527): both directions.

The strategy `flamingo`: a CLIP tower read before its last norm with its class token, perhaps the
connector `perceiver`, a Llama, a gated layer before every n-th of its layers, and some tokens
behind the vocabulary that can be said too; the last of them stands where a picture is. Old files
spell the tower's width "embed_dim". Theirs has depth // n gated layers, so n divides the depth.
"""

from typing import Any

from ml_collections import ConfigDict

from vlm_jax.convert import nodes, processor, table
from vlm_jax.core import fusion, hf
from vlm_jax.core.errors import UsageError

MODEL_TYPES, FUSIONS = ("idefics",), ("flamingo",)
SPELLINGS, HEAD = (), "lm_head.weight"
TOWER, CONNECTOR = "model.vision_model.", "model.perceiver_resampler."
BRIDGE = "model.gated_cross_attn_layers.{layer}."
# Their tower carries a last norm that nothing reads; these are written.
UNREAD = {TOWER + "post_layernorm.weight": 1, TOWER + "post_layernorm.bias": 0}
NEW = (
  ("new_embed/embedding", "model.embed_tokens.additional_embedding.weight", "copy"),
  ("new_head/kernel", "lm_head.additional_fc.weight", "in"),
)
LAYER = (
  ("attention_norm/scale", "input_layernorm.weight", "copy"),
  ("attention/query/kernel", "cross_attn.q_proj.weight", "in"),
  ("attention/key/kernel", "cross_attn.k_proj.weight", "in"),
  ("attention/value/kernel", "cross_attn.v_proj.weight", "in"),
  ("attention/out/kernel", "cross_attn.o_proj.weight", "out"),
  ("attention/query_norm/scale", "cross_attn.q_layer_norm.weight", "copy"),
  ("attention/key_norm/scale", "cross_attn.k_layer_norm.weight", "copy"),
  ("mlp_norm/scale", "post_attention_layernorm.weight", "copy"),
  ("mlp/gate/kernel", "mlp.gate_proj.weight", "in"),
  ("mlp/up/kernel", "mlp.up_proj.weight", "in"),
  ("mlp/down/kernel", "mlp.down_proj.weight", "in"),
)
GATES = {"float": ("scalar", "copy"), "vector": ("vector", "lead2")}  # theirs to ours, operation
VISION = (
  hf.Field("width", "embed_dim", 768),
  hf.Field("mlp", "intermediate_size", 5120),
  hf.Field("depth", "num_hidden_layers", 32),
  hf.Field("heads", "num_attention_heads", 16),
  hf.Field("image_size", "image_size", 224),
  hf.Field("patch", "patch_size", 14),
  hf.Field("norm_eps", "layer_norm_eps", 1e-5),
)
RESAMPLER = (
  hf.Field("latents", "resampler_n_latents", 64),
  hf.Field("depth", "resampler_depth", 6),
  hf.Field("heads", "resampler_n_heads", 16),
  hf.Field("head_dim", "resampler_head_dim", 96),
)
COMPARED = ("fusion", "bridge", "tower", "connector", "llm")


def pixels(config: ConfigDict, theirs: dict) -> dict:
  """Their preprocessor_config.json."""
  del theirs
  side, found = config.tower.image_size, processor.write(config)
  if config.data.decode.fit != "stretch":
    raise UsageError(f"config.data.decode.fit is '{config.data.decode.fit}'; an IDEFICS checkpoint "
                     "can only say 'stretch'")
  return found | {"image_processor_type": "IdeficsImageProcessor", "image_size": side,
                  "processor_class": "IdeficsProcessor"}


def parts(config: ConfigDict) -> tuple[table.Part, ...]:
  """Where each module's tensors are; tower, connector and language model name their own KEYS."""
  op = {ours: op for ours, op in GATES.values()}[config.bridge.gate]
  gates = (("attention_gate", "alpha_cross_attn", op), ("mlp_gate", "alpha_dense", op))
  return (
    ("tower/", TOWER, fusion.find_tower(config).KEYS),
    ("connector/", CONNECTOR, fusion.find_connector(config).KEYS),
    ("llm/", "", fusion.find_llm(config).KEYS),
    ("bridge/", BRIDGE, LAYER + gates),
    ("", "", NEW),
  )


def read_config(theirs: dict, config: ConfigDict) -> ConfigDict:
  """A copy of `config` whose model is the one of their config.json.

  Raises:
    UsageError: a setting that our modules do not have; the sentence names it.
  """
  config = config.copy_and_resolve_references()
  hf.expect(theirs, "model_type", "idefics", "idefics")
  hf.expect(theirs, "tie_word_embeddings", False, False)
  config.llm.update(nodes.read({**theirs, "model_type": "llama"}, "llm"))
  vision = theirs.get("vision_config") or {}
  if "embed_dim" not in vision and "hidden_size" in vision:
    vision = {**vision, "embed_dim": vision["hidden_size"]}
  _read_tower(vision, config.tower)
  _read_connector(theirs, config)
  kind, every = theirs.get("alpha_type", "float"), theirs.get("cross_layer_interval", 1)
  if kind not in GATES:
    raise UsageError(f"config.json: alpha_type is '{kind}'; known: {', '.join(GATES)}")
  if config.llm.depth % every:
    raise UsageError(f"config.json: cross_layer_interval is {every}, which does not divide the "
                     f"{config.llm.depth} layers; theirs cannot run that")
  new = theirs.get("additional_vocab_size", 0)
  if new < 1:
    raise UsageError(f"config.json: additional_vocab_size is {new}; a token for pictures is needed")
  config.fusion.update(name="flamingo", image_attention="last", new_tokens=new, say_new=True)
  config.bridge.update(
    every=every, first=0, heads=0, head_dim=0, mlp=config.llm.mlp, norm="rms",
    norm_eps=config.llm.norm_eps, feed_forward="gated", activation=config.llm.activation,
    qk_norm="rms" if theirs.get("qk_layer_norms") else "", gate=GATES[kind][0])
  return config


def _read_tower(theirs: dict, tower: ConfigDict) -> None:
  """CLIP's, as far as its last block, with the class token."""
  fields = hf.read(theirs, VISION)
  clip = {"model_type": "clip_vision_model", "hidden_size": fields["width"],
          **{field.theirs: fields[field.ours] for field in VISION if field.ours != "width"}}
  tower.update(nodes.read({**clip, "hidden_act": theirs.get("hidden_act", "gelu")}, "towers"))
  tower.update(post_norm=False, pool="none", read_class=True)


def _read_connector(theirs: dict, config: ConfigDict) -> None:
  """The resampler, or none."""
  config.connector.width = config.tower.width
  if not theirs.get("use_resampler", False):
    config.connector.name = "identity"
    return
  resampler = theirs.get("perceiver_config") or {}
  config.connector.update(
    hf.read(resampler, RESAMPLER), name="perceiver", hidden=0, kv_heads=0, norm="layer",
    norm_eps=1e-5, feed_forward="plain", activation="relu",
    qk_norm="layer" if resampler.get("qk_layer_norms_perceiver") else "")


def write_config(config: ConfigDict, image_token: int) -> dict:
  """Their config.json of `config`'s model.

  Raises:
    UsageError: the config is not an IDEFICS; the sentence names the field.
  """
  if image_token != fusion.vocabulary(config) - 1:
    raise UsageError(f"config.data.tokenizer: '<image>' is token {image_token}, but an IDEFICS "
                     f"checkpoint says it by the last one, {fusion.vocabulary(config) - 1}; choose "
                     "a tokenizer with that many tokens, the last of them '<image>'")
  text, tower, connector = nodes.write(config.llm, "llm"), config.tower, config.connector
  if text["model_type"] != "llama":
    raise UsageError(f"config.llm is a '{text['model_type']}'; that of an IDEFICS is a llama")
  for name in ("num_key_value_heads", "head_dim"):  # theirs has no such settings
    text.pop(name)
  resample = connector.name == "perceiver"
  theirs: dict[str, Any] = text | {
    "architectures": ["IdeficsForVisionText2Text"],
    "model_type": MODEL_TYPES[0],
    "max_position_embeddings": config.data.tokens,
    "additional_vocab_size": config.fusion.new_tokens,
    "cross_layer_interval": config.bridge.every,
    "qk_layer_norms": config.bridge.qk_norm == "rms",
    "alpha_type": next((name for name, (ours, _) in GATES.items() if ours == config.bridge.gate),
                       ""),
    "vision_config": {"model_type": "idefics_vision", **hf.write(tower, VISION),
                      "image_size": tower.position_size or tower.image_size,
                      "hidden_act": hf.ACTIVATIONS[tower.activation][0]},
    "use_resampler": resample,
    "perceiver_config": {
      "model_type": "idefics_perciever",  # the typo is theirs
      "use_resampler": resample,
      **(hf.write(connector, RESAMPLER) if resample else {}),
      "qk_layer_norms_perceiver": resample and connector.qk_norm == "layer"},
  }
  _check_written(config, read_config(theirs, config))
  return theirs


def _check_written(config: ConfigDict, back: ConfigDict) -> None:
  """Raises UsageError for a field that theirs cannot say."""
  llm, width = config.llm, config.connector.width
  implied = {  # what 0 means
    "bridge.heads": llm.heads, "bridge.head_dim": llm.width // llm.heads,
    "llm.head_dim": llm.width // llm.heads, "connector.hidden": 4 * width,
    "connector.kv_heads": config.connector.heads, "bridge.mlp": 4 * llm.width}
  read = {"identity": ("name", "width")}.get(config.connector.name)
  for node in COMPARED:
    for name, value in back[node].items():
      field, ours = f"{node}.{name}", config[node][name]
      if (node == "connector" and read and name not in read) or ours == value:
        continue
      if field not in implied or (ours or implied[field]) != (value or implied[field]):
        raise UsageError(f"config.{field} is {ours!r}; an IDEFICS checkpoint can only say "
                         f"{value!r}")
