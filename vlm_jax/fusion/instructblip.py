"""InstructBLIP: queries read a picture for what is asked about it (arXiv:2305.06500).

BLIP-2's second stage (`fusion/blip2.py`) whose Q-Former reads the instruction, too. The words of
its own tokenizer stand behind the queries of their picture and are dropped when all have been read
(q queries, w words, x y the picture):

          q q w w x y
        q 1 1 1 1 1 1
        q 1 1 1 1 1 1
        w 1 1 1 1 . .
        w 1 1 1 1 . .

The language model reads what the queries became, and the instruction again, in its own words. In
fan-out documents a branch sees the trunk and itself (t the trunk's instruction, i the queries of
one image, a, b the tokens of two branches):

          i i i i t t a a b b
        i 1 . . . . . . . . .
        i 1 1 . . . . . . . .
        i 1 1 1 . . . . . . .
        i 1 1 1 1 . . . . . .
        t 1 1 1 1 1 . . . . .
        t 1 1 1 1 1 1 . . . .
        a 1 1 1 1 1 1 1 . . .
        a 1 1 1 1 1 1 1 1 . .
        b 1 1 1 1 1 1 . . 1 .
        b 1 1 1 1 1 1 . . 1 1

A picture is read once, so a branch cannot ask for itself. Encoder-decoders have
`fusion/instructblip_t5.py`.
"""

import dataclasses
import math

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.connectors import qformer
from vlm_jax.core.document import Encoded, Pixels
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_tower
from vlm_jax.core.layout import TOLD, Field, Layout, image_fields
from vlm_jax.fusion import blip2
from vlm_jax.fusion.blip2 import STAGES, STREAM, Model, axes, losses, order, rows, weights

__all__ = ["STAGES", "STREAM", "Model", "axes", "fields", "layout", "losses", "order", "rows",
           "unread", "uses", "weights"]


def fields(config: ConfigDict) -> dict[str, Field]:
  """Those of `blip2`, and the words of every picture; raises as `words_fields`."""
  return blip2.fields(config) | words_fields(config)


def layout(encoded: Encoded, config: ConfigDict, rng: np.random.Generator) -> Layout:
  """BLIP-2's, and what the Q-Former is told about every picture.

  Raises:
    UsageError: as `blip2.layout` and `tell`.
  """
  return tell(blip2.layout(encoded, config, rng), encoded, config)


def unread(config: ConfigDict) -> tuple[str, ...]:
  """Patterns of what the words become in the last layer, which nobody reads: they never train."""
  every = config.connector.cross_every
  last = config.connector.depth // every - 1
  return (f"connector/layers[{last}:]/layer{every - 1}/text_(mlp|norm)",)


def uses(config: ConfigDict, path: str) -> dict[str, int] | None:
  """The words of a picture, and room for them, go through the Q-Former with its queries."""
  top, _, inner = path.partition("/")
  if top != "connector":
    return None
  grid = math.prod(find_tower(config).grid(config.tower))
  return {"images/images": qformer.uses(config.connector, inner, grid,
                                        config.data.instruction_tokens)}


def words_fields(config: ConfigDict) -> dict[str, Field]:
  """The fields of the pictures, words among them.

  Raises:
    UsageError: a connector that does not read, or less positions than words.
  """
  connector, length = config.connector, config.data.instruction_tokens
  if connector.name != "qformer" or not connector.vocab_size:
    raise UsageError(f"config.fusion.name '{config.fusion.name}' tells a Q-Former words; set "
                     "config.connector.name='qformer' and config.connector.vocab_size to the "
                     "tokens of config.data.instruction_tokenizer")
  if not 1 <= length <= connector.positions:
    raise UsageError(f"config.data.instruction_tokens is {length}, of config.connector.positions = "
                     f"{connector.positions}; use 1 or more, at most as many")
  side = config.tower.image_size
  return image_fields(side, side, words=length)


def tell(made: Layout, encoded: Encoded, config: ConfigDict) -> Layout:
  """The layout of a document with the words of its pictures, i32[N,L].

  Raises:
    UsageError: more of them than there is room for.
  """
  told = [part.words for part in encoded.parts if isinstance(part, Pixels)]
  length = config.data.instruction_tokens
  words = np.full((len(told), length), -1, np.int32)
  for row, ids in zip(words, told, strict=True):
    if ids is None:
      continue
    if len(ids) > length:
      raise UsageError(f"document {encoded.key} tells {len(ids)} words about a picture but "
                       f"config.data.instruction_tokens is {length}; raise it")
    row[: len(ids)] = ids
  return dataclasses.replace(made, arrays=made.arrays | {TOLD: words})
