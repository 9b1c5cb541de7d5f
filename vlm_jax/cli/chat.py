"""A conversation about pictures in the terminal; the answer is written while it is being said.

  /image FILE    a picture, alone on its line or where it stands in the question, in quotes if its
                 name has blanks: is /image a.png larger than /image "b c.png"?
  /clear         forgets everything said and shown
  /quit          ends, and so does the end of the input

Ctrl-C stops the answer and not the program. Lines may also come from a pipe: answers go to the
standard output, everything else to the standard error.
"""

import argparse
import dataclasses
import re
import sys
from typing import Any

from vlm_jax.cli import config as recipes
from vlm_jax.core.errors import UsageError, UserError, nearest

SUMMARY = "a conversation about pictures"
COMMANDS = ("/clear", "/image", "/quit")
PICTURE = re.compile(r'(?<!\S)/image\s+("[^"]+"|\'[^\']+\'|\S+)')
MARK = "<image>"


def arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  recipes.model(parser)
  parser.add_argument("--image", action="append", default=[], metavar="FILE",
                      help="a picture for the first question; may be repeated")
  recipes.answering(parser, 256)


def run(args: argparse.Namespace) -> None:
  """Answers line after line."""
  from vlm_jax.generate.answer import check_tokens

  check_tokens(args.max_tokens)
  sampling = recipes.sampling(args)
  bundle = recipes.open_model(args)
  refuse_silence(bundle.config, args.workdir)
  chat = Chat(bundle, args.max_tokens, sampling)
  chat.show(args.image)
  tell(f"{bundle.config.fusion.name} at step {bundle.step}; /image FILE shows a picture, /clear "
       "forgets, /quit ends")
  while (line := read()) is not None:
    try:
      if not chat.take(line):
        return
    except UserError as error:
      tell(str(error))


def refuse_silence(config: Any, workdir: str) -> None:
  """Raises a UsageError for a model that says nothing, or nothing but captions."""
  from vlm_jax.core.fusion import find_fusion, speaking

  voice, name = speaking(config), config.fusion.name
  if not find_fusion(voice).STREAM:
    raise UsageError(f"--workdir {workdir}: a '{name}' compares pictures with texts and says "
                     "nothing; give a model that speaks")
  if voice.fusion.name != name:  # it says what another objective than a conversation has taught
    raise UsageError(f"--workdir {workdir}: a '{name}' captions pictures and is not talked with; "
                     "use `vlm-jax generate --prompt= --image=FILE`, or give a model that answers")


def read() -> str | None:
  """The next line, None at the end; Ctrl-C throws away what was typed."""
  prompt = "> " if sys.stdin.isatty() else ""
  try:
    return input(prompt)
  except EOFError:
    return None
  except KeyboardInterrupt:
    tell("\n/quit or Ctrl-D ends")
    return ""


def tell(text: str) -> None:
  """What is not the model's to say."""
  print(text, file=sys.stderr, flush=True)


class Chat:
  """A conversation and the model that holds it.

  Attributes:
    turns: the parts of every question, and the answer to it.
    shown: pictures that stand before the next question.
  """

  def __init__(self, bundle: Any, max_tokens: int, sampling: Any):
    """Nothing is said yet."""
    from vlm_jax.generate.dialogue import Dialogue, keeps

    config = bundle.config
    self._bundle, self._max_tokens, self._sampling = bundle, max_tokens, sampling
    self._room = min(config.data.tokens, config.llm.positions or config.data.tokens)
    self._dialogue = Dialogue(config, self._room) if keeps(config) else None
    self.turns: list[tuple[tuple, str]] = []
    self.shown: list = []

  def take(self, line: str) -> bool:
    """Does what a line says; False when it ends the conversation.

    Raises:
      UserError: what cannot be done; the conversation is what it was before the line.
    """
    line = line.strip()
    if line == "/quit":
      return False
    if line == "/clear":
      self.turns, self.shown = [], []
      tell("everything said and shown is forgotten")
    elif not (question := PICTURE.sub(f" {MARK} ", line).strip()):
      return True
    elif question.startswith("/"):
      word = question.split()[0]
      raise UsageError("/image needs the name of a file" if word == "/image" else
                       f"no command '{word}'; {nearest(word, COMMANDS)}")
    else:
      files = [name.strip("\"'") for name in PICTURE.findall(line)]
      if question.replace(MARK, "").strip():
        self.ask(question, files)
      else:
        self.show(files)
    return True

  def show(self, files: list[str]) -> None:
    """Puts pictures before the next question; a DataError names the one that cannot be read."""
    self.shown += [self._bundle.image(file) for file in files]

  def ask(self, question: str, files: list[str]) -> None:
    """Answers a question; it and the answer are remembered."""
    new = [self._bundle.image(file) for file in files]
    if self.shown and new:
      question = MARK * len(self.shown) + question
    alone = self._bundle.question(question, [*self.shown, *new])
    self._make_room(alone.parts[:-1])
    document = alone
    if self.turns:
      document = self._behind(_trunk(alone.parts))
    pieces: list[str] = []

    def write(piece: str) -> None:
      pieces.append(piece)
      print(piece, end="", flush=True)

    try:
      self._bundle.generate([document], max_tokens=self._max_tokens, sampling=self._sampling,
                            write=write, dialogue=self._dialogue)
    except KeyboardInterrupt:
      tell("\nstopped; what was said so far is remembered")
    finally:
      print(flush=True)
    self.shown = []
    if said := "".join(pieces).strip():
      self.turns.append((_trunk(alone.parts[:-1]), said))

  def _behind(self, parts: tuple) -> Any:
    """The document of what was said, laid out as training does it, and of `parts` behind that."""
    from vlm_jax.core.document import Document, Text

    said = (part for question, answer in self.turns
            for part in (*question, Text(answer, "assistant", loss=True)))
    return Document((*said, *parts), "", "chat")

  def _make_room(self, question: tuple) -> None:
    """Forgets the oldest turns, and says so, until the rest, the question and an answer fit.

    Raises:
      UsageError: the question alone does not.
    """
    room, forgotten, kept = self._room, 0, list(self.turns)
    while True:
      document = self._behind(_trunk(question))
      needed = self._bundle.slots(document) + self._max_tokens
      if needed <= room:
        break
      if not self.turns:
        self.turns = kept
        raise UsageError(f"the question and an answer of {self._max_tokens} tokens take {needed} "
                         f"slots, and the model reads {room} (config.data.tokens); shorten it, or "
                         "give --max-tokens a smaller number")
      self.turns, forgotten = self.turns[1:], forgotten + 1
    if forgotten:
      tell(f"the conversation is longer than the {room} slots that the model reads: the oldest "
           f"{forgotten} question(s) and answer(s), with their pictures, are forgotten")


def _trunk(parts: tuple) -> tuple:
  """Parts as turns of a conversation, which has no branches."""
  return tuple(dataclasses.replace(part, branch=0) if hasattr(part, "branch") else part
               for part in parts)
