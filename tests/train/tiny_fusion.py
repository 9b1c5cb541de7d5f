"""A strategy, a loader and a config so small that a test can afford many runs of the real loop."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.configs import base
from vlm_jax.core.fusion import Output, Stage
from vlm_jax.core.layout import image_fields, stream_fields

STAGES = (
  Stage("all", (".*",)),
  Stage("align", ("connector/.*",)),
  Stage("top", ("connector", "llm/layers[2:]")),
)
STREAM = "text"
VOCAB, SIZE, LAYERS = 32, 4, 4


def get_config():
  config = base.get_config()
  config.fusion.name = "tests.train.tiny_fusion"
  config.tower.update(image_size=SIZE, patch=4)
  config.llm.update(vocab_size=VOCAB, width=16, depth=LAYERS)
  config.data.sources.pairs = base.source(name="pairs", weight=1.0)
  config.data.sources.words = base.source(name="words", weight=0.5)
  config.data.update(rows=8, tokens=12, images=2)
  config.train.update(steps=12, log_every=1, checkpoint_every=4)
  config.optim.update(warmup=2, lr=1e-2)
  return config


def axes(config):
  return {"text": config.data.tokens, "images": config.data.images}


def fields(config):
  del config
  return stream_fields("text", ("lm",), classes=False) | image_fields(SIZE, SIZE)


class Model(nn.Module):
  config: object

  @nn.compact
  def __call__(self, batch, *, rng=None, cache=None):
    del rng, cache
    stream, media = batch.streams["text"], batch.media["images"]
    width = self.config.llm.width
    pixels = media.values.reshape(*media.values.shape[:2], -1).astype(jnp.float32) / 255
    rows = Dense(width, ("patch", "embed"), name="tower")(pixels)
    rows = Dense(width, ("embed", "mlp"), name="connector")(rows)
    hidden, head = Decoder(width, name="llm")(stream, rows)
    return Output(hidden, head)


class Dense(nn.Module):
  width: int
  names: tuple

  @nn.compact
  def __call__(self, x):
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), self.names)
    return jnp.tanh(x @ self.param("kernel", init, (x.shape[-1], self.width)))


class Decoder(nn.Module):
  width: int

  @nn.compact
  def __call__(self, stream, rows):
    named = lambda name, names, shape, init: self.param(
      name, nn.with_logical_partitioning(init, names), shape)
    normal = nn.initializers.normal(0.3)
    table = named("embedding", ("vocab", "embed"), (VOCAB, self.width), normal)
    kernels = named("layers", ("layers", "embed", "mlp"), (LAYERS, self.width, self.width), normal)
    scale = named("scale", ("norm",), (self.width,), nn.initializers.ones)
    picked = jnp.take_along_axis(rows, jnp.maximum(stream.fill, 0)[..., None], 1)
    x = jnp.where(stream.fill[..., None] < 0, table[stream.tokens], picked)
    step = lambda x, kernel: (x + jnp.tanh(x @ kernel), None)
    x, _ = jax.lax.scan(step, x, kernels)
    return x * scale, table.T


def losses(output, batch, config):
  stream = batch.streams["text"]
  logs = jax.nn.log_softmax(output.logits())
  picked = -jnp.take_along_axis(logs, stream.targets[..., None], -1)[..., 0]
  return {"lm": _by_source(picked * stream.loss_weights["lm"], stream, config)}


def weights(batch, config):
  stream = batch.streams["text"]
  return {"lm": _by_source(stream.loss_weights["lm"], stream, config)}


def _by_source(values, stream, config):
  return jnp.stack([jnp.sum(jnp.where(stream.source_ids == index, values, 0))
                    for index in range(len(config.data.sources))])


class Loader:
  """Batches that are a function of their index."""

  def __init__(self, config, start=None):
    self.config, self.index, self.closed = config, (start or {"index": 0})["index"], False

  def __iter__(self):
    return self

  def __next__(self):
    flat = batch(self.config, self.index)
    self.index += 1
    return flat, {"documents": {"pairs": int(flat["streams/text/segment_ids"].max())}, "bad": {}}

  def state(self):
    return {"index": self.index}

  def close(self):
    self.closed = True


def batch(config, index):
  rng = np.random.default_rng((config.seed, index))
  rows, slots, images = config.data.rows, config.data.tokens, config.data.images
  shape = (rows, slots)
  used = np.arange(slots) < rng.integers(3, slots + 1, (rows, 1))
  tokens = rng.integers(1, VOCAB, shape, dtype=np.int32)
  fill = np.where(rng.random(shape) < 0.2, rng.integers(0, images, shape), -1)
  weight = used & (rng.random(shape) < 0.7)
  integer = lambda array: np.broadcast_to(array, shape).astype(np.int32)
  return {
    "streams/text/tokens": tokens,
    "streams/text/targets": (tokens * 7 + 3) % VOCAB,
    "streams/text/fill": integer(fill),
    "streams/text/positions": integer(np.arange(slots)),
    "streams/text/segment_ids": integer(used),
    "streams/text/source_ids": integer(rng.integers(0, 2, (rows, 1))),
    "streams/text/loss_weights/lm": weight.astype(np.float32),
    "masks/text/lo": integer(0),
    "masks/text/hi": integer(np.where(used, np.arange(slots) + 1, 0)),
    "media/images/values": rng.integers(0, 256, (rows, images, SIZE, SIZE, 3), dtype=np.uint8),
    "media/images/segment_ids": rng.integers(0, 2, (rows, images), dtype=np.int32),
  }
