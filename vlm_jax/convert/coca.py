"""CoCa of OpenCLIP: open_clip_config.json and its weights, both directions.

Read are open_clip_model.safetensors and open_clip_pytorch_model.bin, written is the first, as
`open_clip.create_model("local-dir:...")` loads it. In what was released one pooler of 256 queries
is shared, and the mask of the class token is moved by a slot (`fusion/coca.py`). Ours needs as many
heads in both halves of the text, and one width for pictures' rows, text and the space they share.
"""

from typing import Any

from ml_collections import ConfigDict

from vlm_jax.convert import open_clip, table
from vlm_jax.convert.open_clip import both
from vlm_jax.core.errors import UsageError

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
MODEL_TYPES, FUSIONS = ("open_clip",), ("coca",)
SPELLINGS, HEAD, UNREAD = ((r"^module\.", ""),), None, {}
VISION, TEXT, DECODER = "visual.", "text.", "text_decoder."
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
EPS = 1e-5
POOLINGS = {"cascade": "cascade", "parallel": "parallel", "shared": True}
RESIZES = {"shortest": "center_crop", "squash": "stretch"}
# What must be as here, by node; else ours has no such part.
NEEDED = {
  "vision_cfg": {"timm_model_name": None, "ls_init_value": None, "no_ln_pre": False,
                 "pool_type": "tok", "pos_embed_type": "learnable", "block_type": None,
                 "output_tokens": True, "norm_kwargs": None, "act_kwargs": None},
  "text_cfg": {"hf_model_name": None, "ls_init_value": None, "embed_cls": True, "pad_id": 0,
               "no_causal_mask": False, "proj_type": "linear", "proj_bias": False,
               "output_tokens": True, "block_type": None, "mlp_ratio": 4.0, "norm_kwargs": None,
               "act_kwargs": None},
  "multimodal_cfg": {"ls_init_value": None},
}
ABSENT = {"pool_type": "tok", "pos_embed_type": "learnable", "pad_id": 0, "mlp_ratio": 4.0,
          "proj_type": "linear"}  # what a setting means that is not there; others None or False


def _blocks(ours: str, theirs: str) -> table.Keys:
  """The layers of any of their transformers."""
  return tuple((ours + path.removeprefix("layers"), theirs + key.removeprefix("transformer."), op)
               for path, key, op in open_clip.BLOCKS)


def _attention(ours: str, theirs: str, fused: bool = True) -> table.Keys:
  """Attention of PyTorch; its kernels are one tensor unless keys have another width."""
  kernel = lambda name, part: (f"{theirs}.in_proj_weight[{part}/3]" if fused
                               else f"{theirs}.{name[0]}_proj_weight")
  rows = []
  for part, name in enumerate(("query", "key", "value")):
    rows += [(f"{ours}/{name}/kernel", kernel(name, part), "in"),
             (f"{ours}/{name}/bias", f"{theirs}.in_proj_bias[{part}/3]", "flat")]
  return (*rows, *both(f"{ours}/out", f"{theirs}.out_proj", "out"))


def _pooler(ours: str, theirs: str, fused: bool) -> table.Keys:
  return ((f"{ours}/queries", f"{theirs}.query", "copy"),
          *both(f"{ours}/query_norm", f"{theirs}.ln_q"),
          *both(f"{ours}/key_norm", f"{theirs}.ln_k"),
          *_attention(f"{ours}/attention", f"{theirs}.attn", fused))


TOWER = tuple(row for row in open_clip.TABLES["vit"] if not row[0].startswith("post_norm"))
FIRST = (
  ("embed/embedding", "token_embedding.weight", "copy"),
  ("positions", "positional_embedding", "copy"),
  ("class_token", "cls_emb", "copy"),
  *_blocks("first", "transformer."),
  *both("class_norm", "ln_final"),
)
CROSS = "cross_attn.{layer}"
SECOND = (
  *_blocks("second", ""),
  *both("second/cross_norm", f"{CROSS}.ln_1"),
  *both("second/memory_norm", f"{CROSS}.ln_1_kv"),
  *_attention("second/cross", f"{CROSS}.attn"),
  *both("second/cross_mlp_norm", f"{CROSS}.ln_2"),
  *both("second/cross_mlp/up", f"{CROSS}.mlp.c_fc", "in"),
  *both("second/cross_mlp/down", f"{CROSS}.mlp.c_proj", "in"),
  *both("norm", "ln_final"),
  ("head/kernel", "text_projection", "copy"),
)


def parts(config: ConfigDict) -> tuple[table.Part, ...]:
  """Where each module's tensors are."""
  fused = config.tower.width == config.llm.width
  shared = config.fusion.pooling == "shared"
  own = (
    ("image_projection/kernel", f"{VISION}proj", "copy"),
    ("text_projection/kernel", f"{TEXT}text_projection", "copy"),
    ("logit_scale", "logit_scale", "copy"),
    *both("pooled_norm" if shared else "tower/post_norm", f"{VISION}ln_post"),
    *_pooler("connector/pool", f"{VISION}attn_pool", fused),
    *_pooler("contrast_pool", f"{VISION}attn_pool_contrastive", fused),
  )
  return (("tower/", VISION, TOWER), ("llm/", TEXT, FIRST), ("llm/", DECODER, SECOND),
          ("", "", own))


def read_config(theirs: dict[str, Any], config: ConfigDict) -> ConfigDict:
  """A copy of `config` whose model and pixels are those of their file.

  Raises:
    UsageError: it is no CoCa, or has parts that ours has not; the sentence names the setting.
  """
  model = theirs.get("model_cfg") or {}
  if "multimodal_cfg" not in model:
    raise UsageError(f"{CONFIG}: model_cfg has no multimodal_cfg; of OpenCLIP's only a CoCa can be "
                     "imported")
  _expect(model)
  vision, text, decoder = (model[node] for node in NEEDED)
  config, act = config.copy_and_resolve_references(), "gelu"
  if model.get("quick_gelu", False):
    act = "quick_gelu"
  pooling = {way: ours for ours, way in POOLINGS.items()}[vision["attentional_pool"]]
  width, heads, size = model["embed_dim"], text.get("heads", 8), vision.get("width", 768)
  config.fusion.update(name="coca", width=width, pooling=pooling, compat="open_clip")
  config.fusion.objectives = ConfigDict({"contrast": 1.0, "lm": 2.0})
  config.tower.update(
    name="vit", image_size=vision.get("image_size", 224), patch=vision.get("patch_size", 16),
    width=size, depth=vision.get("layers", 12), heads=size // vision.get("head_width", 64),
    mlp=int(size * vision.get("mlp_ratio", 4.0)), class_token=True, read_class=True, pre_norm=True,
    post_norm=pooling != "shared", patch_bias=False, pool="none", feature_layer=-1,
    position_size=0, activation=act, norm_eps=EPS)
  config.connector.update(
    name="attention_pool", latents=vision.get("attn_pooler_queries", 256),
    heads=vision.get("attn_pooler_heads", 8), norm_eps=EPS)
  config.llm.update(
    name="two_halves", vocab_size=text.get("vocab_size", 49408), width=width, mlp=4 * width,
    heads=heads, kv_heads=heads, head_dim=0, encoder_depth=text.get("layers", 12),
    depth=decoder.get("layers", 12), positions=text.get("context_length", 77), cross="behind",
    tie_embeddings=False, activation=act, norm_eps=EPS)
  config.data.template = "caption"
  _read_pixels(theirs.get("preprocess_cfg") or {}, config)
  return config


def _expect(model: dict[str, Any]) -> None:
  """Raises UsageError for what ours has no part for."""
  for node, settings in NEEDED.items():
    for name, needed in settings.items():
      found = model[node].get(name, ABSENT.get(name, needed if needed is None else False))
      if found != needed:
        raise UsageError(f"{CONFIG}: {node}.{name} is {found!r}; only {needed!r} can be imported")
  vision, text, decoder = (model[node] for node in NEEDED)
  if (pool := vision.get("attentional_pool", False)) not in POOLINGS.values():
    raise UsageError(f"{CONFIG}: vision_cfg.attentional_pool is {pool!r}; only True, 'cascade' and "
                     "'parallel' can be imported")
  for name, given in (("text_cfg.width", text.get("width", 512)),
                      ("multimodal_cfg.width", decoder.get("width", 512))):
    if given != model["embed_dim"]:
      raise UsageError(f"{CONFIG}: {name} is {given} and embed_dim {model['embed_dim']}; only "
                       "equal ones can be imported")
  if text.get("heads", 8) != decoder.get("heads", 8):
    raise UsageError(f"{CONFIG}: text_cfg.heads is {text.get('heads', 8)} and multimodal_cfg.heads "
                     f"{decoder.get('heads', 8)}; only equal ones can be imported")


def _read_pixels(theirs: dict[str, Any], config: ConfigDict) -> None:
  way = theirs.get("resize_mode", "shortest")
  if way not in RESIZES:
    raise UsageError(f"{CONFIG}: preprocess_cfg.resize_mode is '{way}'; only "
                     f"{' and '.join(RESIZES)} can be imported")
  config.tower.update(mean=tuple(theirs.get("mean", MEAN)), std=tuple(theirs.get("std", STD)))
  config.data.decode.update(fit=RESIZES[way], kernel=theirs.get("interpolation", "bicubic"),
                            shorter=0, grids=())


def write_config(config: ConfigDict, image_token: int) -> dict[str, Any]:
  """Their file of `config`'s model; its texts hold no picture, so `image_token` is nothing.

  Raises:
    UsageError: OpenCLIP has no such model; the sentence names the field.
  """
  del image_token
  tower, llm, pooling = config.tower, config.llm, config.fusion.pooling
  needed = {
    "fusion.width": llm.width, "fusion.compat": "open_clip", "tower.name": "vit",
    "tower.class_token": True, "tower.read_class": True, "tower.pre_norm": True,
    "tower.patch_bias": False, "tower.post_norm": pooling != "shared", "tower.feature_layer": -1,
    "tower.norm_eps": EPS, "tower.activation": llm.activation, "tower.position_size": 0,
    "connector.name": "attention_pool", "connector.norm_eps": EPS, "llm.name": "two_halves",
    "llm.cross": "behind", "llm.tie_embeddings": False, "llm.mlp": 4 * llm.width,
    "llm.norm_eps": EPS,
  }
  for field, value in needed.items():
    node, name = field.split(".")
    if config[node][name] != value:
      raise UsageError(f"config.{field} is {config[node][name]!r}; a CoCa of OpenCLIP can only say "
                       f"{value!r}")
  if llm.activation not in ("gelu", "quick_gelu"):
    raise UsageError(f"config.llm.activation is '{llm.activation}'; a CoCa of OpenCLIP can only "
                     "say 'gelu' or 'quick_gelu'")
  text = {"context_length": llm.positions, "vocab_size": llm.vocab_size, "width": llm.width,
          "heads": llm.heads}
  ways = {fit: way for way, fit in RESIZES.items()}
  fit = config.data.decode.fit
  if fit not in ways:
    raise UsageError(f"config.data.decode.fit is '{fit}'; OpenCLIP can only say "
                     f"{' and '.join(ways)}")
  model = {
    "embed_dim": config.fusion.width,
    "vision_cfg": {
      "image_size": tower.image_size, "layers": tower.depth, "width": tower.width,
      "head_width": tower.width // tower.heads, "mlp_ratio": tower.mlp / tower.width,
      "patch_size": tower.patch, "attentional_pool": POOLINGS[pooling],
      "attn_pooler_queries": config.connector.latents,
      "attn_pooler_heads": config.connector.heads, "output_tokens": True},
    "text_cfg": {**text, "layers": llm.encoder_depth or llm.depth, "embed_cls": True,
                 "output_tokens": True},
    "multimodal_cfg": {**text, "layers": llm.depth},
    "custom_text": True,
    **({"quick_gelu": True} if llm.activation == "quick_gelu" else {}),
  }
  return {"model_cfg": model, "preprocess_cfg": {
    "mean": list(tower.mean), "std": list(tower.std), "interpolation": config.data.decode.kernel,
    "resize_mode": ways[fit]}}
