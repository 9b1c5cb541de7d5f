"""BLIP-2, second stage: queries stand before the text of a language model (arXiv:2301.12597, 3.3).

What the queries of a Q-Former became (`connectors/qformer.py`) takes the place of words, and the
language model, a decoder that stays as it is, reads them as such (t text, i the queries of one
image):

          i i i i t t t
        i 1 . . . . . .
        i 1 1 . . . . .
        i 1 1 1 . . . .
        i 1 1 1 1 . . .
        t 1 1 1 1 1 . .
        t 1 1 1 1 1 1 .
        t 1 1 1 1 1 1 1

In fan-out documents a branch sees the trunk and itself (a, b the tokens of two branches):

          i i i i a a b b
        i 1 . . . . . . .
        i 1 1 . . . . . .
        i 1 1 1 . . . . .
        i 1 1 1 1 . . . .
        a 1 1 1 1 1 . . .
        a 1 1 1 1 1 1 . .
        b 1 1 1 1 . . 1 .
        b 1 1 1 1 . . 1 1

That is LLaVA (`fusion/concat.py`) with another connector and other stages; encoder-decoders have
`fusion/blip2_t5.py`. The Q-Former may start from a run of the first stage, `blip2_qformer.py`:
`config.connector.init`.
"""

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core import mask as masks
from vlm_jax.core.document import Encoded
from vlm_jax.core.fusion import Stage
from vlm_jax.core.layout import Layout, write_slots
from vlm_jax.fusion.concat import (
  STREAM,
  Model,
  assemble,
  axes,
  fields,
  losses,
  order,
  rows,
  weights,
)

__all__ = ["STAGES", "STREAM", "Model", "axes", "fields", "layout", "losses", "order", "rows",
           "weights"]

STAGES = (
  Stage("all", (".*",)),
  Stage("bridge", ("(connector|tower/post_norm)/.*",)),  # that norm, where there is one, too
  Stage("finetune", ("connector/.*", "tower/.*")),  # the paper's fine-tuning, section 4.2
  Stage("adapt", ("connector/.*", "llm/.*")),  # not the paper's: with adapters, as LLaVA's
)


def layout(encoded: Encoded, config: ConfigDict, rng: np.random.Generator) -> Layout:
  """Writes images and text in reading order; everything is causal.

  Raises:
    UsageError: a source that the config does not have, or branches without a "fan_out" source.
  """
  del rng  # nothing here is random
  slots = write_slots(encoded, rows(config), lambda image: order(config, image))
  return assemble(encoded, slots, masks.causal(len(slots)), config)
