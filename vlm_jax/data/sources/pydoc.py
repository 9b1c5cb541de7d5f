"""The topics of Python's own manual (`pydoc_data`): text without pictures that is always at hand.

PSF-2.0 licence, about 465 kB in 79 topics; the exact text belongs to the Python version, which the
manifest records. A topic's split is a hash of its name: one tenth each is validation and test. A
record is a passage of whole paragraphs, so that a shuffle mixes topics: the longest would otherwise
fill hundreds of steps on its own.
"""

import hashlib
from collections.abc import Iterable, Iterator

from vlm_jax.core.document import Text
from vlm_jax.core.errors import UsageError
from vlm_jax.data.sources import Parts, Record

FORMS = ("text",)
LICENCE = "PSF-2.0 (Python documentation, docs.python.org/3/license.html)"
PACKAGE = "python"
PASSAGE = 1600  # characters, about 450 tokens of a vocabulary of 1024


def prepare() -> dict[str, Iterable[Record]]:
  """Records {key, text} of three splits.

  Raises:
    UsageError: this Python was installed without `pydoc_data`.
  """
  try:
    from pydoc_data.topics import topics  # half a megabyte, only read here
  except ImportError as error:
    raise UsageError("source pydoc: this Python has no module 'pydoc_data'; install Python's full "
                     "standard library or leave the source out with --sources") from error
  splits: dict[str, list[Record]] = {"train": [], "validation": [], "test": []}
  for name in sorted(topics):
    tenth = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 10
    split = {0: "validation", 1: "test"}.get(tenth, "train")
    for number, passage in enumerate(_passages(topics[name])):
      splits[split].append({"key": f"{name}/{number}", "text": passage})
  return dict(splits)


def _passages(text: str) -> Iterator[str]:
  """Whole paragraphs, together at most `PASSAGE` characters unless one alone is longer."""
  passage = ""
  for paragraph in filter(str.strip, text.split("\n\n")):
    if passage and len(passage) + len(paragraph) > PASSAGE:
      yield passage
      passage = ""
    passage = f"{passage}\n\n{paragraph}" if passage else paragraph
  if passage:
    yield passage


def texts(record: Record) -> Iterator[str]:
  """The passage."""
  yield record["text"]


def parts(record: Record, form: str) -> list[Parts]:
  """One document, all of it predicted."""
  del form
  return [(Text(record["text"], "text", loss=True),)]
