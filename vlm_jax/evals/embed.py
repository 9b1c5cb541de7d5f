"""Embeddings of pictures and of texts, by strategies that compare them."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from vlm_jax.core import batch as batches
from vlm_jax.core import stopping
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Encoded
from vlm_jax.core.fusion import Embeddings, embeddings_of, find_fusion
from vlm_jax.core.layout import streams_of
from vlm_jax.core.typing import Array, Params


@functools.partial(jax.jit, static_argnames="config")
def embeddings(config: FrozenConfigDict, params: Params, flat: dict[str, Array]) -> Embeddings:
  """Those of a batch; one that lacks the arrays of pictures or of texts runs without that tower."""
  output = find_fusion(config).Model(config).apply({"params": params}, from_flat(flat))
  return embeddings_of(output)


def images(config: ConfigDict, params: Params, documents: Sequence[Encoded], rows: int
           ) -> np.ndarray:
  """Unit vectors f32[n,E] of the pictures of n documents that have one each.

  Args:
    config: of the run.
    params: the parameters.
    documents: a picture each.
    rows: of one compiled call.

  Raises:
    UsageError: a document that the strategy cannot lay out.
  """
  return of(config, params, documents, rows, "media").image


def texts(config: ConfigDict, params: Params, documents: Sequence[Encoded], rows: int
          ) -> np.ndarray:
  """Unit vectors f32[n,E] of the texts of n documents; arguments and errors as `images`."""
  return of(config, params, documents, rows, "documents").text


def of(config: ConfigDict, params: Params, documents: Sequence[Encoded], rows: int, kind: str
       ) -> Embeddings:
  """The embeddings f32[n,E] of one kind, "media" or "documents" (all but media), with the scale and
  bias of the model; each document in its own row. Arguments and errors as `images`.
  """
  module, frozen = find_fusion(config), FrozenConfigDict(config)
  fields = {path: field for path, field in module.fields(config).items()
            if (path.split("/")[0] == "media") == (kind == "media")}
  one = {field.axis: 1 for field in fields.values()}
  lay_out = lambda document: module.layout(document, config, np.random.default_rng(0))
  for stream in streams_of(fields):
    one[stream] = max(lay_out(document).sizes[stream] for document in documents)
  found = []
  for start in range(0, len(documents), rows):
    stopping.point()
    chosen = documents[start : start + rows]
    flat = batches.empty(fields, one, rows)
    for row, document in enumerate(chosen):
      for path, values in lay_out(document).arrays.items():
        if path in fields:
          flat[path][row, : len(values)] = values
    found.append((jax.device_get(embeddings(frozen, params, flat)), len(chosen)))
  join = lambda part: None if getattr(found[0][0], part) is None else np.concatenate(
    [getattr(out, part)[:count, 0] for out, count in found])
  return Embeddings(join("image"), join("text"), found[0][0].scale, found[0][0].bias)
