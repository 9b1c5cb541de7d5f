"""How well a text belongs to a picture, by strategies that compare the two."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from vlm_jax.core import batch as batches
from vlm_jax.core import stopping
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Encoded, Pixels, Tokens
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.typing import Array, Params


def of_branches(config: ConfigDict, params: Params, documents: Sequence[Encoded], rows: int
                ) -> list[tuple[np.ndarray, np.ndarray]]:
  """Scores the texts in the branches of documents with the pictures in their trunks.

  Args:
    config: of the run.
    params: the parameters.
    documents: one picture each, and branches of text; what else is in a trunk is not read.
    rows: of one compiled call.

  Returns:
    For each document the scores f64[branches] in order, and ones: what `likelihood.of_branches`
    returns, but for scores that are cosines, or what the model's `matching` says in log-odds.

  Raises:
    UsageError: a document that the strategy cannot lay out.
  """
  pairs, owners = [], []
  for number, document in enumerate(documents):
    shown = tuple(part for part in document.parts if isinstance(part, Pixels))
    branches: dict[int, tuple[Tokens, ...]] = {}
    for part in document.parts:
      if isinstance(part, Tokens) and part.branch:
        branches[part.branch] = (*branches.get(part.branch, ()), part)
    pairs += [Encoded((*shown, *own), document.source, document.key) for own in branches.values()]
    owners += [number] * len(branches)
  found = _scores(config, params, pairs, rows)
  each = [found[np.array(owners) == number] for number in range(len(documents))]
  return [(scores, np.ones(len(scores), np.int64)) for scores in each]


def _scores(config: ConfigDict, params: Params, pairs: list[Encoded], rows: int) -> np.ndarray:
  """f64[n] of n pairs, each in its own row."""
  module, frozen = find_fusion(config), FrozenConfigDict(config)
  fields: dict[str, Any] = module.fields(config)
  one = {field.axis: 1 for field in fields.values()}
  found = []
  for start in range(0, len(pairs), rows):
    stopping.point()
    chosen = pairs[start : start + rows]
    flat = batches.empty(fields, one, rows)
    for row, pair in enumerate(chosen):
      for path, values in module.layout(pair, config, np.random.default_rng(0)).arrays.items():
        flat[path][row] = values
    found.append(np.asarray(scores(frozen, params, flat), np.float64)[: len(chosen)])
  return np.concatenate(found)


def matches(config: ConfigDict, params: Params, pictures: Sequence[Encoded],
            texts: Sequence[Encoded], chosen: np.ndarray, rows: int) -> np.ndarray:
  """What the model's `matching` says of chosen pairs.

  Args:
    config: of the run.
    params: the parameters.
    pictures, texts: n documents of a picture each, m of a text.
    chosen: bool[n,m].
    rows: texts of one compiled call, in which their picture is seen once.

  Returns:
    The logits of belonging together f64[n,m], 0 where a pair is not chosen.
  """
  module, frozen = find_fusion(config), FrozenConfigDict(config)
  fields = module.fields(config)
  lay_out = lambda one: module.layout(one, config, np.random.default_rng(0)).arrays
  told, found = [lay_out(text) for text in texts], np.zeros(chosen.shape)
  one = {field.axis: 1 for field in fields.values()}
  for number, picture in enumerate(pictures):
    shown, columns = lay_out(picture), np.flatnonzero(chosen[number])
    for start in range(0, len(columns), rows):
      stopping.point()
      some = columns[start : start + rows]
      flat = batches.empty(fields, one, rows)
      for path in flat:
        if path.startswith("media/"):
          flat[path] = shown[path][None]
        else:
          flat[path][: len(some)] = [told[column][path] for column in some]
      found[number, some] = np.asarray(_matching(frozen, params, flat))[: len(some), 1]
  return found


@functools.partial(jax.jit, static_argnames="config")
def _matching(config: FrozenConfigDict, params: Params, flat: dict[str, Array]) -> Array:
  """f32[B,2] of the texts of a batch that has one in every row."""
  model = find_fusion(config).Model(config)
  return model.apply({"params": params}, from_flat(flat), method="matching")[:, 0]


@functools.partial(jax.jit, static_argnames="config")
def scores(config: FrozenConfigDict, params: Params, flat: dict[str, Array]) -> Array:
  """f32[B] of the pairs of a batch that has one in every row."""
  model, batch = find_fusion(config).Model(config), from_flat(flat)
  if hasattr(model, "matching"):
    told = _matching(config, params, flat)
    return told[:, 1] - told[:, 0]
  output = model.apply({"params": params}, batch)
  # A picture may have a vector for every query, of which the nearest counts (BLIP-2).
  image = output.image.reshape(len(output.text), -1, output.text.shape[-1])
  return jnp.einsum("bke,be->bk", image, output.text[:, 0]).max(axis=1)
