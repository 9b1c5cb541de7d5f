"""The tokenizer files of a published checkpoint, read as transformers reads them.

A directory with tokenizer.json (a SigLIP: spiece.model), which says what stands at the ends of a
text, and tokenizer_config.json: what the special tokens are called, on which side a text is padded,
and of which class the tokenizer is. Some classes do more to a text than their files say: `CLASSES`.
The chat template is chat_template.jinja, or a field of chat_template.json, processor_config.json or
tokenizer_config.json.
"""

import dataclasses
import json
import os
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import normalizers, processors

from vlm_jax.core.errors import DataError
from vlm_jax.data import spiece

CONFIG, TOKENIZER, PIECES = "tokenizer_config.json", "tokenizer.json", "spiece.model"
CHAT = "chat_template.jinja"
# All that turns texts into ids, in the order in which the later ones have the last word.
SETTINGS = ("special_tokens_map.json", CONFIG)
CHATS = ("processor_config.json", "chat_template.json", CONFIG)
FILES = (TOKENIZER, PIECES, "vocab.json", "merges.txt", "added_tokens.json", CHAT, *SETTINGS,
         *CHATS[:2])
ROLES = ("pad_token", "bos_token", "eos_token", "unk_token", "image_token")
PUNCTUATION = str.maketrans("", "", string.punctuation)
# What a class means where its files are silent.
CLASSES: Mapping[str, Mapping[str, Any]] = {
  "CLIPTokenizer": {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
                    "pad_token": "<|endoftext|>"},
  "SiglipTokenizer": {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>",
                      "do_lower_case": True},
  "Siglip2Tokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
                       "padding_side": "left"},
  "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
                     "padding_side": "left"},
}
# Those whose ends no file decides: opening, closing.
ENDS = {"CLIPTokenizer": (True, True), "SiglipTokenizer": (False, True)}


@dataclasses.dataclass(frozen=True)
class Published:
  """A published tokenizer.

  Attributes:
    inner: the tokenizer, with the ends of a text as its post-processor.
    settings: of tokenizer_config.json, and what its class adds to them.
    kind: the class, without "Fast".
    chat: the chat template, "" without one.
    pieces: whether `inner` is a model of sentencepiece, which puts no mark before a text itself.
  """

  inner: tokenizers.Tokenizer
  settings: Mapping[str, Any]
  kind: str
  chat: str
  pieces: bool = False

  def token(self, role: str) -> str | None:
    """What plays a role of `ROLES`; None: nothing does."""
    return _content(self.settings.get(role))

  def tokens(self) -> dict[str, str]:
    """All special tokens that have a name, by it."""
    return {role: token for role, value in self.settings.items()
            if role.endswith("_token") and isinstance(token := _content(value), str)}

  def prepared(self, text: str) -> str:
    """The text as it goes into `inner`."""
    if self.kind != "SiglipTokenizer":
      return text
    # What SigLIP's training leaves of a text (canonicalize_text of big_vision); the mark, which is
    # no blank, stays in front of the first word.
    if self.pieces:
      text = spiece.MARK + text.replace(spiece.MARK, " ")
    text = text.lower() if self.settings["do_lower_case"] else text
    return re.sub(r"\s+", " ", text.translate(PUNCTUATION)).strip()


def read(directory: Path) -> Published:
  """The tokenizer of a checkpoint.

  Raises:
    DataError: there is none, or a file is damaged.
  """
  settings: dict[str, Any] = {}
  for name in SETTINGS:
    settings |= _json(directory / name)
  extra = settings.get("extra_special_tokens")
  settings |= extra if isinstance(extra, dict) else {}
  kind = (settings.get("tokenizer_class") or "").removesuffix("Fast")
  settings = {**CLASSES.get(kind, {}), **{k: v for k, v in settings.items() if v is not None}}
  inner = _inner(directory, kind)
  _set_ends(inner, settings, kind, directory)
  if kind == "Siglip2Tokenizer":
    steps = [inner.normalizer] if inner.normalizer else []
    inner.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])
  pieces = kind == "SiglipTokenizer" and (directory / PIECES).is_file()
  return Published(inner, settings, kind, chat_template(directory), pieces)


def paths(directory: str | os.PathLike) -> list[str]:
  """Those of `FILES` that a directory has."""
  found = (os.path.join(directory, name) for name in FILES)
  return [path for path in found if os.path.isfile(path)]


def chat_template(directory: Path) -> str:
  """The chat template of a checkpoint, "" without one."""
  if (directory / CHAT).is_file():
    return (directory / CHAT).read_text(encoding="utf-8")
  for name in CHATS:
    found = _json(directory / name).get("chat_template")
    if isinstance(found, list):  # several with a name each
      found = {one.get("name"): one.get("template") for one in found}.get("default")
    if found:
      return found
  return ""


def _inner(directory: Path, kind: str) -> tokenizers.Tokenizer:
  if kind == "SiglipTokenizer" and (directory / PIECES).is_file():
    return spiece.read(directory / PIECES)
  path = directory / TOKENIZER
  if not path.is_file():
    raise DataError(f"{directory} has no {TOKENIZER}; put the one of the model there")
  try:
    inner = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises bare Exception for every broken file
    raise DataError(f"{path} is not a usable tokenizer.json ({error}); put the one of the model "
                    "there") from error
  inner.no_padding()
  inner.no_truncation()
  return inner


def _set_ends(inner: tokenizers.Tokenizer, settings: Mapping[str, Any], kind: str,
              directory: Path) -> None:
  """Makes the post-processor write what the class has at the ends of a text.

  Of others tokenizer.json alone says it: beside one, add_bos_token and add_eos_token are not read.
  """
  if kind not in ENDS:
    return
  ends = []
  for role, wanted in zip(("bos_token", "eos_token"), ENDS[kind], strict=True):
    token = _content(settings.get(role)) if wanted else None
    if token and inner.token_to_id(token) is None:
      raise DataError(f"{directory / CONFIG}: {role} is '{token}', which the tokenizer has not; "
                      "put the files of one checkpoint there")
    ends.append(token)
  bos, eos = ends
  inner.post_processor = processors.TemplateProcessing(
    single=" ".join(filter(None, (bos, "$A", eos))),
    special_tokens=[(token, inner.token_to_id(token)) for token in dict.fromkeys(ends) if token])


def _content(token: Any) -> str | None:
  """A special token, which files write as text or as an object."""
  return token.get("content") if isinstance(token, dict) else token


def _json(path: Path) -> dict[str, Any]:
  """The object in a file; {} without one."""
  if not path.is_file():
    return {}
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise DataError(f"{path} is not readable JSON ({error}); download it again") from error
  if not isinstance(found, dict):
    raise DataError(f"{path} holds no object; download it again")
  return found
