"""Encoded prompts to the arrays of one compiled call.

The strategy itself lays them out, so a prompt is masked exactly as it was in training.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core import batch as batches
from vlm_jax.core.document import Encoded
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.layout import Layout, heard, streams_of


@dataclasses.dataclass(frozen=True)
class Prompts:
  """B rows, one document each.

  Attributes:
    flat: path to array [B,...], the axes of streams padded on the right.
    ends: i32[B,J], the last slot of each of the J open turns of a row, in the stream that speaks;
      -1: none.
  """

  flat: dict[str, np.ndarray]
  ends: np.ndarray


def layouts(encoded: Sequence[Encoded], config: ConfigDict) -> list[Layout]:
  """Lays prompts out. A prompt has nothing to draw: its generator is the same for all.

  Raises:
    UsageError: the strategy says nothing, or as its `layout`.
  """
  module = find_fusion(config)
  if not module.STREAM:
    raise UsageError(f"config.fusion.name '{config.fusion.name}' compares pictures with texts and "
                     "says nothing; ask it by `vlm-jax evaluate` with kind 'zero_shot' or "
                     "'retrieval'")
  return [module.layout(document, config, np.random.default_rng(0)) for document in encoded]


def open_ends(layout: Layout, stream: str) -> np.ndarray:
  """i32[j], the slots from which a prompt goes on: the last of every branch, or of the trunk.

  Args:
    layout: of a prompt.
    stream: the stream that speaks.
  """
  length = layout.sizes[stream]
  classes = layout.arrays.get(f"masks/{stream}/q_class", np.zeros(length, np.int32))
  branches = np.unique(classes[classes > 0])
  if not branches.size:
    return np.array([length - 1], np.int32)
  return np.array([np.flatnonzero(classes == branch)[-1] for branch in branches], np.int32)


def slots(layout: Layout) -> int:
  """How many slots a document takes in all streams."""
  return sum(len(array) for path, array in layout.arrays.items()
             if path.startswith("streams/") and path.endswith("/tokens"))


def by_length(documents: Sequence[Layout], size: int) -> list[list[int]]:
  """Indices of documents of about equal length, `size` at a time."""
  order = sorted(range(len(documents)), key=lambda index: slots(documents[index]))
  return [order[start : start + size] for start in range(0, len(order), size)]


def stack(
  documents: Sequence[Layout], config: ConfigDict, *, rows: int, bucket: int, turns: int = 1
) -> Prompts:
  """Puts each document into its own row, without what the stream that speaks does not hear.

  Args:
    documents: layouts of prompts.
    config: of the run.
    rows: B; missing documents become empty rows.
    bucket: the length of a row is the longest document rounded up to a multiple of this, which
      bounds the number of programs compiled.
    turns: the number of open turns of a row is rounded up to a multiple of this.

  Raises:
    UsageError: more documents than rows.
  """
  if len(documents) > rows:
    raise UsageError(f"{len(documents)} prompts do not fit into {rows} rows")
  module = find_fusion(config)
  fields = heard(module.fields(config), module.STREAM)
  axes = {
    axis: max(document.sizes.get(axis, 0) for document in documents)
    for axis in {field.axis for field in fields.values()}
  }
  for stream in streams_of(fields):
    axes[stream] = -(-max(axes[stream], 1) // bucket) * bucket
  flat = batches.empty(fields, axes, rows)
  ends = [open_ends(document, module.STREAM) for document in documents]
  wide = -(-max(map(len, ends)) // turns) * turns
  table = np.full((rows, wide), -1, np.int32)
  for row, (document, end) in enumerate(zip(documents, ends, strict=True)):
    table[row, : len(end)] = end
    for path in fields:
      values = document.arrays[path]
      flat[path][row, : len(values)] = values
  # Rows without any media run without the tower.
  flat = {path: values for path, values in flat.items() if values.shape[1]}
  return Prompts(flat, table)
