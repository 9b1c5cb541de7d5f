"""CoCa: one model that compares pictures with texts and captions them (arXiv:2205.01917).

It trains from scratch, everything at once, with the contrastive loss and twice the captioning loss.
The published mix (JFT-3B and ALIGN, half and half in batches of 65,536) cannot be had: drawings of
OpenMoji and easy-VQA with their captions stand for it, and the published sizes ask for a tokenizer
of their own (config.data.tokenizer). One argument:

  small               a step compares 256 pairs; for a CPU ("": small)
  base, large, coca   the published sizes (table 1)
  debug               seconds: few steps; its numbers mean nothing
"""

from ml_collections import ConfigDict

from vlm_jax.configs import base
from vlm_jax.core.errors import UsageError, nearest

# Of pictures: width, depth, mlp, heads; of text: depth of each half, width, mlp, heads.
SIZES = {
  "base": ((768, 12, 3072, 12), (12, 768, 3072, 12)),
  "large": ((1024, 24, 4096, 16), (12, 1024, 4096, 16)),
  "coca": ((1408, 40, 6144, 16), (18, 1408, 5632, 16)),
}
WORDS = ("small", *SIZES, "debug")


def get_config(arg: str = "") -> ConfigDict:
  """The recipe; `arg` is one of `WORDS`."""
  if arg and arg not in WORDS:
    raise UsageError(f"--config: no argument '{arg}'; {nearest(arg, WORDS)}")
  config = base.get_config()
  config.fusion.name = "coca"
  config.fusion.objectives = ConfigDict(dict(contrast=1.0, lm=2.0))
  config.data.template = "caption"
  augment = ("flip", "translate")
  config.data.sources.captions = base.source(
    name="easy_vqa", form="caption", ratio=1, augment=augment)
  config.data.sources.openmoji = base.source(
    name="openmoji", form="caption", ratio=3, augment=augment)
  config.connector.name = "attention_pool"
  config.llm.update(name="two_halves", cross="inside", activation="gelu", tie_embeddings=False)
  (published if arg in SIZES else small)(config, arg)

  shuffled = dict(split="test", controls=("shuffled",))
  config.evals.shapes = base.evaluation(
    kind="zero_shot", source="captions", form="caption", limit=200, **shuffled)
  config.evals.openmoji = base.evaluation(
    kind="zero_shot", source="openmoji", form="caption", **shuffled)
  config.evals.find = base.evaluation(
    kind="retrieval", source="openmoji", form="caption", **shuffled)
  config.evals.captions = base.evaluation(
    kind="caption", source="captions", form="caption", limit=200, **shuffled)
  if arg == "debug":
    for entry in config.evals.values():
      entry.update(limit=16, batch=8)
  return config


def published(config: ConfigDict, size: str) -> None:
  """The sizes and the training of the paper, sections 4.1 and 4.2: 256 patches and as many rows."""
  width, depth, mlp, heads = SIZES[size][0]
  config.tower.update(image_size=288, patch=18, width=width, depth=depth, mlp=mlp, heads=heads,
                      remat="full")
  half, width, mlp, heads = SIZES[size][1]
  config.llm.update(vocab_size=64_000, width=width, depth=half, encoder_depth=half, mlp=mlp,
                    heads=heads, kv_heads=heads, positions=64, remat="full")
  config.connector.update(latents=256, heads=heads)
  config.fusion.width = width
  config.data.update(rows=1024, tokens=64 * 48, images=64)
  config.optim.update(lr=8e-4, schedule="linear", b1=0.9, b2=0.999, weight_decay=0.01,
                      warmup=10_000)
  config.train.update(steps=500_000, log_every=100, checkpoint_every=5_000)


def small(config: ConfigDict, arg: str) -> None:
  """What a CPU trains."""
  config.tower.update(patch=8, width=96, depth=3, mlp=256, heads=3, unroll=3)
  config.tower.mean, config.tower.std = (0.88,) * 3, (0.2,) * 3  # most of a picture is light
  config.llm.update(vocab_size=1024, width=96, depth=2, encoder_depth=2, mlp=256, heads=3,
                    kv_heads=3, unroll=2, positions=24)
  config.connector.update(latents=16, heads=3)
  config.fusion.width = 96
  config.data.update(rows=8, tokens=512, images=32)
  config.optim.update(lr=1e-3, b2=0.98, weight_decay=0.2, warmup=50)
  config.train.update(steps=600, log_every=50, checkpoint_every=200)
  if arg == "debug":
    config.tower.update(depth=2, unroll=2)
    config.llm.update(depth=1, encoder_depth=1, unroll=1)
    config.data.update(rows=4, tokens=128, images=8)
    config.train.update(steps=6, log_every=2, checkpoint_every=3, accumulation=2)
    config.optim.warmup = 2
