"""A tiny model with noise for parameters, and random prompts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import FrozenConfigDict

from vlm_jax.configs import base
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Encoded, Pixels, Tokens
from vlm_jax.core.fusion import find_fusion
from vlm_jax.generate.prompts import layouts, stack

SIDE, VOCAB = 16, 97
ROWS, SLOTS = 4, 48  # one shape for nearly everything: every other one costs a compilation


def tiny(fusion="prefix_lm", form="fan_out", attend="bidirectional"):
  config = base.get_config()
  config.fusion.name, config.fusion.image_attention = fusion, attend
  config.tower.update(dict(image_size=SIDE, patch=8, width=16, depth=2, mlp=32, heads=2))
  config.llm.update(dict(vocab_size=VOCAB, width=32, depth=2, mlp=48, heads=4, kv_heads=2))
  if fusion == "simvlm":
    config.llm.update(dict(name="encoder_decoder", norm="layer", feed_forward="plain",
                           activation="gelu", linear_bias=True, positions=SLOTS))
  config.data.sources.pictures = base.source(name="easy_vqa", form=form)
  config.data.sources.words = base.source(name="pydoc", form="text")
  return config


def noise(config, scale=0.35, seed=0):
  """Parameters of the right shapes, all of them noise: no norm, gate or bias at its default."""
  prompts = stack(layouts([question(4)], config), config, rows=1, bucket=8)
  model = find_fusion(config).Model(config)
  init = lambda key: nn.unbox(model.init(key, from_flat(prompts.flat)))["params"]
  leaves, tree = jax.tree.flatten(jax.eval_shape(init, jax.random.key(0)))
  rng = np.random.default_rng(seed)
  draw = lambda leaf: jnp.asarray(rng.normal(0.0, scale, leaf.shape), leaf.dtype)
  return jax.tree.unflatten(tree, [draw(leaf) for leaf in leaves])


def picture(seed):
  return Pixels(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8))


def words(count, seed, branch=0, loss=False):
  ids = np.random.default_rng(seed).integers(6, VOCAB, count).astype(np.int32)
  return Tokens(ids, np.full(count, loss), branch)


def question(count, seed=0, image=True):
  """One question of `count` tokens."""
  parts = (words(count, seed),)
  return Encoded((picture(seed), *parts) if image else parts, "pictures", f"q{seed}")


def fan_out(counts, seed=0):
  """One image and a branch of each of `counts` tokens."""
  branches = [words(n, 100 * seed + k, branch=k) for k, n in enumerate(counts, 1)]
  return Encoded((picture(seed), *branches), "pictures", f"f{seed}")


def alone(encoded):
  """The branches of a fan-out document, each with the trunk and without its siblings."""
  trunk = tuple(part for part in encoded.parts if not getattr(part, "branch", 0))
  return [
    dataclasses.replace(encoded, parts=(*trunk, part))
    for part in encoded.parts if getattr(part, "branch", 0)
  ]


def answered(encoded, answers):
  """The document with an answer (tokens) behind every branch, or behind its last part."""
  parts, numbers = [], [getattr(part, "branch", 0) for part in encoded.parts]
  branched = any(numbers)
  answers = iter(answers)
  for index, (part, number) in enumerate(zip(encoded.parts, numbers, strict=True)):
    parts.append(part)
    if (number if branched else index == len(numbers) - 1):
      ids = np.asarray(next(answers), np.int32)
      parts.append(Tokens(ids, np.ones(len(ids), bool), number))
  return dataclasses.replace(encoded, parts=tuple(parts))


@functools.partial(jax.jit, static_argnames="config")
def _logits(config, params, flat):
  return find_fusion(config).Model(config).apply({"params": params}, from_flat(flat)).logits()


def forward(config, params, documents):
  """Logits and classes of each document, f32[t,V] and i32[t], from one forward without a cache."""
  laid_out = layouts(documents, config)
  prompts = stack(laid_out, config, rows=ROWS, bucket=SLOTS)
  logits = np.asarray(_logits(FrozenConfigDict(config), params, prompts.flat))
  stream = find_fusion(config).STREAM
  lengths = [layout.sizes[stream] for layout in laid_out]
  return [
    (logits[row, :length], layout.arrays[f"masks/{stream}/q_class"])
    for row, (layout, length) in enumerate(zip(laid_out, lengths, strict=True))
  ]
