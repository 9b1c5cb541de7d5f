"""Byte-level BPE: any text can be encoded, nothing is ever unknown."""

import functools
import os
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from vlm_jax.core.errors import DataError, UsageError, nearest

PAD, BOS, EOS, USER, ASSISTANT, IMAGE = SPECIALS = (
  "<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<image>",
)
# What opens a user's and an assistant's turn; PaliGemma (arXiv:2407.07726, section 3.1): the prompt
# behind <bos>, the answer behind a line break that is no part of either; CLIP (arXiv:2103.00020,
# section 2.4): <bos> words <eos>, and no turns.
TEMPLATES = {"marks": (USER, ASSISTANT), "newline": (BOS, "\n"), "caption": (BOS, BOS)}
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
    pad, bos, eos, image: ids of the special tokens; `pad` is 0.
    user, assistant: ids of what opens their turns.
    vocab_size: number of ids.
  """

  def __init__(self, inner: tokenizers.Tokenizer, template: str = "marks"):
    """Wraps a tokenizer of the `tokenizers` library; a missing token is a ValueError.

    Args:
      inner: has the special tokens and what the template opens turns with, each as one token.
      template: a name of `TEMPLATES`.
    """
    inner.encode_special_tokens = True
    marks = needed(template)
    # Byte-level and sentencepiece vocabularies spell a line break differently.
    ids = [inner.token_to_id(token) if token in SPECIALS else _one(inner, token)
           for token in marks]
    missing = [repr(token) if token not in SPECIALS else token
               for token, number in zip(marks, ids, strict=True) if number is None]
    if missing:
      raise ValueError(f"it has no {', '.join(missing)}")
    self.inner = inner
    self.pad, self.bos, self.eos, self.image, self.user, self.assistant = ids
    self.vocab_size = inner.get_vocab_size(with_added_tokens=True)
    self._cached = functools.lru_cache(maxsize=4096)(self._encode)

  def encode(self, text: str) -> list[int]:
    """The ids of a text, without any special token."""
    # Questions repeat, pages do not: only short texts are worth remembering.
    return list(self._cached(text)) if len(text) < 256 else list(self._encode(text))

  def _encode(self, text: str) -> tuple[int, ...]:
    return tuple(self.inner.encode(text, add_special_tokens=False).ids)

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


def load(path: str, template: str = "marks") -> Tokenizer:
  """Reads `tokenizer.json`.

  Args:
    path: the file.
    template: `config.data.template`, a name of `TEMPLATES`.

  Raises:
    DataError: the file is missing, not a tokenizer, or lacks a special token.
    UsageError: an unknown template.
  """
  path = str(path)
  if template not in TEMPLATES:
    raise UsageError(f"config.data.template is '{template}'; {nearest(template, TEMPLATES)}")
  if not os.path.isfile(path):
    raise DataError(f"{path}: there is no tokenizer; run `vlm-jax data prepare` or set "
                    "config.data.tokenizer to a tokenizer.json")
  try:
    return Tokenizer(tokenizers.Tokenizer.from_file(path), template)
  except Exception as error:  # the library raises bare Exception for every broken file
    raise DataError(f"{path} is not a usable tokenizer.json ({error}); delete it and run "
                    "`vlm-jax data prepare`, or set config.data.tokenizer to another") from error
