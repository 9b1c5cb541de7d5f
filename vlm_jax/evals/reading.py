"""The documents of a split for an evaluation, in order, bad ones counted."""

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core import stopping
from vlm_jax.core.document import Document
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.data import pipeline
from vlm_jax.data.bad import Bad, BadExample, Tally
from vlm_jax.evals.bootstrap import interval

T = TypeVar("T")


class Split:
  """One split of a source, as an entry of `config.evals` wants to see it.

  Attributes:
    tokenizer, decode_image: of the run.
    tally: documents read and bad so far.
  """

  def __init__(self, config: ConfigDict, entry: ConfigDict, split: str, images: str,
               spaced: int = 0):
    """Opens a split.

    Args:
      config: of the run.
      entry: one of `config.evals`.
      split: which split.
      images: "real", "none" or "shuffled".
      spaced: read at most so many documents, evenly spaced; 0: the first `entry.limit`.

    Raises:
      UsageError: an unknown source, split, form or image policy, or a negative limit.
      DataError: the prepared data is missing or damaged.
    """
    if entry.limit < 0:
      raise UsageError(f"config.evals: limit is {entry.limit}; use 0 for all, or more")
    source = config.data.sources.get(entry.source)
    form = entry.form or (source.form if source else "")
    self._documents = pipeline.documents(config, entry.source, split, form, images)
    count = len(self._documents)
    self._numbers = (range(min(entry.limit or count, count)) if not spaced else
                     [count * place // spaced for place in range(spaced)] if count > spaced else
                     range(count))
    self._name = f"source '{entry.source}'", split
    self.tokenizer = pipeline.load_tokenizer(config)
    self.decode_image = pipeline.image_decoder(config)
    self.tally = Tally(entry.source, config.data.bad_limit)

  def examples(self, encode: Callable[[Document], T]) -> Iterator[tuple[int, Document, T]]:
    """(number, document, what `encode` makes of it) of every document that is not bad.

    Raises:
      DataError: too many documents are bad.
    """
    for index in self._numbers:
      stopping.point()
      try:
        document = self._documents[index]
        encoded = encode(document)
        self.tally.count([])
      except BadExample as error:
        self.tally.count(Bad(error.reason, self._documents.key(index)))
        continue
      yield index, document, encoded

  @property
  def bad(self) -> int:
    """Documents that could not be read."""
    return sum(self.tally.bad.values())

  def nothing(self, what: str) -> DataError:
    """The error when a split has none of what an evaluation looks for."""
    source, split = self._name
    return DataError(f"{source} has no {what} in split '{split}' ({self.tally.examples()}); choose "
                     "another split")


def with_controls(
  entry: ConfigDict, measure: Callable[[str], tuple[dict[str, Any], list[dict], int]]
) -> tuple[dict[str, Any], dict[str, list[dict]]]:
  """Measures with the images of an entry, then with those of each of its controls.

  Args:
    entry: one of `config.evals`.
    measure: "real", "none" or "shuffled" to (numbers, rows, bad documents).

  Returns:
    The numbers {"images", those of `measure`, "bad", "seconds", "controls": {images: numbers}} and
    the predictions {"": rows, images: rows}.
  """
  numbers: dict[str, Any] = {"images": entry.images}
  controls, predictions = {}, {}
  for images in (entry.images, *(one for one in entry.controls if one != entry.images)):
    start = time.perf_counter()
    one, rows, bad = measure(images)
    one = one | {"bad": bad, "seconds": time.perf_counter() - start}
    if images == entry.images:
      numbers |= one
      predictions[""] = rows
    else:
      controls[images] = one
      predictions[images] = rows
  return numbers | {"controls": controls}, predictions


def check(entry: ConfigDict, *fields: str) -> None:
  """Raises a UsageError when one of the entry's whole numbers is below 1."""
  for field in fields:
    if entry[field] < 1:
      raise UsageError(f"config.evals: {field} is {entry[field]}; use 1 or more")


def mean_score(rows: list[dict], seed: int, name: str = "score") -> tuple[float, float, float]:
  """Mean of one number of the rows and its 95% interval: (mean, low, high).

  Pictures are drawn again, with all their questions, since those are not independent.
  """
  scores = np.array([row[name] for row in rows], np.float64)
  groups = np.array([row["document"] for row in rows])
  return float(scores.mean()), *interval(scores, groups=groups, seed=seed)
