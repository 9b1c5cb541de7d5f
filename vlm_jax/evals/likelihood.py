"""log p of the tokens that a layout predicts: perplexity, multiple choice, retrieval."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from vlm_jax.core import stopping
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Encoded
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.layout import Layout, streams_of
from vlm_jax.core.typing import Array, Params
from vlm_jax.generate.prompts import by_length, layouts, stack
from vlm_jax.ops.losses import token_log_likelihoods

# Rows are padded to a multiple of the first, short ones of the second: few programs are compiled,
# and the options of a small question are not mostly padding.
BUCKET, FINE = 128, 32
OBJECTIVE = "lm"


@functools.partial(jax.jit, static_argnames="config")
def log_likelihoods(config: FrozenConfigDict, params: Params, flat: dict[str, Array]) -> Array:
  """log p(target), f32[B,T], of the slots of a batch that have a loss, 0 elsewhere."""
  batch, module = from_flat(flat), find_fusion(config)
  output = module.Model(config).apply({"params": params}, batch)
  stream = batch.streams[module.STREAM]
  wanted = stream.loss_weights[OBJECTIVE] > 0
  return token_log_likelihoods(output.hidden, output.head, stream.targets, wanted,
                               soft_cap=output.soft_cap)


@functools.partial(jax.jit, static_argnames="config")
def logits(config: FrozenConfigDict, params: Params, flat: dict[str, Array]) -> Array:
  """f32[B,T,V] of every slot of a batch."""
  return find_fusion(config).Model(config).apply({"params": params}, from_flat(flat)).logits()


def logits_of_layouts(
  config: ConfigDict, params: Params, laid_out: Sequence[Layout], rows: int
) -> Iterator[tuple[int, np.ndarray]]:
  """Yields (number of the document, logits f32[t,V] of its slots); see `of_layouts`."""
  frozen, stream = FrozenConfigDict(config), find_fusion(config).STREAM
  for chosen in by_length(laid_out, rows):
    stopping.point()
    flat = _stacked([laid_out[i] for i in chosen], config, rows)
    found = np.asarray(logits(frozen, params, flat))
    for row, index in enumerate(chosen):
      yield index, found[row, : laid_out[index].sizes[stream]]


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
    stopping.point()
    flat = _stacked([laid_out[i] for i in chosen], config, rows)
    log_p = np.asarray(log_likelihoods(frozen, params, flat))
    for row, index in enumerate(chosen):
      size = laid_out[index].sizes[stream]
      weight = flat[f"streams/{stream}/loss_weights/{OBJECTIVE}"][row, :size]
      yield index, log_p[row, :size], weight > 0


def _stacked(laid_out: Sequence[Layout], config: ConfigDict, rows: int) -> dict[str, np.ndarray]:
  """The arrays of documents of about equal length, each in its own row."""
  streams = streams_of(laid_out[0].arrays)
  longest = max(layout.sizes[stream] for layout in laid_out for stream in streams)
  return stack(laid_out, config, rows=rows, bucket=FINE if longest <= BUCKET else BUCKET).flat


def of_branches(config: ConfigDict, params: Params, documents: Sequence[Encoded], rows: int
                ) -> list[tuple[np.ndarray, np.ndarray]]:
  """Scores what the branches of fan-out documents say, each as if it were the only one.

  Args:
    config: of the run; a strategy without branches is given every branch in a row of its own.
    params: the parameters.
    documents: with a loss in every branch; a plain one counts as a single branch.
    rows: of one compiled call.

  Returns:
    For each document the log p f64[branches] of its branches in order, and their tokens
    i64[branches].
  """
  module = find_fusion(config)
  classes = f"masks/{module.STREAM}/q_class"
  together = classes in module.fields(config)
  pieces = documents if together else [one for document in documents for one in _alone(document)]
  laid_out = layouts(pieces, config)
  found: list[Any] = [None] * len(pieces)
  for index, log_p, predicted in of_layouts(config, params, laid_out, rows):
    found[index] = _by_branch(laid_out[index].arrays.get(classes), log_p.astype(np.float64),
                              predicted)
  if together:
    return found
  supply = iter(found)
  return [tuple(np.concatenate(both) for both in
                zip(*(next(supply) for _ in _branches(document)), strict=True))
          for document in documents]


def _by_branch(classes: np.ndarray | None, log_p: np.ndarray, predicted: np.ndarray
               ) -> tuple[np.ndarray, np.ndarray]:
  """Sums over the predicted slots of every branch that has some; classes None: one branch."""
  branch = (np.zeros(len(log_p), np.int32) if classes is None else classes)[predicted]
  numbers = np.unique(branch)
  sums = np.array([log_p[predicted][branch == number].sum() for number in numbers])
  return sums, np.array([(branch == number).sum() for number in numbers])


def _branches(document: Encoded) -> list[int]:
  return sorted({part.branch for part in document.parts if getattr(part, "branch", 0)}) or [0]


def _alone(document: Encoded) -> list[Encoded]:
  """A plain document for every branch, with the trunk and without the siblings."""
  plain = lambda part: dataclasses.replace(part, branch=0) if hasattr(part, "branch") else part
  return [dataclasses.replace(document, parts=tuple(
    plain(part) for part in document.parts if getattr(part, "branch", 0) in (0, number)))
    for number in _branches(document)]
