"""LLaVA's arrangement (arXiv:2304.08485; the projector of arXiv:2310.03744), at quickstart size.

A CLIP-like tower, the features before its last layer, an MLP, causal attention over everything.
Sizes and data are the quickstart's; the published sizes are in the comments. Arguments: those of
configs/quickstart.py.
"""

from ml_collections import ConfigDict

from vlm_jax.configs import quickstart


def get_config(arg: str = "") -> ConfigDict:
  """The recipe; `arg` as in configs/quickstart.py."""
  config = quickstart.get_config(arg)
  config.fusion.name = "concat"
  config.fusion.image_attention = "causal"
  # CLIP ViT-L/14: image_size 336, patch 14, width 1024, depth 24, mlp 4096, heads 16.
  config.tower.class_token = True
  config.tower.pre_norm = True
  config.tower.post_norm = False  # the features before the last layer never meet it
  config.tower.feature_layer = -2
  config.tower.patch_bias = False
  config.tower.activation = "quick_gelu"
  config.tower.norm_eps = 1e-5
  config.connector.name = "mlp"  # mlp2x_gelu; LLaVA 1: "linear"
  config.tower.patch = 16  # as many slots a picture as the quickstart's 16 (LLaVA: 576)
  return config
