"""Conversations to tokens by a chat template, the way `template.py` does it by marks.

The whole conversation is written and tokenised at once, as it is published, and then taken apart:
at its pictures, whose token becomes the picture, and between its turns. What is predicted is what
the template marks as generated; without marks, what an assistant says and the special token behind
it. A template that closes an answer with no token at all, as LLaVA-1.5's, would teach to go on for
ever: behind the last answer of a document stands the tokenizer's end of text, predicted too.

Branches are written each with the trunk before it, and must then begin alike, which they do where
pictures stand before what is asked.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import tokenizers

from vlm_jax.core.document import ROLES, Document, Encoded, Pixels, Text, Tokens, Visual
from vlm_jax.core.errors import UsageError
from vlm_jax.data.bad import BadExample
from vlm_jax.data.chat import Message, Written
from vlm_jax.data.tokenizer import Tokenizer

DecodeImage = Callable[[Visual], Pixels]
Part = Text | Visual


@dataclasses.dataclass(frozen=True)
class Ids:
  """A conversation as tokens: ids i32[n], loss bool[n], turn i32[n].

  `head` tokens come before the first text of a branch, all of them without one.
  """

  ids: np.ndarray
  loss: np.ndarray
  turn: np.ndarray
  head: int


def is_conversation(document: Document) -> bool:
  """Whether somebody speaks; pages and captions are written without a chat template."""
  return any(isinstance(part, Text) and part.role != "text" for part in document.parts)


def encode(document: Document, tokenizer: Tokenizer, decode_image: DecodeImage, *, prompt: bool
           ) -> Encoded:
  """Writes and tokenises a conversation.

  Args:
    document: parts in reading order, the trunk before the branches.
    tokenizer: has a chat template.
    decode_image: Image or Video to Pixels.
    prompt: of the last part of the document, or of every branch, only the opening of its turn.

  Raises:
    BadExample: "unknown_role", "empty_text", "image_count", or what `decode_image`
      raises.
    UsageError: the template writes a picture behind the question of a branch.
  """
  trunk = [part for part in document.parts if not getattr(part, "branch", 0)]
  numbers = sorted({part.branch for part in document.parts if getattr(part, "branch", 0)})
  mine = lambda number: [p for p in document.parts if getattr(p, "branch", 0) == number]
  pictures = [decode_image(part) for part in document.parts if isinstance(part, Visual)]
  if pictures and tokenizer.image < 0:
    raise UsageError(f"config.data.tokenizer has no token of a picture, but {document.key} has "
                     "pictures; name it image_token in tokenizer_config.json")
  written = [_ids(trunk + (mine(number) if number else []), number, tokenizer, document.key, prompt)
             for number in numbers or [0]]
  for one in written:
    if (found := int((one.ids == tokenizer.image).sum())) != len(pictures):
      raise BadExample("image_count", f"{document.key}: {len(pictures)} images, and the chat "
                       f"template writes {found}")
  if not numbers:
    return Encoded(tuple(_parts(written[0], pictures, tokenizer.image)), document.source,
                   document.key)
  head = _common(written)
  cut = lambda one, span: Ids(one.ids[span], one.loss[span], one.turn[span], 0)
  parts = _parts(cut(written[0], slice(head)), pictures, tokenizer.image)
  if sum(isinstance(part, Pixels) for part in parts) < len(pictures):
    raise UsageError(f"document {document.key}: the chat template writes a picture behind the "
                     "question of a branch; choose a form of the source without branches")
  for turn, (number, one) in enumerate(zip(numbers, written, strict=True), 1):
    rest = cut(one, slice(head, None))
    parts.append(Tokens(rest.ids, rest.loss, number, turn))
  return Encoded(tuple(parts), document.source, document.key)


def messages(parts: Sequence[Part], key: str) -> list[Message]:
  """The messages of a conversation: a text that continues, and pictures, belong to a turn.

  A picture before a turn of the user's is the first in it; elsewhere it is the last of the user's
  turn before.
  """
  found: list[tuple[str, list[str | None]]] = []
  waiting = 0
  for part in parts:
    if isinstance(part, Visual):
      waiting += 1
      continue
    if part.role not in ROLES or part.role == "text":
      raise BadExample("unknown_role", f"{key}: '{part.role}' in a conversation")
    if not part.text.strip():
      raise BadExample("empty_text", f"{key}: {part.role}")
    if part.continues and found and found[-1][0] == part.role:
      found[-1][1].extend([None] * waiting + [part.text])
      waiting = 0
      continue
    if waiting and part.role == "assistant":
      _hand(found, waiting)
      waiting = 0
    before = [None] * waiting if part.role == "user" else []
    waiting = 0 if part.role == "user" else waiting
    found.append((part.role, [*before, part.text]))
  if waiting:
    _hand(found, waiting)
  return found


def _hand(found: list[tuple[str, list[str | None]]], waiting: int) -> None:
  """Gives pictures to the user's turn that is open, or to one of their own."""
  if not found or found[-1][0] != "user":
    found.append(("user", []))
  found[-1][1].extend([None] * waiting)


def _ids(parts: Sequence[Part], branch: int, tokenizer: Tokenizer, key: str, prompt: bool) -> Ids:
  """Tokenises one conversation; `branch` is the one whose first text ends the head."""
  parts = list(parts)
  if prompt:
    last = parts.pop()
    if not isinstance(last, Text) or last.role != "assistant" or last.continues:
      raise BadExample("unknown_role", f"{key}: the last part is not an answer")
  texts = [part for part in parts if isinstance(part, Text)]
  written = tokenizer.chat.write(messages(parts, key), prompt)
  encoding = _tokenised(written, tokenizer)
  ids = np.array([number for number, _ in encoding], np.int32)
  starts = np.array([span[0] for _, span in encoding], np.int32)
  ends = np.array([span[1] for _, span in encoding], np.int32)
  loss, answers = np.zeros(len(ids), bool), []
  for text, (start, end), close in zip(texts, written.texts, written.closes, strict=True):
    if text.role == "assistant":
      answers.append(close)
      spans = [(start, close)] if written.generated is None else [
        span for span in written.generated if span[0] <= start and end <= span[1]]
      for first, after in spans if text.loss else ():
        loss |= (starts < after) & (ends > first)
  # A token that begins behind the end of an answer belongs to the turn behind it.
  turn = np.searchsorted(np.array(answers[:-1], np.int32), starts, "right").astype(np.int32)
  first = next((written.texts[number][0] for number, text in enumerate(texts)
                if branch and text.branch == branch), None)
  head = len(ids) if first is None else int(np.argmax(np.append(ends > first, True)))
  if texts[-1].role == "assistant" and written.closes[-1] == written.texts[-1][1]:
    ids = np.append(ids, np.int32(tokenizer.eos))
    loss, turn = np.append(loss, texts[-1].loss), np.append(turn, turn[-1:])
  return Ids(ids, loss, turn, min(head, len(ids)))


def _tokenised(written: Written, tokenizer: Tokenizer) -> list[tuple[int, tuple[int, int]]]:
  """Ids with the characters they stand for; what texts hold of special tokens is only text."""
  pieces: list[tuple[int, str, tokenizers.Tokenizer]] = []
  at = 0
  for start, end in written.texts:
    if tokenizer.speaks_specially(written.text[start:end]):
      pieces.append((at, written.text[at:start], tokenizer.inner))
      pieces.append((start, written.text[start:end], tokenizer.literal))
      at = end
  pieces.append((at, written.text[at:], tokenizer.inner))
  found = []
  for offset, text, inner in pieces:
    encoding = inner.encode(text, add_special_tokens=False)
    found += [(number, (offset + start, offset + end))
              for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)]
  return found


def _common(written: Sequence[Ids]) -> int:
  """How many tokens all branches begin with, at most up to the first text of each."""
  head = min(one.head for one in written)
  same = np.all([one.ids[:head] == written[0].ids[:head] for one in written], axis=0)
  return int(np.argmin(np.append(same, False)))


def _parts(one: Ids, pictures: Sequence[Pixels], image: int) -> list[Tokens | Pixels]:
  """The tokens taken apart at pictures and between turns."""
  shown, parts = iter(pictures), []
  edges = np.flatnonzero((one.ids == image) | (np.diff(one.turn, prepend=one.turn[:1]) != 0)
                         | (np.append(0, one.ids[:-1]) == image) * (np.arange(len(one.ids)) > 0))
  for span in np.split(np.arange(len(one.ids)), edges):
    if not len(span):
      continue
    turn = int(one.turn[span[0]])
    if one.ids[span[0]] == image:
      parts.append(dataclasses.replace(next(shown), turn=turn))
    else:
      parts.append(Tokens(one.ids[span], one.loss[span], 0, turn))
  return parts
