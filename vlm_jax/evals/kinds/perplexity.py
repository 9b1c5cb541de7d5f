"""Perplexity: how surprised the model is by the tokens that training would have it say."""

import time
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core.document import Document, Encoded
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.layout import Layout
from vlm_jax.core.layout import split as split_document
from vlm_jax.core.typing import Params
from vlm_jax.data import template
from vlm_jax.evals.bootstrap import interval
from vlm_jax.evals.likelihood import of_layouts
from vlm_jax.evals.reading import Split, check

MAIN, UNIT = "perplexity", "tokens"


def windows(config: ConfigDict, opened: Split) -> list[tuple[str, Layout]]:
  """The documents of a split as trained, cut into windows of a row: (key of the document, layout).

  The generator of a document depends on the seed and its number alone, so two models are asked for
  the same tokens.
  """
  data, module = config.data, find_fusion(config)
  slots = lambda image: len(module.order(config, image))

  def encode(document: Document) -> list[Encoded]:
    encoded = template.encode(document, opened.tokenizer, opened.decode_image)
    capacity = data.tokens if encoded.images else min(data.window or data.tokens, data.tokens)
    return split_document(encoded, capacity, slots, data.images)

  out: list[tuple[str, Layout]] = []
  for index, document, pieces in opened.examples(encode):
    rng = np.random.default_rng([config.seed, index])
    out += [(document.key, module.layout(piece, config, rng)) for piece in pieces]
  return out


def run(config: ConfigDict, params: Params, entry: ConfigDict, split: str
        ) -> tuple[dict[str, Any], dict[str, list[dict]]]:
  """Measures one source.

  Args:
    config: of the run.
    params: the parameters.
    entry: one of `config.evals`.
    split: which split is read.

  Returns:
    The numbers {"perplexity", "low", "high", "loss", "tokens", "documents", "bad", "seconds"}:
    perplexity is exp(loss), loss the mean of -log p in nats per predicted token, low and high its
    95% interval over documents. No predictions.

  Raises:
    UsageError: a field of the entry that cannot be.
    DataError: no token to predict, or too many documents cannot be read.
  """
  check(entry, "batch")
  start = time.perf_counter()
  opened = Split(config, entry, split, entry.images)
  pairs = windows(config, opened)
  losses, groups = [], []
  for index, log_p, predicted in of_layouts(config, params, [one for _, one in pairs],
                                            entry.batch):
    losses.append(-log_p[predicted])
    groups += [pairs[index][0]] * len(losses[-1])
  if not groups:
    raise opened.nothing("token to predict")
  values = np.concatenate(losses).astype(np.float64)
  low, high = interval(values, groups=np.array(groups), seed=config.seed)
  numbers = {
    "images": entry.images,
    "perplexity": float(np.exp(values.mean())),
    "low": float(np.exp(low)),
    "high": float(np.exp(high)),
    "loss": float(values.mean()),
    "tokens": len(values),
    "documents": len(set(groups)),
    "bad": opened.bad,
    "seconds": time.perf_counter() - start,
  }
  return numbers, {}
