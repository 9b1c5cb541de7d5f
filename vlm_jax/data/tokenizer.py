"""Tokenizers: our own byte-level BPE, in which nothing is ever unknown, and published ones."""

import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from vlm_jax.core.errors import DataError, UsageError, nearest
from vlm_jax.data import chat
from vlm_jax.data.instruction import Reader
from vlm_jax.data.published import Published
from vlm_jax.data.published import read as read_published

PAD, BOS, EOS, USER, ASSISTANT, IMAGE = SPECIALS = (
  "<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<image>",
)
# What opens a user's and an assistant's turn; PaliGemma (arXiv:2407.07726, section 3.1): the prompt
# behind <bos>, the answer behind a line break that is no part of either; CLIP (arXiv:2103.00020,
# section 2.4): <bos> words <eos>, and no turns. "plain", as LLaVA's first stage shows pictures to a
# language model that was only ever given text: <bos> opens the document, before a picture too, as
# all that the model has read begins so; every part is a line. "open_flamingo" (arXiv:2308.01390):
# words open turns (`ASKED`), and a mark closes what is said about each picture.
CHUNK, CHUNKS = "<|endofchunk|>", "open_flamingo"
TEMPLATES = {"marks": (USER, ASSISTANT), "newline": (BOS, "\n"), "caption": (BOS, BOS),
             "plain": ("\n", "\n"), CHUNKS: (CHUNK, CHUNK)}
ASKED = {"user": "Question:", "assistant": " Short answer:"}
CHECKPOINT = "checkpoint"  # the chat template among the files of a published tokenizer
SMALLEST = len(SPECIALS) + 256  # every byte has a token


def needed(template: str) -> tuple[str, ...]:
  """What pads, begins, ends, stands for a picture and opens the turns of a template.

  Captions hold no picture and are padded behind their end, so that CLIP's tokenizer, which has two
  special tokens, needs no more.
  """
  alone = template == "caption"
  return (EOS if alone else PAD, BOS, EOS, EOS if alone else IMAGE, *TEMPLATES[template])


class Tokenizer:
  """Text to ids and back.

  Text is always only text: "<eos>" written by a user is five characters, never the special token.

  Attributes:
    pad, bos, eos, image: ids of the special tokens; `pad` of ours is 0. A published tokenizer may
      have neither `bos` nor `image`, which are -1 then.
    first: id of what opens a document, -1 for nothing.
    user, assistant, alone: ids of what opens their turns and a text of nobody's, where no chat
      template writes them.
    chunk: id of what stands behind what is said about a picture, -1: nothing does.
    closing: id of what closes an answer.
    chat: the chat template, None where single tokens open turns.
    stops: what ends an answer.
    vocab_size: number of ids.
    reader: the tokenizer of a connector that reads beside the language model, None: none does.
  """

  reader: Reader | None = None

  def __init__(self, inner: tokenizers.Tokenizer, template: str = "marks",
               published: Published | None = None, length: int = 0):
    """Wraps a tokenizer of the `tokenizers` library; a missing token is a ValueError.

    Args:
      inner: has the special tokens and what the template opens turns with, each as one token.
      template: a name of `TEMPLATES`, or a chat template.
      published: the conventions of a published checkpoint, whose names the tokens have.
      length: of captions of a published checkpoint, which cuts and pads its own.
    """
    marks = needed(template) if template in TEMPLATES else (PAD, BOS, EOS, IMAGE)
    if published:
      eos = published.token("eos_token")
      marks = (published.token("pad_token") or eos, published.token("bos_token"), eos,
               published.token("image_token") or IMAGE,
               *(TEMPLATES[template] if template == CHUNKS else ()))
    # Byte-level and sentencepiece vocabularies spell a line break differently.
    single = lambda token: (inner.token_to_id(token) if published or token in (*SPECIALS, CHUNK)
                            else _one(inner, token))
    ids = [None if token is None else single(token) for token in marks]
    optional = (1, 3) if published else ()
    missing = [token if token in SPECIALS else repr(token) for place, (token, number) in
               enumerate(zip(marks, ids, strict=True)) if number is None and place not in optional]
    if missing:
      raise ValueError(f"it has no {', '.join(missing)}")
    self.inner, self._published, self._length = inner, published, length
    self.pad, self.bos, self.eos, self.image, *turns = (
      -1 if number is None else number for number in ids)
    self.user, self.assistant = turns or (-1, -1)
    self.chunk = self.user if template == CHUNKS else -1
    self.first = self.bos if template == "plain" else -1
    if template == CHUNKS:  # what the tokenizer itself puts before a text
      said = inner.encode("a")
      self.first = said.ids[0] if said.special_tokens_mask[0] else -1
    self.alone = self.user if template == "plain" else self.bos
    self.vocab_size = inner.get_vocab_size(with_added_tokens=True)
    self.specials = tuple(token.content for token in inner.get_added_tokens_decoder().values()
                          if token.special)
    self.chat = None if template in TEMPLATES else chat.Template(
      template, self._roles(marks), self.specials)
    ends = {inner.token_to_id(token) for token in self.chat.ends} if self.chat else set()
    self.closing = self.chunk if self.chunk >= 0 else self.eos
    self.stops = tuple(sorted(ends | {self.eos, self.closing}))
    inner.encode_special_tokens = self.chat is None
    self._cached = functools.lru_cache(maxsize=4096)(self._encode)

  def _roles(self, marks: Sequence[str | None]) -> dict[str, str]:
    """The special tokens as a chat template names them."""
    told = dict(zip(("pad_token", "bos_token", "eos_token", "image_token"), marks, strict=True))
    more = self._published.tokens() if self._published else {}
    return {role: token for role, token in (told | more).items() if token}

  def encode(self, text: str) -> list[int]:
    """The ids of a text, without any special token."""
    # Questions repeat, pages do not: only short texts are worth remembering.
    return list(self._cached(text)) if len(text) < 256 else list(self._encode(text))

  def _encode(self, text: str) -> tuple[int, ...]:
    return tuple(self._reader(text).encode(self._prepared(text), add_special_tokens=False).ids)

  def _reader(self, text: str) -> tokenizers.Tokenizer:
    return self.literal if self.chat and self.speaks_specially(text) else self.inner

  def _prepared(self, text: str) -> str:
    return self._published.prepared(text) if self._published else text

  def opening(self, role: str) -> list[int]:
    """The ids that open a part of a role; a published tokenizer may have none for a page."""
    if self.chunk >= 0:
      return self.encode(ASKED.get(role, ""))
    mark = {"user": self.user, "assistant": self.assistant}.get(role, self.alone)
    return [mark] if mark >= 0 else []

  def page(self, text: str) -> tuple[list[int], int, int]:
    """The ids of a text that stands alone, how many of them open it, and how many close it.

    Ours: `alone` text <eos>. Of a published tokenizer they are what its own ends are; a caption is
    cut and padded to the length of all, and so that a page of what speaks comes to an end, it is
    closed even if it is not so there.
    """
    if self.chunk >= 0:
      return [*self.encode(text), self.chunk, self.eos], 0, 2
    if not self._published:
      return [self.alone, *self.encode(text), self.eos], 1, 1
    inner, length = self._reader(text), self._length
    ids = inner.encode(self._prepared(text), add_special_tokens=False)
    if length:
      ids.truncate(max(length - inner.num_special_tokens_to_add(False), 0))
    size, ids = len(ids), inner.post_process(ids)
    opening = ids.special_tokens_mask.index(0) if 0 in ids.special_tokens_mask else 0
    if length:
      ids.pad(length, direction=self._published.settings.get("padding_side", "right"),
              pad_id=self.pad, pad_token=inner.id_to_token(self.pad))
      return ids.ids, 0, 0
    closing = len(ids) - size - opening
    return (ids.ids, opening, closing) if closing else ([*ids.ids, self.eos], opening, 1)

  def speaks_specially(self, text: str) -> bool:
    """Whether a text holds the characters of a special token."""
    return any(token in text for token in self.specials)

  @functools.cached_property
  def literal(self) -> tokenizers.Tokenizer:
    """`inner` for texts in which nothing is a special token; made when it is first needed."""
    literal = tokenizers.Tokenizer.from_str(self.inner.to_str())
    literal.encode_special_tokens = True
    return literal

  def decode(self, ids: Sequence[int], specials: bool = False) -> str:
    """The text of ids; `specials` also writes the special tokens out."""
    return self.inner.decode([int(i) for i in ids], skip_special_tokens=not specials)

  def save(self, path: str) -> None:
    """Writes `tokenizer.json`."""
    self.inner.save(str(path))


def _one(inner: tokenizers.Tokenizer, text: str) -> int | None:
  """The id of a text that is one token, else None."""
  ids = inner.encode(text, add_special_tokens=False).ids
  return ids[0] if len(ids) == 1 else None


def train(texts: Iterable[str], vocab_size: int = 1024) -> Tokenizer:
  """Learns a byte-level BPE; the same texts in the same order give the same file.

  Raises:
    UsageError: `vocab_size` is smaller than the specials and bytes.
    DataError: the texts are too small for that many tokens.
  """
  if vocab_size < SMALLEST:
    raise UsageError(f"vocab_size is {vocab_size}; {len(SPECIALS)} special tokens and 256 bytes "
                     f"need at least {SMALLEST}")
  inner = tokenizers.Tokenizer(models.BPE())
  inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  inner.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size, special_tokens=list(SPECIALS), show_progress=False,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
  )
  inner.train_from_iterator(texts, trainer)
  tokenizer = Tokenizer(inner)
  if tokenizer.vocab_size != vocab_size:
    raise DataError(f"the texts only give {tokenizer.vocab_size} tokens, not vocab_size="
                    f"{vocab_size}; ask for fewer or add text")
  return tokenizer


def load(path: str, template: str = "marks", length: int = 0) -> Tokenizer:
  """Reads a tokenizer.

  Args:
    path: tokenizer.json, or the directory of a published checkpoint, whose conventions hold then.
    template: `config.data.template`: a name of `TEMPLATES`; `CHECKPOINT`, the chat template in the
      directory; or a chat template, as text or as a file (.jinja).
    length: slots of a caption.

  Raises:
    DataError: a file is missing, not a tokenizer, or lacks a special token.
    UsageError: an unknown template, or a chat template that cannot be used.
  """
  path, published = str(path), None
  if not os.path.exists(path):
    raise DataError(f"{path}: there is no tokenizer; run `vlm-jax data prepare` or set "
                    "config.data.tokenizer to a tokenizer.json")
  if os.path.isdir(path):
    published = read_published(Path(path))
  template = _template(template, path, published)
  try:
    if published:
      return Tokenizer(published.inner, template, published,
                       length if template == "caption" else 0)
    return Tokenizer(tokenizers.Tokenizer.from_file(path), template)
  except UsageError:
    raise
  except Exception as error:  # the library raises bare Exception for every broken file
    raise DataError(f"{path} is not a usable tokenizer.json ({error}); delete it and run "
                    "`vlm-jax data prepare`, or set config.data.tokenizer to another") from error


def _template(template: str, path: str, published: Published | None) -> str:
  """A name of `TEMPLATES` or the text of a chat template."""
  if template == CHECKPOINT:
    if not published or not published.chat:
      raise UsageError(f"config.data.template is '{CHECKPOINT}' but config.data.tokenizer {path} "
                       "is no directory with a chat template; name one, or write the template")
    return published.chat
  if template in TEMPLATES:
    if published and template not in ("caption", CHUNKS):
      raise UsageError(f"config.data.template is '{template}', but config.data.tokenizer {path} is "
                       f"a directory of a checkpoint; use '{CHECKPOINT}' or a chat template, or "
                       "name the tokenizer.json in it")
    return template
  if chat.is_template(template):
    return template
  if not template.endswith((".jinja", ".jinja2", ".j2")):
    raise UsageError(f"config.data.template is '{template}'; "
                     f"{nearest(template, (*TEMPLATES, CHECKPOINT))}, a chat template or a .jinja "
                     "file of one")
  try:
    return Path(template).read_text(encoding="utf-8")
  except (OSError, ValueError) as error:
    raise UsageError(f"config.data.template: {template} cannot be read ({error}); name a file with "
                     "a chat template") from error
