"""SimVLM as published: an encoder-decoder from scratch on images and text (arXiv:2108.10904).

Every step mixes image-text documents and plain text as 4096 to 512, in whole cycles of 8 to 1. The
paper's web-scale data cannot be had: easy-VQA (captions, and all questions of a picture) and the
Python manual stand for them, and the published sizes ask for a tokenizer of their own
(config.data.tokenizer). One argument:

  base, large, huge   the published sizes ("": base)
  debug               50 steps of a tiny model in seconds; its numbers mean nothing
"""

from ml_collections import ConfigDict

from vlm_jax.configs import base
from vlm_jax.core.errors import UsageError, nearest

# Width, depth of each side, mlp, heads (those of ViT-B, -L and -H), blocks of the stem's stages
# (ResNet-101's, ResNet-152's).
SIZES = {
  "base": (768, 12, 3072, 12, (3, 4, 23)),
  "large": (1024, 24, 4096, 16, (3, 4, 23)),
  "huge": (1280, 32, 5120, 16, (3, 8, 36)),
}


def get_config(arg: str = "") -> ConfigDict:
  """The recipe; `arg` is a size or "debug"."""
  config = base.get_config()
  config.fusion.name = "simvlm"

  config.tower.name = "resnet"
  config.tower.image_size = 224  # stride 16: 14 x 14 patches
  config.tower.width = 64
  config.tower.norm = "group"
  config.tower.remat = "full"
  config.connector.name = "linear"

  config.llm.name = "encoder_decoder"
  config.llm.vocab_size = 32_000
  config.llm.norm = "layer"
  config.llm.norm_eps = 1e-6
  config.llm.feed_forward = "plain"
  config.llm.activation = "gelu"
  config.llm.linear_bias = True
  config.llm.positions = 256
  config.llm.remat = "full"

  sizes = SIZES.get(arg or "base", SIZES["base"])
  width, depth, config.llm.mlp, heads, config.tower.depths = sizes
  config.llm.width, config.llm.depth = width, depth
  config.llm.heads = config.llm.kv_heads = heads

  # Rows of four pictures and one text: 1024 of them hold 512 cycles.
  config.data.rows = 1024
  config.data.tokens = 1152
  config.data.decoder_tokens = 512
  config.data.images = 4
  config.data.window = 255  # and the start of the decoder
  config.data.sources.captions = base.source(name="easy_vqa", form="caption", ratio=4)
  config.data.sources.easy_vqa = base.source(name="easy_vqa", form="fan_out", ratio=4)
  config.data.sources.pydoc = base.source(name="pydoc", form="text", ratio=1)

  config.optim.lr = 5e-4
  config.optim.schedule = "linear"
  config.optim.b1 = 0.9
  config.optim.b2 = 0.999
  config.optim.weight_decay = 0.01
  config.optim.warmup = 20_000
  config.train.steps = 1_000_000
  config.train.log_every = 100
  config.train.checkpoint_every = 5_000

  config.evals.easy_vqa = base.evaluation(kind="vqa", source="easy_vqa", split="test")
  config.evals.text = base.evaluation(kind="perplexity", source="pydoc", split="test")
  if arg == "debug":
    return shrink(config)
  if arg and arg not in SIZES:
    raise UsageError(f"--config: no argument '{arg}'; {nearest(arg, [*SIZES, 'debug'])}")
  return config


def shrink(config: ConfigDict) -> ConfigDict:
  """The recipe at the size of a test: another width and depth everywhere, the same parts."""
  config.tower.update(image_size=64, width=16, depths=(1, 1, 1), remat="none")
  config.llm.update(vocab_size=1024, width=96, depth=2, mlp=192, heads=3, kv_heads=3, unroll=2,
                    remat="none", positions=128)
  config.data.update(rows=2, tokens=448, decoder_tokens=192, images=5, window=64)
  config.optim.update(lr=2e-3, warmup=5)
  config.train.update(steps=50, log_every=5, checkpoint_every=50)
  for entry in config.evals.values():
    entry.limit = 8
  return config
