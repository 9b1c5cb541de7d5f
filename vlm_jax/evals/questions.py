"""The questions of a document, and fan-out documents cut into rows of a few questions."""

import dataclasses
from collections.abc import Sequence

from vlm_jax.core.document import Document, Text


@dataclasses.dataclass(frozen=True)
class Question:
  """One question.

  Attributes:
    key: names it.
    document: key of the document it is from; questions about one image share it.
    text: what is asked.
    answers: the truth.
  """

  key: str
  document: str
  text: str
  answers: Sequence[str]


def branches(document: Document) -> dict[int, list[Text]]:
  """The text parts of every branch of a fan-out document, or {0: those of a plain document}."""
  parts: dict[int, list[Text]] = {}
  for part in document.parts:
    if isinstance(part, Text):
      parts.setdefault(part.branch, []).append(part)
  if len(parts) > 1:
    parts.pop(0, None)
  return parts


def cut(document: Document, together: int) -> list[Document]:
  """Cuts a fan-out document into pieces of about equally many branches.

  Branches never see each other, so cutting changes nothing that a branch sees.

  Args:
    document: any document; one without branches stays whole.
    together: the most branches of a piece, at least 1.

  Returns:
    Documents with the same key, the trunk in each.
  """
  numbers = [number for number in branches(document) if number]
  if len(numbers) <= together:
    return [document]
  pieces = -(-len(numbers) // together)
  size, more = divmod(len(numbers), pieces)
  out, start = [], 0
  for piece in range(pieces):
    end = start + size + (piece < more)
    chosen = {0, *numbers[start:end]}
    parts = tuple(part for part in document.parts if getattr(part, "branch", 0) in chosen)
    out.append(dataclasses.replace(document, parts=parts))
    start = end
  return out


def questions_of(document: Document) -> list[Question]:
  """The last question of every branch (of a plain document: of the document), in order.

  The last user's text is the question, the assistant's text that ends the branch its answer,
  unless that has `answers` of annotators.
  """
  out = []
  for number, parts in branches(document).items():
    asked = [part.text for part in parts if part.role == "user"]
    key = f"{document.key}/{number}" if number else document.key
    out.append(Question(key, document.key, asked[-1] if asked else "",
                        parts[-1].answers or (parts[-1].text,)))
  return out
