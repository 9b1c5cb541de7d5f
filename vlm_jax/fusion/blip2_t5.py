"""BLIP-2, second stage, for encoder-decoders: queries and prefix are read, the suffix written.

The encoder of a language model that stays as it is (T5) reads what the queries of a Q-Former became
and the prefix of the text; its decoder writes the suffix (arXiv:2301.12597, section 3.3). Rows and
columns of the encoder come first (i the queries of one image, p prefix, > the start of the decoder,
s suffix, predicted):

          i i i i p p > s s
        i 1 1 1 1 1 1 . . .
        i 1 1 1 1 1 1 . . .
        i 1 1 1 1 1 1 . . .
        i 1 1 1 1 1 1 . . .
        p 1 1 1 1 1 1 . . .
        p 1 1 1 1 1 1 . . .
        > 1 1 1 1 1 1 1 . .
        s 1 1 1 1 1 1 1 1 .
        s 1 1 1 1 1 1 1 1 1

Who sees whom, and where a text is cut, is SimVLM's (`fusion/simvlm.py`): after the prompt, or at
random in a caption. But queries are in no grid: they count as slots, and a position is the number
of slots before. In fan-out documents every branch has its own prompt and its own start (a, b
prompts of two branches; c, d their answers):

          i i i i a a b b > c > d
        i 1 1 1 1 . . . . . . . .
        i 1 1 1 1 . . . . . . . .
        i 1 1 1 1 . . . . . . . .
        i 1 1 1 1 . . . . . . . .
        a 1 1 1 1 1 1 . . . . . .
        a 1 1 1 1 1 1 . . . . . .
        b 1 1 1 1 . . 1 1 . . . .
        b 1 1 1 1 . . 1 1 . . . .
        > 1 1 1 1 1 1 . . 1 . . .
        c 1 1 1 1 1 1 . . 1 1 . .
        > 1 1 1 1 . . 1 1 . . 1 .
        d 1 1 1 1 . . 1 1 . . 1 1
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core.batch import Media, Stream
from vlm_jax.core.document import Encoded
from vlm_jax.core.layout import Layout, write_slots
from vlm_jax.core.typing import Array
from vlm_jax.fusion import simvlm
from vlm_jax.fusion.blip2 import STAGES
from vlm_jax.fusion.concat import media_table, order, rows
from vlm_jax.fusion.simvlm import ENCODER, STREAM, fields, losses, weights
from vlm_jax.ops.gather import take_rows

__all__ = ["BIASED", "STAGES", "STREAM", "Model", "axes", "fields", "layout", "losses", "order",
           "rows", "weights"]

BIASED = (ENCODER, STREAM)  # by distance, as T5


def axes(config: ConfigDict) -> dict[str, int]:
  """Capacities: slots of both sides, images, rows of the media table, documents."""
  return simvlm.capacities(config, len(rows(config)))


def layout(encoded: Encoded, config: ConfigDict, rng: np.random.Generator) -> Layout:
  """Gives queries and prefix to the encoder and the suffix to the decoder.

  Raises:
    UsageError: as `simvlm.layout`.
  """
  places = rows(config)
  slots = write_slots(encoded, places, lambda image: order(config, image))
  suffix = np.arange(len(slots)) >= simvlm.cuts(slots, rng)
  # Where a branch leaves the trunk, its prompt goes on from the last slot that it shares.
  shared = suffix[slots.branch == 0].sum()
  positions = (slots.positions - np.where(slots.branch > 0, shared, 0))[~suffix]
  read = dataclasses.replace(simvlm.encoder_slots(slots, suffix),
                             positions=positions.astype(np.int32))
  return simvlm.assemble(encoded, read, simvlm.decoder_slots(slots, suffix), config, len(places))


class Model(simvlm.Model):
  """Tower, Q-Former, and an encoder-decoder that reads the queries among its tokens."""

  def _see(self, x: Array, stream: Stream, media: Media) -> tuple[Array, None]:
    table = media_table(media, self.config)
    return jnp.where((stream.fill >= 0)[..., None], take_rows(table, stream.fill), x), None
