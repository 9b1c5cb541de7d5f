"""The prefix-LM's layout and losses on a model so small that compiling it costs a test little."""

import flax.linen as nn
import jax.numpy as jnp

from tests.train.tiny_fusion import Dense
from vlm_jax.core.fusion import Output
from vlm_jax.fusion.prefix_lm import STAGES as STAGES
from vlm_jax.fusion.prefix_lm import axes as axes
from vlm_jax.fusion.prefix_lm import fields as fields
from vlm_jax.fusion.prefix_lm import layout as layout
from vlm_jax.fusion.prefix_lm import losses as losses
from vlm_jax.fusion.prefix_lm import order as order
from vlm_jax.fusion.prefix_lm import rows as rows
from vlm_jax.fusion.prefix_lm import weights as weights


class Model(nn.Module):
  config: object

  @nn.compact
  def __call__(self, batch, *, rng=None, cache=None):
    del rng, cache
    stream, values, llm = batch.streams["text"], batch.media["images"].values, self.config.llm
    table = self.param(
      "table", nn.with_logical_partitioning(nn.initializers.normal(0.1), ("vocab", "embed")),
      (llm.vocab_size, llm.width))
    pixels = values.reshape(values.shape[0], values.shape[1] * len(rows(self.config)), -1) / 255
    features = Dense(llm.width, ("patch", "embed"), name="tower")(pixels)
    seen = jnp.take_along_axis(features, jnp.maximum(stream.fill, 0)[..., None], 1)
    x = jnp.where(stream.fill[..., None] < 0, table[stream.tokens], seen)
    return Output(Dense(llm.width, ("embed", "mlp"), name="llm")(x), table.T)
