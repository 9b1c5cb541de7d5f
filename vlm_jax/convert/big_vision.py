"""Key tables of .npz checkpoints: big_vision's SigLIP and PaliGemma, vision_transformer's ViT.

Their kernels are [in, out] with heads apart, as ours, so nearly everything is a copy. The names are
those that the converters of transformers read (convert_siglip_to_hf.py,
convert_paligemma_weights_to_hf.py): "img" is a ViT, in a PaliGemma with the projection as its head;
"txt" SigLIP's text tower, in a SigLIP with the projection as its head; "t" and "b" the logarithm of
the logits' scale, and their bias; "llm" Gemma 1 or 2.
"""

import re

from vlm_jax.convert.table import Keys

LAYER, POOL = "Transformer/encoderblock_{layer}", "MAPHead_0"


def _attention(ours: str, theirs: str) -> Keys:
  return tuple((f"{ours}/{name}/{leaf}", f"{theirs}/MultiHeadDotProductAttention_0/{name}/{leaf}",
                "copy") for name in ("query", "key", "value", "out") for leaf in ("kernel", "bias"))


def _mlp(ours: str, theirs: str) -> Keys:
  return tuple((f"{ours}/{name}/{leaf}", f"{theirs}/MlpBlock_0/{dense}/{leaf}", "copy")
               for name, dense in (("up", "Dense_0"), ("down", "Dense_1"))
               for leaf in ("kernel", "bias"))


def _norm(ours: str, theirs: str) -> Keys:
  return tuple((f"{ours}/{leaf}", f"{theirs}/{leaf}", "copy") for leaf in ("scale", "bias"))


VIT: Keys = (
  ("patch/kernel", "embedding/kernel", "rows"),
  ("patch/bias", "embedding/bias", "copy"),
  ("class_token", "cls", "lead2"),
  ("positions", "pos_embedding", "lead"),
  *_norm("layers/attention_norm", f"{LAYER}/LayerNorm_0"),
  *_attention("layers/attention", LAYER),
  *_norm("layers/mlp_norm", f"{LAYER}/LayerNorm_1"),
  *_mlp("layers/mlp", LAYER),
  *_norm("post_norm", "Transformer/encoder_norm"),
  ("pool/probe", f"{POOL}/probe", "lead"),
  *_attention("pool", POOL),
  *_norm("pool/norm", f"{POOL}/LayerNorm_0"),
  *_mlp("pool/mlp", POOL),
)
TEXT: Keys = (
  ("embed/embedding", "Embed_0/embedding", "copy"),
  ("positions", "pos_embedding", "lead"),
  *((ours, theirs.replace("Transformer/", "Encoder_0/"), op) for ours, theirs, op in VIT
    if ours.startswith("layers/")),
  *_norm("norm", "Encoder_0/encoder_norm"),
)
LINEAR: Keys = (("linear/kernel", "head/kernel", "copy"), ("linear/bias", "head/bias", "copy"))
_LLM, _ATTENTION = "layers_{layer}", "layers_{layer}/attn"
GEMMA: Keys = (
  ("embed/embedding", "embedder/input_embedding", "copy"),
  ("layers/attention_norm/scale", f"{_LLM}/pre_attention_norm/scale", "copy"),
  ("layers/attention/query/kernel", f"{_ATTENTION}/q_einsum/w", "heads"),
  ("layers/attention/key/kernel", f"{_ATTENTION}/kv_einsum/w[0/2]", "heads_lead"),
  ("layers/attention/value/kernel", f"{_ATTENTION}/kv_einsum/w[1/2]", "heads_lead"),
  ("layers/attention/out/kernel", f"{_ATTENTION}/attn_vec_einsum/w", "copy"),
  ("layers/attention_post_norm/scale", f"{_LLM}/post_attention_norm/scale", "copy"),
  ("layers/mlp_norm/scale", f"{_LLM}/pre_ffw_norm/scale", "copy"),  # of Gemma 1, below of Gemma 2
  ("layers/mlp_pre_norm/scale", f"{_LLM}/pre_ffw_norm/scale", "copy"),
  ("layers/mlp_post_norm/scale", f"{_LLM}/post_ffw_norm/scale", "copy"),
  ("layers/mlp/gate/kernel", f"{_LLM}/mlp/gating_einsum[0/2]", "lead"),
  ("layers/mlp/up/kernel", f"{_LLM}/mlp/gating_einsum[1/2]", "lead"),
  ("layers/mlp/down/kernel", f"{_LLM}/mlp/linear", "copy"),
  ("norm/scale", "final_norm/scale", "copy"),
)
SIGLIP: Keys = (
  ("text_projection/kernel", "txt/head/kernel", "copy"),
  ("text_projection/bias", "txt/head/bias", "copy"),
  ("logit_scale", "t", "flat"),
  ("logit_bias", "b", "flat"),
)
# What is no module's, by the strategy's name.
SYSTEMS = {"siglip": SIGLIP}
# By the module's name.
TABLES = {"vit": VIT, "text_tower": TEXT, "linear": LINEAR, "gemma": GEMMA}
# vision_transformer numbers the parts of a block by their order, big_vision each kind apart.
SPELLINGS = (
  (r"^Transformer/posembed_input/", ""),
  (r"(?<=/)LayerNorm_2/", "LayerNorm_1/"),
  (r"(?<=/)MultiHeadDotProductAttention_1/", "MultiHeadDotProductAttention_0/"),
  (r"(?<=/)MlpBlock_3/", "MlpBlock_0/"),
)
# Layers of a classifier, or of what follows the tower, which is no part of it.
UNREAD = re.compile(r"(head|pre_logits)/(kernel|bias)")
