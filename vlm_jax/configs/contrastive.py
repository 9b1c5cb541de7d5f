"""CLIP and SigLIP, small, on drawings and their names (arXiv:2103.00020, 2303.15343).

Every step compares 256 pictures of OpenMoji and easy-VQA with their captions; equal captions, of
which easy-VQA has only 24, are no negatives of each other. Published batches are 32,768 pairs:
raise config.data.rows, and config.train.accumulation to what fits. Arguments, joined by commas:

  clip    two projections, softmax over the batch, causal text ("": this one)
  siglip  pooling by attention, a sigmoid for every pair, text that sees all of itself
  debug   seconds: few steps; its numbers mean nothing
"""

from ml_collections import ConfigDict

from vlm_jax.configs import base
from vlm_jax.core.errors import UsageError, nearest

WORDS = ("clip", "siglip", "debug")


def get_config(arg: str = "") -> ConfigDict:
  """The recipe; `arg` is words of `WORDS` joined by commas."""
  words = list(filter(None, arg.split(",")))
  for word in words:
    if word not in WORDS:
      raise UsageError(f"--config: no argument '{word}'; {nearest(word, WORDS)}")
  if {"clip", "siglip"} <= set(words):
    raise UsageError(f"--config: '{arg}' asks for two strategies at once; use one")
  config = base.get_config()
  config.fusion.name = "clip"
  config.fusion.objectives = ConfigDict(dict(contrast=1.0))
  config.fusion.width = 96  # CLIP ViT-L/14: 768

  # CLIP ViT-L/14: image_size 224, patch 14, and vit.size("L"); texts 768 wide, 12 deep, 12 heads.
  config.tower.update(patch=8, width=96, depth=3, mlp=256, heads=3, unroll=3, class_token=True,
                      pre_norm=True, patch_bias=False, pool="tok", activation="quick_gelu",
                      norm_eps=1e-5)
  config.tower.mean, config.tower.std = (0.88,) * 3, (0.2,) * 3  # most of a picture is light
  config.llm.update(name="text_tower", vocab_size=1024, width=96, depth=3, mlp=256, heads=3,
                    kv_heads=3, unroll=3, positions=24, activation="quick_gelu")
  if "siglip" in words:
    config.fusion.name = "siglip"
    config.fusion.bias = -5.5  # 256 pairs; published: -10 for 32,768
    config.tower.update(class_token=False, pre_norm=False, patch_bias=True, pool="map",
                        activation="gelu_tanh", norm_eps=1e-6)
    config.llm.update(attends="full", pool="last", activation="gelu_tanh", norm_eps=1e-6)

  config.data.rows = 8
  config.data.images = 32  # pairs of a row
  augment = ("flip", "translate")
  config.data.sources.captions = base.source(
    name="easy_vqa", form="caption", ratio=1, augment=augment)
  config.data.sources.openmoji = base.source(
    name="openmoji", form="caption", ratio=3, augment=augment)

  config.optim.lr = 1e-3
  config.optim.b2 = 0.98
  config.optim.weight_decay = 0.2
  config.optim.warmup = 50
  config.train.steps = 600
  config.train.log_every = 50
  config.train.checkpoint_every = 200

  shuffled = dict(split="test", controls=("shuffled",))
  # Colour and shape of pictures never seen, among the 24 that there are.
  config.evals.shapes = base.evaluation(
    kind="zero_shot", source="captions", form="caption", limit=200, **shuffled)
  # Drawings of families that training never shows, among all of them.
  config.evals.openmoji = base.evaluation(
    kind="zero_shot", source="openmoji", form="caption", **shuffled)
  config.evals.find = base.evaluation(
    kind="retrieval", source="openmoji", form="caption", **shuffled)
  if "debug" in words:
    config.tower.update(depth=2, unroll=2)
    config.llm.update(depth=2, unroll=2)
    config.data.update(rows=4, images=8)
    config.train.update(steps=6, log_every=2, checkpoint_every=3, accumulation=2)
    config.optim.warmup = 2
    for entry in config.evals.values():
      entry.update(limit=16, batch=8)
  return config
