"""easy-VQA: 5,000 pictures of one coloured shape and 48,248 questions about them.

Victor Zhou, github.com/vzhou842/easy-VQA, MIT. The files are read out of the installed package
`easy-vqa`; its code is never imported. The validation split is the 400 training images with the
smallest hash of their number, so it stays the same whatever else changes.

Forms:
  fan_out       one document an image: every question is a branch and is answered as if asked alone
  conversation  one document an image: the questions follow one another
  single        one document a question
  choice        one document a question: its possible answers are branches, the right one has loss
  caption       one document an image: "a red circle", where the answers tell colour and shape
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator

from vlm_jax.core.document import Image, Text
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.data.sources import Parts, Record

FORMS = ("fan_out", "conversation", "single", "choice", "caption")
LICENCE = "MIT (Victor Zhou, github.com/vzhou842/easy-VQA)"
PACKAGE = "easy-vqa"
VALIDATION = 400  # images
SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def prepare() -> dict[str, Iterable[Record]]:
  """Records {key, image: PNG bytes, questions: [[question, answer], ...]} of three splits.

  Raises:
    UsageError: the package is not installed.
    DataError: a file of it is missing or damaged.
  """
  spec = importlib.util.find_spec("easy_vqa")
  if spec is None or not spec.submodule_search_locations:
    raise UsageError("source easy_vqa: the package 'easy-vqa' is not installed; "
                     "run `pip install 'vlm_jax[quickstart]'`")
  root = os.path.join(list(spec.submodule_search_locations)[0], "data")
  train, test = _questions(root, "train"), _questions(root, "test")
  order = sorted(train, key=lambda number: hashlib.sha256(f"train/{number}".encode()).digest())
  held_out = set(order[:VALIDATION])
  return {
    "train": _records(root, "train", {n: q for n, q in train.items() if n not in held_out}),
    "validation": _records(root, "train", {n: q for n, q in train.items() if n in held_out}),
    "test": _records(root, "test", test),
  }


def _questions(root: str, folder: str) -> dict[int, list]:
  path = os.path.join(root, folder, "questions.json")
  try:
    with open(path, encoding="utf-8") as file:
      rows = json.load(file)
    grouped: dict[int, list] = {}
    for question, answer, number in rows:
      grouped.setdefault(int(number), []).append([question, answer])
  except (OSError, ValueError) as error:
    raise DataError(f"{path} cannot be read ({error}); reinstall the package 'easy-vqa'") from error
  return dict(sorted(grouped.items()))


def _records(root: str, folder: str, questions: dict[int, list]) -> Iterator[Record]:
  for number, pairs in questions.items():
    path = os.path.join(root, folder, "images", f"{number}.png")
    try:
      with open(path, "rb") as file:
        image = file.read()
    except OSError as error:
      raise DataError(f"{path} cannot be read ({error}); reinstall the package 'easy-vqa'"
                      ) from error
    yield {"key": f"{folder}/{number}", "image": image, "questions": pairs}


def texts(record: Record) -> Iterator[str]:
  """Questions and answers."""
  for pair in record["questions"]:
    yield from pair


def parts(record: Record, form: str) -> list[Parts]:
  """The documents of one image; see the module for the forms."""
  image = Image(record["image"])
  turns = lambda branch, pair: (
    Text(pair[0], "user", branch=branch), Text(pair[1], "assistant", loss=True, branch=branch)
  )
  pairs = record["questions"]
  if form == "caption":
    caption = _caption(pairs)
    return [(image, Text(caption, loss=True))] if caption else []
  if form == "choice":
    return [(image, *_choice(*pair)) for pair in pairs]
  if form == "single":
    return [(image, *turns(0, pair)) for pair in pairs]
  if form == "conversation":
    return [(image, *(part for pair in pairs for part in turns(0, pair)))]
  return [(image, *(part for k, pair in enumerate(pairs, 1) for part in turns(k, pair)))]


def _choice(question: str, answer: str) -> Parts:
  """The question with every answer that the data set has for questions of its sort."""
  options = next(words for words in (SHAPES, COLORS, ("yes", "no")) if answer in words)
  return tuple(part for k, option in enumerate(options, 1) for part in (
    Text(question, "user", branch=k),
    Text(option, "assistant", loss=option == answer, branch=k)))


def _caption(pairs: list) -> str:
  """What the questions and answers of an image say about it, "" when they leave something open.

  Only the training split of a run is ever captioned, and only from the answers in that split.
  """
  facts = []
  for words in (COLORS, SHAPES):
    known = {word for pair in pairs for word in words if _says(pair, word)}
    if len(known) != 1:
      return ""
    facts += known
  return f"a {' '.join(facts)}"


def _says(pair: list, word: str) -> bool:
  """Whether a question and its answer say that the image shows `word`."""
  question, answer = pair
  if answer == word:
    return True
  if word not in question.rstrip("?").split():
    return False
  negated = not {"no", "not"}.isdisjoint(question.split())
  return answer not in ("yes", "no") or (answer == "yes") != negated
