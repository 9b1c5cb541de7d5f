"""Perplexity: how surprised the model is by the tokens that training would have it say."""

import functools
import time

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from vlm_jax.core.batch import from_flat
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.layout import Layout
from vlm_jax.core.layout import split as split_document
from vlm_jax.core.typing import Array, Params
from vlm_jax.data import pipeline, template
from vlm_jax.data.bad import Bad, BadExample, Tally
from vlm_jax.evals.bootstrap import interval
from vlm_jax.generate.prompts import by_length, stack
from vlm_jax.ops.losses import token_log_likelihoods

BUCKET = 128
OBJECTIVE = "lm"


@functools.partial(jax.jit, static_argnames="config")
def log_likelihoods(config: FrozenConfigDict, params: Params, flat: dict[str, Array]) -> Array:
  """log p(target), f32[B,T], of the slots that have a loss, 0 at others."""
  batch, module = from_flat(flat), find_fusion(config)
  output = module.Model(config).apply({"params": params}, batch)
  stream = batch.streams[module.STREAM]
  wanted = stream.loss_weights[OBJECTIVE] > 0
  return token_log_likelihoods(output.hidden, output.head, stream.targets, wanted)


def documents(
  config: ConfigDict, entry: ConfigDict, split: str, tally: Tally
) -> list[tuple[str, Layout]]:
  """The documents of a split as trained, cut into windows of a row: (key of the document, layout).

  The generator of a document depends on the seed and its number alone, so two models are asked for
  the same tokens.
  """
  data, module = config.data, find_fusion(config)
  source = data.sources.get(entry.source)
  form = entry.form or (source.form if source else "")
  opened = pipeline.documents(config, entry.source, split, form, entry.images)
  tokenizer, decode_image = pipeline.load_tokenizer(config), pipeline.image_decoder(config)
  slots = len(module.rows(config))
  out: list[tuple[str, Layout]] = []
  for index in range(min(entry.limit or len(opened), len(opened))):
    document = opened[index]
    rng = np.random.default_rng([config.seed, index])
    try:
      encoded = template.encode(document, tokenizer, decode_image)
      tally.count([])
    except BadExample as error:
      tally.count(Bad(error.reason, document.key))
      continue
    capacity = data.tokens if encoded.images else min(data.window or data.tokens, data.tokens)
    for piece in split_document(encoded, capacity, slots, data.images):
      out.append((document.key, module.layout(piece, config, rng)))
  return out


def run(config: ConfigDict, params: Params, entry: ConfigDict, split: str) -> tuple[dict, dict]:
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
  if entry.batch < 1:
    raise UsageError(f"config.evals: batch is {entry.batch}; use 1 or more")
  start = time.perf_counter()
  tally = Tally(entry.source, config.data.bad_limit)
  pairs = documents(config, entry, split, tally)
  laid_out = [layout for _, layout in pairs]
  losses, groups, stream = [], [], find_fusion(config).STREAM
  for chosen in by_length(laid_out, entry.batch):
    flat = stack([laid_out[i] for i in chosen], config, rows=entry.batch, bucket=BUCKET).flat
    log_p = np.asarray(log_likelihoods(FrozenConfigDict(config), params, flat))
    weight = flat[f"streams/{stream}/loss_weights/{OBJECTIVE}"]
    for row, index in enumerate(chosen):
      mine = -log_p[row][weight[row] > 0]
      losses.append(mine)
      groups += [pairs[index][0]] * len(mine)
  if not groups:
    raise DataError(f"source '{entry.source}' has no token to predict in split '{split}' "
                    f"({tally.examples()}); choose another split")
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
    "bad": sum(tally.bad.values()),
    "seconds": time.perf_counter() - start,
  }
  return numbers, {}
