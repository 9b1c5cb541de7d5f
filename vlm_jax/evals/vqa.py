"""Visual question answering: every question asked alone, greedily, and scored.

A fan-out document keeps its questions side by side in one row: each sees the image and itself and
none of its siblings, so its answer is the one it would get alone, and the image costs once.
Controls ask the same questions without the image and with another image of the split: an accuracy
means something only beside them.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core.document import Document, Encoded
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.core.typing import Params
from vlm_jax.data import pipeline, template
from vlm_jax.data.bad import Bad, BadExample, Tally
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.evals.bootstrap import interval
from vlm_jax.evals.metrics.vqa import exact_match, vqa_accuracy
from vlm_jax.evals.questions import Question, cut, questions_of
from vlm_jax.generate.decode import generate
from vlm_jax.generate.prompts import by_length, layouts, stack

BUCKET = 64  # rows are padded to a multiple of this, so that few programs are compiled
WINDOW = 32  # batches whose prompts are sorted by length together


Prompt = tuple[Encoded, Document]


@dataclasses.dataclass(frozen=True)
class Score:
  """The numbers of one way of asking.

  Attributes:
    accuracy: VQA accuracy (official normalisation), a mean over questions.
    low, high: its 95% interval, images drawn again with replacement.
    exact_match: share of answers that are the truth letter by letter.
    questions: how many.
    bad: documents that could not be read.
    seconds: wall-clock time, compilation included.
  """

  accuracy: float
  low: float
  high: float
  exact_match: float
  questions: int
  bad: int
  seconds: float


def run(config: ConfigDict, params: Params, entry: ConfigDict, split: str) -> tuple[dict, dict]:
  """Asks every question as `entry.images` says, then with each control.

  Args:
    config: of the run.
    params: the parameters.
    entry: one of `config.evals`.
    split: which split is read.

  Returns:
    The numbers {"accuracy", ..., "controls": {images: {"accuracy", ...}}} and the predictions
    {"": rows, images: rows} to be written as JSON lines.

  Raises:
    UsageError: a field of the entry that cannot be.
    DataError: as in `ask`.
  """
  for field in ("batch", "together", "max_tokens"):
    if entry[field] < 1:
      raise UsageError(f"config.evals: {field} is {entry[field]}; use 1 or more")
  score, rows = ask(config, params, entry, split, entry.images)
  numbers: dict[str, Any] = {"images": entry.images, **dataclasses.asdict(score), "controls": {}}
  predictions = {"": rows}
  for images in entry.controls:
    if images == entry.images:
      continue
    score, predictions[images] = ask(config, params, entry, split, images)
    numbers["controls"][images] = dataclasses.asdict(score)
  return numbers, predictions


def ask(
  config: ConfigDict, params: Params, entry: ConfigDict, split: str, images: str
) -> tuple[Score, list[dict]]:
  """Asks every question of a split once.

  Args:
    config, params, entry, split: as in `run`.
    images: "real", "none" or "shuffled".

  Returns:
    The score, and {"key", "document", "question", "prediction", "answers", "score", "exact",
    "log_prob"} for every question in the order of the split.

  Raises:
    DataError: too many documents cannot be read, or there is no question.
  """
  start = time.perf_counter()
  source = config.data.sources.get(entry.source)
  form = entry.form or (source.form if source else "")
  documents = pipeline.documents(config, entry.source, split, form, images)
  count = min(entry.limit or len(documents), len(documents))
  tokenizer, decode_image = pipeline.load_tokenizer(config), pipeline.image_decoder(config)
  tally = Tally(entry.source, config.data.bad_limit)

  def prompts() -> Iterator[Prompt]:
    for index in range(count):
      document = documents[index]
      encode = lambda piece: template.encode_prompt(piece, tokenizer, decode_image)
      try:
        encoded = [(encode(piece), piece) for piece in cut(document, entry.together)]
        tally.count([])
      except BadExample as error:
        tally.count(Bad(error.reason, document.key))
        continue
      yield from encoded

  stream = prompts()
  rows: list[dict] = []
  while window := list(itertools.islice(stream, WINDOW * entry.batch)):
    rows += _answers(config, params, entry, tokenizer, window)
  if not rows:
    raise DataError(f"source '{entry.source}' has no usable question in split '{split}' "
                    f"({tally.examples()}); choose another split")
  scores = np.array([row["score"] for row in rows])
  low, high = interval(scores, groups=np.array([row["document"] for row in rows]), seed=config.seed)
  exact = float(np.mean([row["exact"] for row in rows]))
  bad, seconds = sum(tally.bad.values()), time.perf_counter() - start
  return Score(float(scores.mean()), low, high, exact, len(rows), bad, seconds), rows


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
    said = generate(config, params, batch, max_tokens=entry.max_tokens, stop=(tokenizer.eos,))
    tokens, lengths = np.asarray(said.tokens), np.asarray(said.lengths)
    log_probs = np.asarray(said.log_probs).sum(-1)
    for row, index in enumerate(chosen):
      for turn, question in enumerate(questions_of(prompts[index][1])):
        text = tokenizer.decode(tokens[row, turn, : lengths[row, turn]]).strip()
        out[index].append(_record(question, text, float(log_probs[row, turn])))
  return [record for records in out for record in records]


def _record(question: Question, prediction: str, log_prob: float) -> dict:
  return {
    "key": question.key,
    "document": question.document,
    "question": question.text,
    "prediction": prediction,
    "answers": list(question.answers),
    "score": vqa_accuracy(prediction, question.answers),
    "exact": exact_match(prediction, question.answers),
    "log_prob": log_prob,
  }
