"""log p of the tokens that a layout predicts: what perplexity and multiple choice are made of."""

import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from vlm_jax.core.batch import from_flat
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.layout import Layout
from vlm_jax.core.typing import Array, Params
from vlm_jax.generate.prompts import by_length, stack
from vlm_jax.ops.losses import token_log_likelihoods

BUCKET = 128  # rows are padded to a multiple of this, so that few programs are compiled
OBJECTIVE = "lm"


@functools.partial(jax.jit, static_argnames="config")
def log_likelihoods(config: FrozenConfigDict, params: Params, flat: dict[str, Array]) -> Array:
  """log p(target), f32[B,T], of the slots of a batch that have a loss, 0 elsewhere."""
  batch, module = from_flat(flat), find_fusion(config)
  output = module.Model(config).apply({"params": params}, batch)
  stream = batch.streams[module.STREAM]
  wanted = stream.loss_weights[OBJECTIVE] > 0
  return token_log_likelihoods(output.hidden, output.head, stream.targets, wanted)


def of_layouts(
  config: ConfigDict, params: Params, laid_out: Sequence[Layout], rows: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
  """Scores documents, `rows` of about equal length at a time.

  Args:
    config: of the run.
    params: the parameters.
    laid_out: documents.
    rows: of one compiled call.

  Yields:
    (number of the document, log p f32[t] of its slots in the stream that speaks, bool[t] which of
    them are predicted), in the order of their lengths.
  """
  frozen, stream = FrozenConfigDict(config), find_fusion(config).STREAM
  for chosen in by_length(laid_out, rows):
    flat = stack([laid_out[i] for i in chosen], config, rows=rows, bucket=BUCKET).flat
    log_p = np.asarray(log_likelihoods(frozen, params, flat))
    for row, index in enumerate(chosen):
      size = laid_out[index].sizes[stream]
      weight = flat[f"streams/{stream}/loss_weights/{OBJECTIVE}"][row, :size]
      yield index, log_p[row, :size], weight > 0
