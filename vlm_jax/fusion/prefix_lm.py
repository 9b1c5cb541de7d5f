"""SimVLM: image and prefix see each other, the suffix is causal (arXiv:2108.10904, section 3.1).

The decoder-only form of the paper's prefix language model. The prefix of a document with an image
or a prompt is everything up to the first predicted token (i image, p prompt, s suffix, predicted):

          i i i i p p s s
        i 1 1 1 1 1 1 . .
        i 1 1 1 1 1 1 . .
        i 1 1 1 1 1 1 . .
        i 1 1 1 1 1 1 . .
        p 1 1 1 1 1 1 . .
        p 1 1 1 1 1 1 . .
        s 1 1 1 1 1 1 1 .
        s 1 1 1 1 1 1 1 1

Plain text, of which every token but the first is predicted, is cut at a random length T_p, uniform
in 0..n-1 (a new one every epoch); only the suffix is then predicted, equation 3.

In fan-out documents every branch has its own prompt: the trunk sees itself, a prompt sees the trunk
and itself (a, b prompts of two branches; c, d their answers):

          i i i i a a c b b d
        i 1 1 1 1 . . . . . .
        i 1 1 1 1 . . . . . .
        i 1 1 1 1 . . . . . .
        i 1 1 1 1 . . . . . .
        a 1 1 1 1 1 1 . . . .
        a 1 1 1 1 1 1 . . . .
        c 1 1 1 1 1 1 1 . . .
        b 1 1 1 1 . . . 1 1 .
        b 1 1 1 1 . . . 1 1 .
        d 1 1 1 1 . . . 1 1 1
"""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core import mask as masks
from vlm_jax.core.document import Encoded
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import Stage
from vlm_jax.core.layout import Layout, Slots, write_slots
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
  Stage("all", (".*",)),  # from scratch, and PaliGemma, in every stage
  Stage("finetune", ("connector/.*", "llm/.*")),  # the tower stays as it is
)


def layout(encoded: Encoded, config: ConfigDict, rng: np.random.Generator) -> Layout:
  """Lets the prefix see itself, and predicts nothing inside it.

  Raises:
    UsageError: as `concat.layout`, or a prefix that a local layer could not see whole.
  """
  slots = write_slots(encoded, rows(config), lambda image: order(config, image))
  length = len(slots)
  if _plain(slots):
    ends = np.where(np.arange(length) < (cut := int(rng.integers(0, length))), cut, 0)
  else:
    ends = prefix_ends(slots)
  window = config.llm.window if config.llm.global_every > 1 else 0
  if 0 < window < (prefix := int(ends.max(initial=0))):
    raise UsageError(f"document {encoded.key} has a prefix of {prefix} slots, which sees itself "
                     f"whole, but local layers see config.llm.window = {window} slots back; set it "
                     "to 0, or shorten the document")
  # A target inside the prefix has been seen by the slot that predicts it.
  seen = ends > np.arange(length) + 1
  slots = dataclasses.replace(slots, weight=np.where(seen, 0, slots.weight).astype(np.float32))
  return assemble(encoded, slots, masks.see_until(masks.causal(length), ends), config)


def prefix_ends(slots: Slots) -> np.ndarray:
  """i32[T], the end of the prefix of the slot's branch for slots inside it, else 0."""
  ends = np.zeros(len(slots), np.int32)
  for branch in np.unique(slots.branch):
    mine = np.flatnonzero(slots.branch == branch)
    predicted = np.flatnonzero(slots.predicted[mine])
    end = mine[predicted[0]] if len(predicted) else mine[-1] + 1
    ends[mine[mine < end]] = end
  return ends


def _plain(slots: Slots) -> bool:
  """Whether a document is nothing but text to predict (its first token never is)."""
  return not slots.image.any() and not slots.branch.any() and bool(slots.predicted[1:].all())
