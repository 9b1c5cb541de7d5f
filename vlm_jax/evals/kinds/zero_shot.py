"""Zero-shot classification: the class of a picture is the one whose text is nearest to it.

The classes are the distinct captions of the split, of which none need have been seen in training.
A class is written in every one of the entry's `templates` ("a drawing of a {}"), and its vector is
the mean of their embeddings, of unit length again (arXiv:2103.00020, section 3.1.4).
"""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core.document import Document, Encoded, Pixels, Text
from vlm_jax.core.errors import UsageError
from vlm_jax.core.typing import Params
from vlm_jax.data import template
from vlm_jax.evals import embed
from vlm_jax.evals.kinds.retrieval import said
from vlm_jax.evals.reading import Split, check, mean_score, with_controls
from vlm_jax.ops import contrastive

MAIN, UNIT = "accuracy", "pictures"
ASKS = ("embedders",)


def run(config: ConfigDict, params: Params, entry: ConfigDict, split: str
        ) -> tuple[dict[str, Any], dict[str, list[dict]]]:
  """Classifies every picture as `entry.images` says, then with each control.

  Args:
    config: of the run.
    params: the parameters.
    entry: one of `config.evals`; `templates` say how a class is written.
    split: which split is read.

  Returns:
    The numbers {"accuracy", "accuracy@5", "low", "high", "chance", "classes", "pictures", "bad",
    "seconds", "controls"}: chance is what a blind guess among the classes gets. The predictions
    have {"key", "document", "question": "", "answers": [the class], "prediction", "rank": from 1,
    "score"}.

  Raises:
    UsageError: a field of the entry that cannot be, or a split of fewer than two classes.
    DataError: too many documents cannot be read, or there is no picture.
  """
  check(entry, "batch")
  if "none" in (entry.images, *entry.controls):
    raise UsageError("config.evals: zero_shot classifies pictures, so images and controls cannot "
                     "be 'none'; set controls=('shuffled',)")
  if not entry.templates or any(text.count("{}") != 1 for text in entry.templates):
    raise UsageError(f"config.evals: templates is {tuple(entry.templates)}; write one text or more "
                     "with one {} each, for the name of a class")

  def measure(images: str) -> tuple[dict[str, Any], list[dict], int]:
    opened = Split(config, entry, split, images)
    keys, pictures, names = read(opened)
    classes = sorted(set(names))
    if len(classes) < 2:
      raise UsageError(f"config.evals: split '{split}' of '{entry.source}' has {len(classes)} "
                       "class; choose a form that captions pictures, and another split or limit")
    scores = np.asarray(contrastive.cosines(
      embed.images(config, params, pictures, entry.batch),
      vectors(config, params, opened, classes, entry)))
    return *summary(keys, names, classes, scores, config.seed), opened.bad

  return with_controls(entry, measure)


def read(opened: Split) -> tuple[list[str], list[Encoded], list[str]]:
  """Keys, pictures and captions of the documents of a split that have a picture.

  Raises:
    DataError: too many documents cannot be read, or none has a picture.
  """
  keys, pictures, names = [], [], []
  encode = lambda document: template.encode(document, opened.tokenizer, opened.decode_image)
  for _, document, encoded in opened.examples(encode):
    shown = tuple(part for part in encoded.parts if isinstance(part, Pixels))
    if shown:
      keys.append(document.key)
      pictures.append(Encoded(shown, encoded.source, encoded.key))
      names.append(said(document, 0))
  if not keys:
    raise opened.nothing("picture")
  return keys, pictures, names


def vectors(config: ConfigDict, params: Params, opened: Split, classes: list[str],
            entry: ConfigDict) -> np.ndarray:
  """Unit vectors f32[classes, E]."""
  written = [Document((Text(text.format(name), loss=True),), "", f"class {name}")
             for text in entry.templates for name in classes]
  encoded = [template.encode(one, opened.tokenizer, opened.decode_image) for one in written]
  found = embed.texts(config, params, encoded, entry.batch)
  mean = found.reshape(len(entry.templates), len(classes), -1).mean(0)
  return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def summary(keys: list[str], names: list[str], classes: list[str], scores: np.ndarray, seed: int
            ) -> tuple[dict[str, Any], list[dict]]:
  """Numbers and rows of scores f32[pictures, classes]; equal scores count as better than one's own.
  """
  right = np.array([classes.index(name) for name in names])
  own = scores[np.arange(len(names)), right]
  before = (scores >= own[:, None]).sum(1) - 1
  rows = [{"key": key, "document": key, "question": "", "answers": [name],
           "prediction": classes[int(scores[number].argmax())], "rank": int(before[number]) + 1,
           "score": float(before[number] == 0)}
          for number, (key, name) in enumerate(zip(keys, names, strict=True))]
  accuracy, low, high = mean_score(rows, seed)
  return {"accuracy": accuracy, "accuracy@5": float((before < 5).mean()), "low": low, "high": high,
          "chance": 1 / len(classes), "classes": len(classes), "pictures": len(rows)}, rows
