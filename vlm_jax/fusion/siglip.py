"""SigLIP: every picture and text of a batch are a pair or not, each decided alone (2303.15343).

As CLIP (`fusion/clip.py`), with three differences. The loss is a sigmoid's (section 3), so nothing
is normalised over the batch; its logits have a learned bias, since nearly all of them are
negatives. The picture's pooled vector is its embedding as it is, and the text's projection, which
has a bias, leads there. And the text tower sees its whole text, padding included, and reads the
last slot.

What does not apply of what strategies promise stands in `fusion/clip.py`, with the reasons.
"""

import math

import flax.linen as nn
import jax.numpy as jnp
from jax.nn import initializers
from ml_collections import ConfigDict

from vlm_jax.core.batch import Batch
from vlm_jax.core.fusion import Cache, Embeddings
from vlm_jax.core.precision import precision
from vlm_jax.core.typing import Array
from vlm_jax.fusion.clip import (
  GLOBAL,
  STAGES,
  STREAM,
  axes,
  contrast,
  fields,
  layout,
  order,
  pairs,
  pool_image,
  pool_text,
  rows,
  unit,
  uses,
  weights,
)
from vlm_jax.nn.linear import Linear, parameter
from vlm_jax.nn.model import Configured
from vlm_jax.ops.contrastive import sigmoid_losses

__all__ = ["GLOBAL", "KEYS", "STAGES", "STREAM", "Model", "axes", "fields", "layout", "losses",
           "order", "rows", "uses", "weights"]

# What is neither tower's: ours, theirs, operation (vlm_jax/convert/table.py).
KEYS = (
  ("text_projection/kernel", "text_model.head.weight", "in"),
  ("text_projection/bias", "text_model.head.bias", "copy"),
  ("logit_scale", "logit_scale", "flat"),  # theirs have an axis of one
  ("logit_bias", "logit_bias", "flat"),
)


def losses(output: Embeddings, batch: Batch, config: ConfigDict) -> dict[str, Array]:
  """contrast: for every picture the losses with all texts of the global batch, f32[sources]."""
  values = sigmoid_losses(pairs(output, batch), output.scale, output.bias)
  return contrast(values, batch, config)


class Model(Configured):
  """Both towers and the projection of texts."""

  @nn.compact
  def __call__(
    self, batch: Batch, *, rng: Array | None = None, cache: Cache | None = None
  ) -> Embeddings:
    """Embeds the pictures of a batch, its texts, or both; arguments and errors as `clip.Model`.

    Returns:
      Unit vectors of E = config.tower.width.
    """
    del rng, cache
    config, dtypes = self.config, precision(self.config)
    image, text = pool_image(batch, config), pool_text(batch, config)
    if text is not None:
      project = Linear((config.tower.width,), ("embed", "norm"), True, dtypes,
                       name="text_projection")
      text = unit(project(text))
    learned = lambda name, value: parameter(
      self, name, initializers.constant(value), (), (), dtypes.param).astype(jnp.float32)
    scale, bias = learned("logit_scale", math.log(10)), learned("logit_bias", config.fusion.bias)
    return Embeddings(None if image is None else unit(image), text, jnp.exp(scale), bias)
