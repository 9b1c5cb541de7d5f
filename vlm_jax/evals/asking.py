"""Questions answered in words, greedily, each as if asked alone.

A fan-out document keeps its questions side by side in one row: each sees the image and itself and
none of its siblings, so its answer is the one it would get alone, and the image costs once.
Controls ask the same questions without the image and with another image of the split: a score
means something only beside them.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core.document import Document, Encoded
from vlm_jax.core.typing import Params
from vlm_jax.data import template
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.evals.questions import Question, cut, questions_of
from vlm_jax.evals.reading import BUCKET, Split, check, with_controls
from vlm_jax.generate.decode import generate
from vlm_jax.generate.prompts import by_length, layouts, stack

WINDOW = 32  # batches whose prompts are sorted by length together

Prompt = tuple[Encoded, list[Question]]
Score = Callable[[list[dict], int], dict[str, Any]]
Prompts = Callable[[Document, Split, ConfigDict], list[Prompt]]


def alone(document: Document, split: Split, entry: ConfigDict) -> list[Prompt]:
  """Every question of a document, at most `entry.together` of them in one row."""
  return [(template.encode_prompt(piece, split.tokenizer, split.decode_image), questions_of(piece))
          for piece in cut(document, entry.together)]


def run(
  config: ConfigDict,
  params: Params,
  entry: ConfigDict,
  split: str,
  score: Score,
  prompts: Callable[[], Prompts] = lambda: alone,
) -> tuple[dict[str, Any], dict[str, list[dict]]]:
  """Asks every question as `entry.images` says, then with each control, and scores the answers.

  Args:
    config: of the run.
    params: the parameters.
    entry: one of `config.evals`.
    split: which split is read.
    score: rows and a seed to numbers; may write scores into the rows.
    prompts: makes, for every way of asking, what turns a document into prompts.

  Returns:
    Numbers and predictions as of `with_controls`.

  Raises:
    UsageError: a field of the entry that cannot be.
    DataError: as in `ask`.
  """
  check(entry, "batch", "together", "max_tokens")

  def measure(images: str) -> tuple[dict[str, Any], list[dict], int]:
    rows, bad = ask(config, params, entry, split, images, prompts())
    return score(rows, config.seed), rows, bad

  return with_controls(entry, measure)


def ask(
  config: ConfigDict,
  params: Params,
  entry: ConfigDict,
  split: str,
  images: str,
  prompts: Prompts = alone,
) -> tuple[list[dict], int]:
  """Asks every question of a split once.

  Args:
    config, params, entry, split: as in `run`.
    images: "real", "none" or "shuffled".
    prompts: a document to its prompts.

  Returns:
    {"key", "document", "question", "prediction", "answers", "log_prob"} for every question in the
    order of the split, and the number of documents that could not be read.

  Raises:
    DataError: too many documents cannot be read, or there is no question.
  """
  opened = Split(config, entry, split, images)
  stream: Iterator[Prompt] = itertools.chain.from_iterable(
    asked for _, _, asked in opened.examples(lambda document: prompts(document, opened, entry)))
  rows: list[dict] = []
  while window := list(itertools.islice(stream, WINDOW * entry.batch)):
    rows += _answers(config, params, entry, opened.tokenizer, window)
  if not rows:
    raise opened.nothing("usable question")
  return rows, opened.bad


def _answers(
  config: ConfigDict,
  params: Params,
  entry: ConfigDict,
  tokenizer: Tokenizer,
  prompts: list[Prompt],
) -> list[dict]:
  """The predictions of some prompts, in their order."""
  laid_out = layouts([encoded for encoded, _ in prompts], config)
  out: list[list[dict]] = [[] for _ in prompts]
  turns = entry.together if any(encoded.branched for encoded, _ in prompts) else 1
  for chosen in by_length(laid_out, entry.batch):
    batch = stack([laid_out[i] for i in chosen], config, rows=entry.batch, bucket=BUCKET,
                  turns=turns)
    said = generate(config, params, batch, max_tokens=entry.max_tokens, stop=tokenizer.stops)
    tokens, lengths = np.asarray(said.tokens), np.asarray(said.lengths)
    log_probs = np.asarray(said.log_probs).sum(-1)
    for row, index in enumerate(chosen):
      for turn, question in enumerate(prompts[index][1]):
        text = tokenizer.decode(tokens[row, turn, : lengths[row, turn]]).strip()
        out[index].append({
          "key": question.key, "document": question.document, "question": question.text,
          "prediction": text,
          "answers": question.answers,  # the object itself: captions gather references in it
          "log_prob": float(log_probs[row, turn]),
        })
  return [record for records in out for record in records]
