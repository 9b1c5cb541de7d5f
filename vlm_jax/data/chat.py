"""Chat templates: Jinja that writes a conversation as the one text that a published model reads.

Templates come with files of strangers, so they run in Jinja's immutable sandbox and are given
nothing but strings, lists and dicts. As in transformers, blocks are trimmed, `raise_exception`,
`tojson`, `break` and `continue` are there, and `{% generation %}` stands around what an assistant
says. The date is not: the same conversation is the same text tomorrow.

A template is asked twice: with the texts, and with a name for each text, which tells where the
texts stand in what it wrote. One that leaves a turn out, or writes it twice, is refused at once.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vlm_jax.core.errors import UsageError
from vlm_jax.data.bad import BadExample

FIELD = "config.data.template"
# Of Unicode's private use: around what is generated, and around the number that names a text.
BEGIN, END, OPEN, CLOSE = PRIVATE = "\uf8f0\uf8f1\uf8f2\uf8f3"
NAME = re.compile(f"{OPEN}(\\d+){CLOSE}")
HIDE = str.maketrans("", "", PRIVATE)
Part = str | None  # of a message: a text, or None for a picture
Message = tuple[str, Sequence[Part]]  # a role and its parts


@dataclasses.dataclass(frozen=True)
class Written:
  """A conversation as text.

  Attributes:
    text: what the template wrote.
    texts: (start, end) of every text part in it, in order.
    closes: where what closes each of them ends, a special token directly behind it; its own end
      without one.
    generated: (start, end) of the blocks marked `{% generation %}`; None: the template has none.
  """

  text: str
  texts: tuple[tuple[int, int], ...]
  closes: tuple[int, ...]
  generated: tuple[tuple[int, int], ...] | None


class _Generation(Extension):
  """Puts `BEGIN` and `END` around what stands in {% generation %}."""

  tags = {"generation"}

  def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return nodes.CallBlock(self.call_method("_around"), [], [], body).set_lineno(line)

  def _around(self, caller: Any) -> str:
    return BEGIN + caller() + END


class Template:
  """A chat template.

  Attributes:
    source: its text.
    ends: the special tokens directly behind what an assistant says.
  """

  def __init__(self, source: str, roles: Mapping[str, str], specials: Sequence[str]):
    """Compiles a template and tries it on a conversation.

    Args:
      source: the text of the template.
      roles: the special tokens by the names that templates call them, "bos_token", "image_token".
      specials: all special tokens of the tokenizer.

    Raises:
      UsageError: it cannot be parsed, reaches out of the sandbox, or does not write a turn once.
    """
    self.source, self._roles = source, dict(roles)
    closing = "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or "(?!)"
    self._closing = re.compile(rf"\s*({closing})")
    environment = ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension])
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    try:
      self._template = environment.from_string(source)
      self._parts = self._takes_parts()
      first, later = self._try(prompt=False), self._try(prompt=True)
    except BadExample as error:
      raise UsageError(f"{FIELD}: {error.detail}") from error
    except jinja2.TemplateError as error:
      where = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
      raise UsageError(f"{FIELD}: the chat template cannot be used ({error}{where}); choose "
                       "another") from error
    found = self._closing.match(first.text, first.texts[-1][1])
    self.ends = (found.group(1),) if found else ()
    if len(later.text) <= len(first.text[: later.texts[-1][1]]):
      raise UsageError(f"{FIELD}: the chat template does not open the assistant's turn where "
                       "add_generation_prompt asks for it; choose another")

  def write(self, messages: Sequence[Message], prompt: bool) -> Written:
    """Writes a conversation.

    Args:
      messages: in order.
      prompt: opens the assistant's turn at the end.

    Raises:
      BadExample: "unknown_role", when the template refuses it, or changes more than the blanks
        around a text.
    """
    hidden = [(role, [part if part is None else part.translate(HIDE) for part in parts])
              for role, parts in messages]
    texts = [part for _, parts in hidden for part in parts if part is not None]
    names = iter(range(len(texts)))
    named = [(role, [part if part is None else f"{OPEN}{next(names)}{CLOSE}" for part in parts])
             for role, parts in hidden]
    pieces = NAME.split(self._render(named, prompt).translate(str.maketrans("", "", BEGIN + END)))
    if pieces[1::2] != [str(number) for number in range(len(texts))]:
      raise BadExample("unknown_role", f"the chat template writes the turns {pieces[1::2]} of "
                       f"{len(texts)}; choose one that writes each once and in order")
    text, generated = _generated(self._render(hidden, prompt))
    spans, at = [], _after(text, 0, pieces[0])
    for part, behind in zip(texts, pieces[2::2], strict=True):
      for said in (part, part.strip(), part.lstrip(), part.rstrip()):
        if text.startswith(said + behind, at):
          break
      else:
        raise BadExample("unknown_role", "the chat template changes what a turn says")
      spans.append((at, at + len(said)))
      at += len(said) + len(behind)
    if at != len(text):
      raise BadExample("unknown_role", "the chat template says more of some texts than of others")
    closes = [found.end() if (found := self._closing.match(text, end)) else end
              for _, end in spans]
    block = re.search(r"\{%[-+]?\s*generation\b", self.source)
    return Written(text, tuple(spans), tuple(closes), tuple(generated) if block else None)

  def _render(self, messages: Sequence[Message], prompt: bool, parts: bool | None = None) -> str:
    parts = self._parts if parts is None else parts
    told = [{"role": role, "content": self._content(content, parts)} for role, content in messages]
    return self._template.render(messages=told, tools=None, documents=None,
                                 add_generation_prompt=prompt, **self._roles)

  def _content(self, content: Sequence[Part], parts: bool) -> str | list[dict[str, str]]:
    """The content of a message as a list of objects, or as a string with the pictures' token."""
    if parts:
      return [{"type": "image"} if part is None else {"type": "text", "text": part}
              for part in content]
    image = self._roles.get("image_token", "")
    return "".join(f"{image}\n" if part is None else part for part in content)

  def _takes_parts(self) -> bool:
    """Whether the template takes a content in parts, as those of models that see do."""
    try:
      written = self._render([("user", ["text"])], False, parts=True)
    except (jinja2.TemplateError, BadExample, TypeError):
      return False
    return "'type'" not in written and '"type"' not in written and "text" in written

  def _try(self, prompt: bool) -> Written:
    """Writes a conversation of two turns, in which every text is to appear."""
    turns = [("user", ["a"]), ("assistant", ["b"]), ("user", ["c"]), ("assistant", ["d"])]
    try:
      return self.write(turns[:3] if prompt else turns, prompt)
    except (TypeError, ValueError, AttributeError, LookupError) as error:
      raise UsageError(f"{FIELD}: the chat template cannot be used ({error}); choose another"
                       ) from error


def is_template(text: str) -> bool:
  """Whether a text is a template, rather than the name of one."""
  return "{%" in text or "{{" in text


def _refuse(message: str) -> None:
  raise BadExample("unknown_role", f"the chat template refuses it: {message}")


def _after(text: str, at: int, expected: str) -> int:
  """Where `expected` ends in the text, if it begins at `at`; else `at`."""
  return at + len(expected) if text.startswith(expected, at) else at


def _generated(text: str) -> tuple[str, list[tuple[int, int]]]:
  """A text without its marks of what is generated, and where they stood."""
  spans, start, clean = [], 0, ""
  for piece in re.split(f"([{BEGIN}{END}])", text):
    if piece == BEGIN:
      start = len(clean)
    elif piece == END:
      spans.append((start, len(clean)))
    else:
      clean += piece
  return clean, spans
