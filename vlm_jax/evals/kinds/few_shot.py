"""Few-shot questions: each stands behind solved ones, all in one interleaved document.

A shot is a document with its answer, pictures and all, so any strategy that reads several pictures
can be asked. `shots` are the numbers of them, each asked in turn; `choose` says which they are:

  random   documents of split `shots_split`, other ones for every question
  similar  of that split those whose pictures are most like the question's, by the cosine of the
           mean feature of the tower, the most similar last (RICES: arXiv:2109.05014, and
           arXiv:2204.14198, which orders them so)
  own      the answered turns before the last question of the document itself, the last of them

A model may gain from shots because they show what an answer looks like. The control
"shuffled_shots" keeps pictures, questions and answers, but permutes the answers among the shots at
random: what is left of the gain is not learned from which answer belongs to which picture.
"""

import dataclasses
import functools
import zlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from vlm_jax.core import stopping
from vlm_jax.core.document import Document, Text, Visual
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.fusion import find_tower
from vlm_jax.core.precision import precision
from vlm_jax.core.typing import Array, Params
from vlm_jax.data import template
from vlm_jax.data.bad import BadExample
from vlm_jax.evals import asking
from vlm_jax.evals.kinds import vqa
from vlm_jax.evals.questions import questions_of
from vlm_jax.evals.reading import Split, check, with_controls

MAIN, UNIT = "accuracy", "questions"
CHOICES = ("random", "similar", "own")
SHUFFLED = "shuffled_shots"
CANDIDATES = 1024  # documents that shots are chosen among, evenly spaced in their split


def run(config: ConfigDict, params: Params, entry: ConfigDict, split: str
        ) -> tuple[dict[str, Any], dict[str, list[dict]]]:
  """Asks every question behind each number of shots, then with each control.

  Args:
    config: of the run.
    params: the parameters.
    entry: one of `config.evals`; among its controls may be "shuffled_shots".
    split: which split is asked.

  Returns:
    The numbers of `vqa.score` with the most shots, and "accuracy@K", "low@K", "high@K" for every
    number K of them; "bad", "seconds", "controls". The predictions are those with the most shots,
    with "score@K" and "prediction@K" of every K.

  Raises:
    UsageError: a field of the entry that cannot be, or documents that are no plain questions.
    DataError: too many documents cannot be read, or there is no question or no shot.
  """
  check(entry, "batch", "max_tokens")
  counts = sorted(set(entry.shots))
  if not counts or not all(isinstance(count, int) and count >= 0 for count in counts):
    raise UsageError(f"config.evals: shots is {tuple(entry.shots)}; write whole numbers, 0 or more")
  if entry.choose not in CHOICES:
    raise UsageError(f"config.evals: choose is '{entry.choose}'; {nearest(entry.choose, CHOICES)}")

  def measure(control: str) -> tuple[dict[str, Any], list[dict], int]:
    images = entry.images if control == SHUFFLED else control
    shots = Shots(config, params, entry, images, control == SHUFFLED)
    return _asked(config, params, entry, split, images, shots, counts)

  return with_controls(entry, measure)


def _asked(config: ConfigDict, params: Params, entry: ConfigDict, split: str, images: str,
           shots: "Shots", counts: list[int]) -> tuple[dict[str, Any], list[dict], int]:
  """Numbers, rows and bad documents of one way of asking; all `counts` of shots."""
  numbers: dict[str, Any] = {}
  rows: list[dict] = []
  for count in counts:
    before, (rows, bad) = rows, asking.ask(config, params, entry, split, images,
                                           functools.partial(shots.prompts, count))
    found = vqa.score(rows, config.seed)
    numbers |= found | {f"{name}@{count}": found[name] for name in ("accuracy", "low", "high")}
    for row in rows:
      row |= {f"score@{count}": row["score"], f"prediction@{count}": row["prediction"]}
    for row, earlier in zip(rows, before, strict=False):
      row |= {name: value for name, value in earlier.items() if "@" in name}
  return numbers, rows, bad


class Shots:
  """What stands before a question."""

  def __init__(self, config: ConfigDict, params: Params, entry: ConfigDict, images: str,
               shuffled: bool):
    """Reads what shots are chosen among.

    Args:
      config, params, entry: as in `run`.
      images: "real", "none" or "shuffled", of shots and questions.
      shuffled: whether the answers of the shots are permuted.
    """
    self._config, self._params, self._entry, self._shuffled = config, params, entry, shuffled
    self._candidates: list[Document] = []
    self._features = np.zeros((0, 0), np.float32)
    if entry.choose == "own":
      return
    opened = Split(config, entry, entry.shots_split, images, spaced=CANDIDATES)

    def encode(document: Document) -> None:
      turns(document)
      template.encode(document, opened.tokenizer, opened.decode_image)

    self._candidates = [document for _, document, _ in opened.examples(encode)]
    if entry.choose == "similar":
      self._features = self._look(self._candidates, opened)

  def prompts(self, count: int, document: Document, opened: Split, entry: ConfigDict
              ) -> list[asking.Prompt]:
    """The question of a document behind `count` shots.

    Raises:
      UsageError: the document is a fan-out document, or there are not so many shots.
      BadExample: the question cannot be encoded.
    """
    question, own = turns(document)[-1], turns(document)[:-1]
    rng = np.random.default_rng([self._config.seed, zlib.crc32(document.key.encode())])
    if entry.choose == "own":
      shots = own[len(own) - count :] if count <= len(own) else None
    else:
      question = document.parts
      chosen = self._chosen(count, document, opened, rng)
      shots = None if len(chosen) < count else [one.parts for one in chosen]
    if shots is None:
      raise UsageError(f"config.evals: shots asks for {count}, more than there are for document "
                       f"{document.key}; lower it, or choose another shots_split")
    shots = shuffle(shots, rng) if self._shuffled else shots
    parts = (*(part for shot in shots for part in shot), *question)
    asked = dataclasses.replace(document, parts=parts)
    encoded = template.encode_prompt(asked, opened.tokenizer, opened.decode_image)
    return [(encoded, questions_of(asked))]

  def _chosen(self, count: int, document: Document, opened: Split, rng: np.random.Generator
              ) -> list[Document]:
    """Documents of other records than the question's, each record once, the nearest one last."""
    order = rng.permutation(len(self._candidates))
    if self._entry.choose == "similar" and count:
      mine = self._look([document], opened)[0]
      order = order[np.argsort(-(self._features[order] @ mine), kind="stable")]
    chosen: dict[str, Document] = {}
    for index in order:
      record = self._candidates[index].key.split("?")[0]
      if len(chosen) < count and record != document.key.split("?")[0]:
        chosen.setdefault(record, self._candidates[index])
    return list(chosen.values())[::-1]

  def _look(self, documents: list[Document], opened: Split) -> np.ndarray:
    """Unit vectors f32[n,D] of the documents' first pictures."""
    first = [next((part for part in document.parts if isinstance(part, Visual)), None)
             for document in documents]
    if None in first:
      key = documents[first.index(None)].key
      raise UsageError(f"document {key} has no picture, and choose='similar' compares pictures; "
                       "leave 'none' out of images and controls, or use choose='random'")
    values = np.stack([opened.decode_image(image).values for image in first if image])
    config, rows = FrozenConfigDict(self._config), min(self._entry.batch, len(values))
    found = []
    for start in range(0, len(values), rows):
      stopping.point()
      shown = np.zeros((rows, *values.shape[1:]), values.dtype)
      count = len(values[start : start + rows])
      shown[:count] = values[start : start + rows]
      found.append(np.asarray(features(config, self._params["tower"], shown))[:count])
    return np.concatenate(found)


@functools.partial(jax.jit, static_argnames="config")
def features(config: FrozenConfigDict, params: Params, values: Array) -> Array:
  """Unit vectors f32[n,D], the mean patch of each picture u8[n,Height,Width,3]."""
  tower = find_tower(config).Model(config.tower, config.attention, precision(config))
  means = tower.apply({"params": params}, values[:, None]).patches[:, 0].mean(1)
  means = means.astype(jax.numpy.float32)
  return means / jax.numpy.linalg.norm(means, axis=-1, keepdims=True)


def turns(document: Document) -> list[tuple[Text | Visual, ...]]:
  """The parts of a plain document, cut behind every answer.

  Raises:
    UsageError: the document has branches.
  """
  found: list[tuple[Text | Visual, ...]] = []
  start = 0
  for number, part in enumerate(document.parts, 1):
    if getattr(part, "branch", 0):
      raise UsageError(f"document {document.key} asks in branches, and shots stand before one "
                       "question; set the evaluation's form to one that asks one at a time")
    if isinstance(part, Text) and part.role in ("assistant", "text"):
      found.append(document.parts[start:number])
      start = number
  if start < len(document.parts) or not found:
    raise BadExample("unknown_role", f"{document.key}: the last part is not an answer")
  return found


def shuffle(shots: list[tuple[Text | Visual, ...]], rng: np.random.Generator
            ) -> list[tuple[Text | Visual, ...]]:
  """The shots with their last texts permuted at random."""
  answers = [shots[index][-1] for index in rng.permutation(len(shots))]
  return [(*shot[:-1], dataclasses.replace(shot[-1], text=answer.text))
          for shot, answer in zip(shots, answers, strict=True)]
