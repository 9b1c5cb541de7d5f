"""Key tables of .npz checkpoints: the ViT of big_vision (SigLIP, PaliGemma) and vision_transformer.

Their kernels are [in, out] with heads apart, as ours, so nearly everything is a copy.
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
TABLES = {"vit": VIT}  # by the module's name
# vision_transformer numbers the parts of a block by their order, big_vision each kind apart.
SPELLINGS = (
  (r"^Transformer/posembed_input/", ""),
  (r"(?<=/)LayerNorm_2/", "LayerNorm_1/"),
  (r"(?<=/)MultiHeadDotProductAttention_1/", "MultiHeadDotProductAttention_0/"),
  (r"(?<=/)MlpBlock_3/", "MlpBlock_0/"),
)
# Layers of a classifier, or of what follows the tower; a VLM reads the patches.
UNREAD = re.compile(r"(head|pre_logits)/(kernel|bias)")
