"""Documents to tokens. The only place that knows what a turn looks like.

    user       <user> question
    assistant  <assistant> answer <eos>
    system     <bos> instruction
    text       <bos> page <eos>

That is the template "marks"; what opens a user's and an assistant's turn is the tokenizer's to say
(`config.data.template`), or else a chat template writes conversations (`conversation.py`). Marks
that open a turn are never predicted; the text and the closing <eos> are when `Text.loss` says so. A
text that `continues` one before an image has neither mark nor <eos> between them. Every piece is
tokenised alone and its loss written at once, so the spans are exact: nothing is tokenised twice and
counted.

"open_flamingo" has words for marks, and a mark behind an answer, behind a page and before each
picture of it but the first, which is predicted like the text:

    sentence <image> sentence <|endofchunk|> <image> sentence <|endofchunk|> <eos>
    <image> Question:question Short answer:answer <|endofchunk|>
"""

import dataclasses

import numpy as np

from vlm_jax.core.document import ROLES, Document, Encoded, Pixels, Text, Tokens, Visual
from vlm_jax.data import conversation, instruction
from vlm_jax.data.bad import BadExample
from vlm_jax.data.conversation import DecodeImage
from vlm_jax.data.tokenizer import Tokenizer


def encode(document: Document, tokenizer: Tokenizer, decode_image: DecodeImage) -> Encoded:
  """Templates, tokenises and decodes a document.

  Args:
    document: parts in reading order, the trunk before the branches.
    tokenizer: gives ids.
    decode_image: Image or Video to Pixels, already resized for the tower.

  Returns:
    The encoded document. A question, its images and its answer share a turn.

  Raises:
    BadExample: "unknown_role", "empty_text", "zero_loss", or what `decode_image` or
      `conversation.encode` raises.
    UsageError: as `instruction.tell`, where a connector reads.
  """
  if tokenizer.chat and conversation.is_conversation(document):
    encoded = conversation.encode(document, tokenizer, decode_image, prompt=False)
  else:
    encoded = _encode(document, tokenizer, decode_image)
  encoded = _told(encoded, document, tokenizer)
  if not any(isinstance(part, Tokens) and part.loss.any() for part in encoded.parts):
    raise BadExample("zero_loss", document.key)
  return encoded


def encode_prompt(document: Document, tokenizer: Tokenizer, decode_image: DecodeImage) -> Encoded:
  """The document up to its last answer: what a model is given to write that answer itself.

  The last part, of a fan-out document the last part of every branch, is what the model says: an
  assistant's answer or, as a caption, plain text. It becomes its bare opening mark.

  Raises:
    BadExample: "unknown_role" (a last part is a user's or the system's), or as in `encode`.
  """
  if tokenizer.chat and conversation.is_conversation(document):
    encoded = conversation.encode(document, tokenizer, decode_image, prompt=True)
    return _told(encoded, document, tokenizer)
  last = {getattr(part, "branch", 0): index for index, part in enumerate(document.parts)}
  if len(last) > 1:
    last.pop(0, None)
  for index in last.values():
    part = document.parts[index]
    if not isinstance(part, Text) or part.role not in ("assistant", "text"):
      raise BadExample("unknown_role", f"{document.key}: the last part is not an answer")
  encoded = _encode(document, tokenizer, decode_image, frozenset(last.values()))
  return _told(encoded, document, tokenizer)


def _told(encoded: Encoded, document: Document, tokenizer: Tokenizer) -> Encoded:
  """The document with what a connector that reads is told."""
  reader = tokenizer.reader
  return encoded if reader is None else instruction.tell(encoded, document, reader)


def _encode(document: Document, tokenizer: Tokenizer, decode_image: DecodeImage,
            opened: frozenset[int] = frozenset()) -> Encoded:
  """Encodes every part; of the parts numbered in `opened` only the opening mark."""
  parts: list[Tokens | Pixels] = []
  if tokenizer.first >= 0:
    parts.append(Tokens(np.array([tokenizer.first], np.int32), np.zeros(1, bool)))
  turn, branch, answered = 0, 0, False
  texts = [part for part in document.parts if isinstance(part, Text)]
  following, shown, learned = texts[1:], False, any(part.loss for part in texts)
  chunks = tokenizer.chunk >= 0 and not conversation.is_conversation(document)
  for index, part in enumerate(document.parts):
    if isinstance(part, Visual):
      if chunks and shown:
        parts.append(Tokens(np.array([tokenizer.chunk], np.int32), np.array([learned]), 0, turn))
      shown = True
    if index and (answered or (isinstance(part, Text) and part.branch != branch)):
      turn += 1
    if isinstance(part, Visual):
      parts.append(dataclasses.replace(decode_image(part), turn=turn))
      answered = False
    else:
      goes_on = bool(following) and following.pop(0).continues
      if index in opened:
        mark = np.array([] if part.continues else tokenizer.opening(part.role), np.int32)
        parts.append(Tokens(mark, np.zeros(len(mark), bool), part.branch, turn))
      else:
        parts.append(_tokens(part, tokenizer, turn, document.key, goes_on))
      branch, answered = part.branch, part.role in ("assistant", "text")
  return Encoded(tuple(parts), document.source, document.key)


def _tokens(part: Text, tokenizer: Tokenizer, turn: int, key: str, goes_on: bool) -> Tokens:
  if part.role not in ROLES:
    raise BadExample("unknown_role", f"{key}: '{part.role}'")
  if not part.text.strip():
    raise BadExample("empty_text", f"{key}: {part.role}")
  if part.role == "text":
    ids, opening, closing = tokenizer.page(part.text)
  else:
    mark, closing = tokenizer.opening(part.role), int(part.role == "assistant")
    ids, opening = [*mark, *tokenizer.encode(part.text)], len(mark)
    ids += [tokenizer.closing] * closing
  ids = ids[opening if part.continues else 0 : len(ids) - closing if goes_on else len(ids)]
  loss = np.full(len(ids), part.loss)
  if not part.continues:
    loss[:opening] = False
  return Tokens(np.array(ids, np.int32), loss, part.branch, turn)
