"""`vlm-jax chat`: what is answered, remembered, forgotten and refused, line after line."""

import io
import sys

import pytest
from ml_collections import ConfigDict

import vlm_jax
from tests.data.broken_source import png
from tests.generate.helpers import noise, tiny
from vlm_jax.cli import chat
from vlm_jax.cli import main as cli
from vlm_jax.core.document import Document, Image, Text
from vlm_jax.core.errors import USAGE, UsageError
from vlm_jax.data import tokenizer

TOKENS = 4


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
  folder = tmp_path_factory.mktemp("chat")
  words = tokenizer.train(["what is it? a picture of a thing, and of no other thing"] * 3, 270)
  words.save(str(folder / "tokenizer.json"))
  (folder / "a.png").write_bytes(png(1, 40))
  (folder / "b b.png").write_bytes(png(2, 40))
  (folder / "text.png").write_text("no picture")
  config = tiny(form="single")
  config.llm.vocab_size = 270
  config.data.tokenizer = str(folder / "tokenizer.json")
  return vlm_jax.Bundle(config, noise(config), 7)


@pytest.fixture
def talk(bundle, tmp_path_factory, monkeypatch, capsys):
  """Lines and flags to (exit code, what the model said, what the program said, documents)."""
  asked = []
  generate = vlm_jax.Bundle.generate
  monkeypatch.setattr(vlm_jax.Bundle, "generate", lambda self, documents, **options: (
    asked.extend(documents), generate(self, documents, **options))[1])
  monkeypatch.setattr(vlm_jax, "load", lambda *args, **options: bundle)
  monkeypatch.chdir(bundle.config.data.tokenizer.rpartition("/")[0])

  def run(*lines, flags=()):
    asked.clear()
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    code = cli.main(["chat", "--workdir=run", f"--max-tokens={TOKENS}", *flags])
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err, list(asked)

  return run


def kinds(document):
  return [part.role if isinstance(part, Text) else "image" for part in document.parts]


def test_a_conversation(talk, bundle):
  code, said, told, asked = talk("", "/image a.png", "what is it?",
                                 'is /image "b b.png" no thing?', "and?", "/quit", "never")
  assert code == 0 and len(said) == len(asked) == 3 and "prefix_lm at step 7" in told
  assert kinds(asked[0]) == ["image", "user", "assistant"]
  assert kinds(asked[2]) == ["image", "user", "assistant", "user", "image", "user", "assistant",
                             "user", "assistant"]
  texts = [part.text for part in asked[2].parts if isinstance(part, Text)]
  assert texts == ["what is it?", said[0], "is", "no thing?", said[1], "and?", ""]
  # What is printed is what generation says of the conversation, laid out as training lays it out.
  by_hand = Document((Image(png(1, 40)), Text("what is it?", "user"),
                      Text(said[0], "assistant", loss=True), Text("is", "user"),
                      Image(png(2, 40)), Text("no thing?", "user", continues=True)), "", "x")
  answer = bundle.generate([by_hand], max_tokens=TOKENS)[0][0]
  assert answer.text == said[1]
  twin = Document(by_hand.parts[3:], "", "x")
  forgotten = bundle.generate([twin], max_tokens=TOKENS)[0][0]
  assert abs(forgotten.log_prob - answer.log_prob) > 1e-3 and bundle.slots(twin) < bundle.slots(
    by_hand)


def test_the_end_of_the_input_ends_it_and_clear_forgets(talk):
  code, said, told, asked = talk("what is it?", "/clear", "and?", flags=["--image=a.png"])
  assert code == 0 and len(said) == 2 and "is forgotten" in told
  assert [kinds(one) for one in asked] == [["image", "user", "assistant"], ["user", "assistant"]]


def test_what_is_wrong_is_said_and_the_conversation_goes_on(talk):
  code, said, told, asked = talk("/image gone.png", "/image text.png what?", "/image", "/claer",
                                 "what is <image>?", "what is it?")
  assert code == 0 and len(said) == len(asked) == 1
  assert kinds(asked[0]) == ["user", "assistant"]
  for sentence in ("gone.png: there is no such file", "text.png: the bytes are not an image",
                   "/image needs the name of a file", "no command '/claer'; did you mean '/clear'",
                   "write one <image> for each"):
    assert sentence in told
  assert len(told.strip().splitlines()) == 6
  assert talk("x", flags=["--image=gone.png"])[0] == 65
  assert talk("x", flags=["--max-tokens=0"])[0] == USAGE


def test_the_oldest_is_forgotten_and_it_is_said(talk, bundle):
  question = "what is it? " * 12
  alone = bundle.slots(bundle.question(question)) + TOKENS
  room = 2 * alone + 30  # two questions, and an answer of a few broken characters
  with bundle.config.unlocked():
    before, bundle.config.data.tokens = bundle.config.data.tokens, room
  try:
    code, said, told, asked = talk(*[question] * 4, "what is it? " * 99)
    turns = [sum(kind == "user" for kind in kinds(one)) for one in asked]
    assert code == 0 and turns[0] == 1 and max(turns) > 1 and len(turns) == 4
    assert all(bundle.slots(one) + TOKENS <= room for one in asked)
    assert f"longer than the {room} slots" in told and "are forgotten" in told
    assert told.count("are forgotten") == sum(
      now <= past for past, now in zip(turns, turns[1:], strict=False))
    assert f"slots, and the model reads {room}" in told and len(said) == 4
  finally:
    with bundle.config.unlocked():
      bundle.config.data.tokens = before


class Interrupted:
  """A bundle whose answers are interrupted after a word."""

  def __init__(self, bundle):
    self._bundle, self.config, self.asked = bundle, bundle.config, []

  def __getattr__(self, name):
    return getattr(self._bundle, name)

  def generate(self, documents, write, **options):
    self.asked += documents
    write("half ")
    raise KeyboardInterrupt


def test_ctrl_c_stops_the_answer_and_not_the_program(bundle, capsys, monkeypatch):
  model = Interrupted(bundle)
  conversation = chat.Chat(model, TOKENS, None)
  assert conversation.take("what is it?") and conversation.take("and?")
  said = capsys.readouterr()
  assert said.out == "half \nhalf \n" and said.err.count("stopped; what was said so far") == 2
  assert [part.text for part in model.asked[1].parts] == ["what is it?", "half", "and?", ""]

  def interrupt(prompt):
    raise KeyboardInterrupt

  monkeypatch.setattr("builtins.input", interrupt)
  assert chat.read() == "" and "/quit or Ctrl-D ends" in capsys.readouterr().err


@pytest.mark.parametrize("name,objective,sentence", [
  ("clip", "contrast", "a 'clip' compares pictures with texts and says nothing"),
  ("blip2_qformer", "itc", "a 'blip2_qformer' compares pictures with texts and says nothing"),
  ("blip2_qformer", "itg", "a 'blip2_qformer' captions pictures and is not talked with; use `vlm"),
])
def test_what_cannot_speak_is_refused(talk, bundle, monkeypatch, name, objective, sentence, capsys):
  config = bundle.config.copy_and_resolve_references()
  config.fusion.name, config.fusion.objectives = name, ConfigDict({objective: 1.0})
  monkeypatch.setattr(vlm_jax, "load", lambda *args, **options: vlm_jax.Bundle(config, {}))
  code = cli.main(["chat", "--workdir=run"])
  assert code == USAGE and sentence in capsys.readouterr().err


def test_a_question_that_fails_changes_nothing(bundle):
  conversation = chat.Chat(Interrupted(bundle), TOKENS, None)
  with pytest.raises(UsageError, match="write one <image>"):
    conversation.take("is <image> it?")
  assert conversation.turns == [] and conversation.shown == []
