"""What BLIP-2's first stage says of a picture, under the mask of its third objective (itg).

The Q-Former of `blip2_qformer.py`, which names this file as its voice: the parameters are those
that are trained there (arXiv:2301.12597, section 3.2). Queries see one another and the text sees
them, so their keys are computed once and it follows word by word (q query, d the text, which opens
with a mark of its own and whose positions start there):

          q q d d d
        q 1 1 . . .
        q 1 1 . . .
        d 1 1 1 . .
        d 1 1 1 1 .
        d 1 1 1 1 1

Only words are said and only queries see the picture, so a row holds one document: the slots of the
queries have to be the first of all rows. Nothing is packed.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vlm_jax.connectors import qformer
from vlm_jax.core import mask as masks
from vlm_jax.core.batch import Batch
from vlm_jax.core.document import Encoded, Pixels, Tokens
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import Cache, Output, Stage, find_tower
from vlm_jax.core.layout import IGNORE, Field, Layout, image_fields, stream_fields
from vlm_jax.core.precision import precision
from vlm_jax.core.typing import Array
from vlm_jax.fusion.blip2_qformer import SMOOTHING, Caption, check
from vlm_jax.fusion.concat import STREAM, image_arrays, order, rows, source_id, weights
from vlm_jax.nn.model import Configured
from vlm_jax.ops.losses import cross_entropy_sums

__all__ = ["RUNS", "STAGES", "STREAM", "Model", "axes", "empty_cache", "fields", "layout", "losses",
           "order", "rows", "weights"]

STAGES = (Stage("all", (".*",)),)
RUNS = ("connector/layers",)


def axes(config: ConfigDict) -> dict[str, int]:
  """Capacities of a row: one picture, its queries and one text."""
  queries = len(rows(config))
  return {STREAM: queries + config.llm.positions, "images": 1, "table": queries, "documents": 1}


def fields(config: ConfigDict) -> dict[str, Field]:
  """Queries and text in one stream, and the picture."""
  side = config.tower.image_size
  return stream_fields(STREAM, ("lm",), False) | image_fields(side, side)


def layout(encoded: Encoded, config: ConfigDict, rng: np.random.Generator) -> Layout:
  """The queries of the picture, then all text; one that is too long keeps its last token.

  Raises:
    UsageError: anything but one picture and text behind it, a picture in tiles or with a grid of
      its own, or a source that the config does not have.
  """
  del rng  # nothing here is random
  first = encoded.parts[0] if encoded.parts else None
  if not isinstance(first, Pixels) or len(encoded.images) > 1 or encoded.branched:
    raise UsageError(f"document {encoded.key}: config.fusion.name '{config.fusion.name}' says one "
                     "text behind one picture; set a form that captions pictures, and no images or "
                     "controls 'none'")
  filled, (ids, predicted) = order(config, first), said(encoded, config)
  queries, length = len(filled), len(filled) + len(ids)
  mask = masks.prefix(length, queries)
  before = lambda value, text, dtype=np.int32: np.concatenate(
    [np.broadcast_to(value, queries), text]).astype(dtype)
  arrays = image_arrays(encoded, config) | {
    f"streams/{STREAM}/tokens": before(0, ids),
    f"streams/{STREAM}/targets": np.append(before(0, ids)[1:], np.int32(0)),
    f"streams/{STREAM}/fill": before(filled, np.full(len(ids), IGNORE)),
    f"streams/{STREAM}/positions": before(0, np.arange(len(ids))),
    f"streams/{STREAM}/segment_ids": np.ones(length, np.int32),
    f"streams/{STREAM}/source_ids": np.full(length, source_id(encoded, config), np.int32),
    f"streams/{STREAM}/loss_weights/lm": before(
      0, np.append(predicted, False), np.float32)[1:],
    f"masks/{STREAM}/lo": mask.lo, f"masks/{STREAM}/hi": mask.hi,
  }
  sizes = {STREAM: length, "images": 1, "table": queries, "documents": 1}
  return Layout(arrays, sizes, encoded.source, encoded.key)


def said(encoded: Encoded, config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
  """All text, what opens it replaced by config.fusion.start: ids i32[n], and what is predicted."""
  texts = [part for part in encoded.parts if isinstance(part, Tokens)]
  join = lambda name, dtype: np.concatenate(
    [np.zeros(0, dtype), *(getattr(part, name) for part in texts)]).astype(dtype)
  ids, predicted, most = join("ids", np.int32), join("loss", bool), config.llm.positions
  kept = max(len(np.trim_zeros(ids, "b")), 1)  # captions of published tokenizers are padded
  ids, predicted = np.resize(ids, kept), np.resize(predicted, kept)
  if kept > most:
    ids, predicted = (np.append(part[: most - 1], part[-1]) for part in (ids, predicted))
  ids[0], predicted[0] = config.fusion.start, False
  return ids, predicted


def losses(output: Output, batch: Batch, config: ConfigDict) -> dict[str, Array]:
  """lm: what the first stage calls itg, sums f32[sources]."""
  stream = batch.streams[STREAM]
  return {"lm": cross_entropy_sums(
    output.hidden, output.head, stream.targets, stream.loss_weights["lm"], stream.source_ids,
    len(config.data.sources), soft_cap=output.soft_cap, smoothing=SMOOTHING)}


def empty_cache(config: ConfigDict, rows: int, columns: int, dtype: Any) -> Cache:
  """A cache of the Q-Former's S = `columns` slots with nothing in it; like all of it in f32."""
  del dtype
  k, v = zip(*qformer.columns(config.connector, rows, columns), strict=True)
  return Cache(k, v, jnp.zeros((), jnp.int32))


class Model(Configured):
  """Tower, Q-Former and the head that says words."""

  def setup(self):
    config, dtypes = self.config, precision(self.config)
    check(config)
    self.tower = find_tower(config).Model(config.tower, config.attention, dtypes)
    self.connector = qformer.Model(config.connector, config.fusion.width, dtypes)
    self.caption = Caption(config.connector, dataclasses.replace(dtypes, compute=jnp.float32))

  def __call__(self, batch: Batch, *, rng: Array | None = None, cache: Cache | None = None
               ) -> Output:
    """Runs rows of one document.

    Args:
      batch: stream "text" and its mask; media "images", unless the cache has the queries.
      rng: unused, the model has no randomness.
      cache: keys and values of the slots before these, see `empty_cache`.

    Returns:
      hidden f32[B,T,D+1], one per slot, queries included, and head f32[D+1,V].
    """
    del rng
    stream, features = batch.streams[STREAM], None
    x = self.connector.spell(stream.tokens, stream.positions)
    if "images" in batch.media:
      patches = self.tower(batch.media["images"].values).patches
      features, queries = patches.reshape(-1, *patches.shape[2:]), self.connector.ask(len(x))
      x = jnp.concatenate([queries, x[:, queries.shape[1] :]], axis=1)
    given = None
    if cache is not None:
      given = tuple(zip(cache.k, cache.v, strict=True)), cache.length
    x, columns = self.connector.read(x, batch.masks[STREAM], features, given)
    if cache is not None:
      cache = Cache(*zip(*columns, strict=True), cache.length + x.shape[1])
    return Output(*self.caption(x, self.connector.words), cache)
