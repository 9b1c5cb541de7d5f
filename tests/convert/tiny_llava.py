"""A tiny LLaVA of ours with noise for parameters, its tokenizer and run directory."""

import numpy as np

from vlm_jax.configs import base
from vlm_jax.convert import systems
from vlm_jax.core.tree import unflatten
from vlm_jax.data import tokenizer
from vlm_jax.train import checkpoint_tools

SIDE, ROWS = 16, 272  # the vocabulary is padded: 270 tokens


def get_config(tokenizer_path=""):
  config = base.get_config()
  config.fusion.update(name="concat", image_attention="causal")
  config.tower.update(image_size=SIDE, patch=8, width=24, depth=2, mlp=40, heads=3,
                      post_norm=False, activation="gelu_tanh")
  config.llm.update(vocab_size=ROWS, width=32, depth=2, mlp=48, heads=4, kv_heads=2)
  config.attention.update(block_q=16, block_k=16)
  config.data.update(rows=2, tokens=48, images=4, tokenizer=str(tokenizer_path))
  config.data.sources.only = base.source(name="pydoc")
  config.train.update(steps=1, trackers=())
  return config


def noise(config, seed=0, scale=0.3):
  """Every parameter N(0, scale^2), norms around 1: {path: f32 array}."""
  rng = np.random.default_rng(seed)
  return {path: (rng.normal(0, scale, shape) + path.endswith("norm/scale")).astype(np.float32)
          for path, shape in systems.shapes(config).items()}


def write_tokenizer(folder):
  path = folder / "tokenizer.json"
  words = ["what is this? a red circle, a green square and what", "is that is this"] * 3
  tokenizer.train(words, 270).save(str(path))
  return path


def write_run(folder, config, flat, step=3):
  folder.mkdir()
  checkpoint_tools.write_run(folder, config.to_json(), step, unflatten(flat), {})
  return folder
