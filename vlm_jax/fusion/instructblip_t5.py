"""InstructBLIP for encoder-decoders: the instruction is told the Q-Former, and read by the encoder.

BLIP-2's second stage for T5 (`fusion/blip2_t5.py`) with the Q-Former of `fusion/instructblip.py`
(arXiv:2305.06500). Rows and columns of the encoder come first (i the queries of one
image, t the trunk's instruction; a, b what two branches still ask, c, d their answers, > the start
of the decoder):

          i i i i t a a b b > c > d
        i 1 1 1 1 1 . . . . . . . .
        i 1 1 1 1 1 . . . . . . . .
        i 1 1 1 1 1 . . . . . . . .
        i 1 1 1 1 1 . . . . . . . .
        t 1 1 1 1 1 . . . . . . . .
        a 1 1 1 1 1 1 1 . . . . . .
        a 1 1 1 1 1 1 1 . . . . . .
        b 1 1 1 1 1 . . 1 1 . . . .
        b 1 1 1 1 1 . . 1 1 . . . .
        > 1 1 1 1 1 1 1 . . 1 . . .
        c 1 1 1 1 1 1 1 . . 1 1 . .
        > 1 1 1 1 1 . . 1 1 . . 1 .
        d 1 1 1 1 1 . . 1 1 . . 1 1
"""

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core.document import Encoded
from vlm_jax.core.layout import Field, Layout
from vlm_jax.fusion import blip2_t5
from vlm_jax.fusion.blip2_t5 import (
  BIASED,
  STAGES,
  STREAM,
  Model,
  axes,
  losses,
  order,
  rows,
  weights,
)
from vlm_jax.fusion.instructblip import tell, unread, uses, words_fields

__all__ = ["BIASED", "STAGES", "STREAM", "Model", "axes", "fields", "layout", "losses", "order",
           "rows", "unread", "uses", "weights"]


def fields(config: ConfigDict) -> dict[str, Field]:
  """Those of `blip2_t5`, and the words of every picture; raises as `words_fields`."""
  return blip2_t5.fields(config) | words_fields(config)


def layout(encoded: Encoded, config: ConfigDict, rng: np.random.Generator) -> Layout:
  """BLIP-2's, and what the Q-Former is told about every picture; raises as its and `tell`."""
  return tell(blip2_t5.layout(encoded, config, rng), encoded, config)
