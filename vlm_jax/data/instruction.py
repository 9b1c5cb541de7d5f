"""What a connector that reads words is told about a picture, by a tokenizer of its own.

The Q-Former of InstructBLIP sees the instruction that the language model sees, but as BERT spells
it (arXiv:2305.06500). A picture's instruction is all that the user says in its turn,
before the answer and behind it nothing: no picture is told what is to be said about it, or what is
asked once that is said.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from vlm_jax.core.document import Document, Encoded, Pixels, Text, Visual
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.data import published

FIELD = "config.data.instruction_tokenizer"


@dataclasses.dataclass(frozen=True)
class Reader:
  """Instructions to ids.

  Attributes:
    encode: a text to ids, as many as there is room for.
    vocab_size: number of ids.
    inner: the tokenizer.
  """

  encode: Callable[[str], Sequence[int]]
  vocab_size: int
  inner: tokenizers.Tokenizer


def _reader(inner: tokenizers.Tokenizer, length: int, prepared: Callable[[str], str] = str
            ) -> Reader:
  """Writes what the tokenizer puts at the ends of a text; one that is cut keeps its ends."""
  inner.encode_special_tokens = True  # what a user writes is only text

  @functools.lru_cache(maxsize=4096)
  def encode(text: str) -> Sequence[int]:
    ids = inner.encode(prepared(text), add_special_tokens=False)
    ids.truncate(max(length - inner.num_special_tokens_to_add(False), 0))
    return inner.post_process(ids).ids

  return Reader(encode, inner.get_vocab_size(with_added_tokens=True), inner)


def load(path: str, length: int) -> Reader:
  """Reads a tokenizer.json, or that of the directory of a published one.

  Args:
    path: of the file or the directory.
    length: the most ids of an instruction.

  Raises:
    DataError: it is missing or damaged.
  """
  if os.path.isdir(path):
    found = published.read(Path(path))
    return _reader(found.inner, length, found.prepared)
  if not os.path.exists(path):
    raise DataError(f"{path}: there is no tokenizer; set {FIELD} to a tokenizer.json or the "
                    "directory of one")
  try:
    inner = tokenizers.Tokenizer.from_file(path)
  except Exception as error:  # the library raises bare Exception for every broken file
    raise DataError(f"{path} is not a usable tokenizer.json ({error}); set {FIELD} to another"
                    ) from error
  inner.no_padding()
  inner.no_truncation()
  return _reader(inner, length)


def tell(encoded: Encoded, document: Document, reader: Reader) -> Encoded:
  """The encoded document with the `words` of every picture.

  Args:
    encoded: of `document`.
    document: parts in reading order.
    reader: gives ids.

  Raises:
    UsageError: a branch asks for itself, about pictures that are read once for all branches.
  """
  supply = iter(instructions(document))
  told = lambda: np.array(reader.encode(next(supply)), np.int32)
  return dataclasses.replace(encoded, parts=tuple(
    dataclasses.replace(part, words=told()) if isinstance(part, Pixels) else part
    for part in encoded.parts))


def instructions(document: Document) -> list[str]:
  """The instruction of every picture, "" where nothing is asked in its turn; raises as `tell`."""
  turns: list[list[str]] = [[]]
  of, answered = [], False
  for part in document.parts:
    if isinstance(part, Text) and part.branch:
      if part.role == "user" and of:
        raise UsageError(f"document {document.key} of '{document.source}' asks in branches, but "
                         "config.connector reads one instruction with a picture; choose a form of "
                         "the source that asks once in a document, such as 'single'")
      continue
    if answered:
      turns.append([])
    if isinstance(part, Visual):
      of.append(len(turns) - 1)
    elif part.role == "user":
      turns[-1].append(part.text)
    answered = isinstance(part, Text) and part.role in ("assistant", "text")
  return [" ".join(turns[turn]) for turn in of]
