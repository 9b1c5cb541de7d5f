"""What is kept of a conversation is what reading all of it again would give."""

import dataclasses
import functools

import numpy as np
import pytest

from tests.generate.helpers import noise, picture, tiny, words
from vlm_jax.core.document import Encoded, Tokens
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.layout import heard
from vlm_jax.generate import decode, dialogue
from vlm_jax.generate.prompts import layouts, slots, stack

TOLERANCE = 1e-5  # of log p; measured: at most 2e-6
# Few shapes, each of which is a program: 9 slots and then 4 or 8 new ones.
NEW, BUCKET, ROOM, K = 4, 8, 64, 4
STRATEGIES = [("concat", "causal"), ("prefix_lm", ""), ("flamingo", "last")]


@functools.cache
def model(fusion, attend):
  config = tiny(fusion, attend=attend or "causal")
  config.bridge.update(dict(every=1, first=0))
  config.tower.depth = 1
  return config, noise(config)


def turn(document, said, *parts):
  """The document with an answer, which training would have predicted, and a question behind it."""
  answer = Tokens(np.asarray(said, np.int32), np.ones(len(said), bool))
  return dataclasses.replace(document, parts=(*document.parts, answer, *parts))


def opening(seed=0):
  return Encoded((picture(seed), words(5, 1)), "pictures", "chat")


def lay_out(document, config):
  return layouts([document], config)[0]


class Talk:
  """A dialogue, and what it says to documents: (tokens, log p), and the slots it read for that."""

  def __init__(self, name):
    self.config, self.params = model(*name)
    self.dialogue = dialogue.Dialogue(self.config, ROOM)
    self._columns = 16 if name[0] == "concat" else 32  # of which the second turn needs more

  def __call__(self, document):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(dialogue, "COLUMNS", self._columns)
      *_, said = self.dialogue.stream(self.params, lay_out(document, self.config), stop=(-1,),
                                      max_tokens=NEW, bucket=BUCKET)
    return said.tokens[0, 0], said.log_probs[0, 0]

  def afresh(self, document):
    prompts = stack([lay_out(document, self.config)], self.config, rows=1, bucket=48)
    said = decode.generate(self.config, self.params, prompts, stop=(-1,), max_tokens=NEW)
    return np.asarray(said.tokens[0, 0]), np.asarray(said.log_probs[0, 0])

  def agrees(self, document):
    """The answer, which must be that of reading the whole document, and the slots read."""
    (tokens, log_p), (expected, exact) = self(document), self.afresh(document)
    print(f"{self.config.fusion.name}: log p {np.abs(log_p - exact).max():.1e}")
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_allclose(log_p, exact, rtol=0, atol=TOLERANCE)
    assert np.isfinite(exact).all() and exact.std() > 0.01
    return tokens.tolist(), self.dialogue.fed

  def size(self, document):
    return slots(lay_out(document, self.config))


@pytest.mark.parametrize("name", STRATEGIES, ids=str)
def test_answers_are_those_of_the_whole_and_only_what_is_new_is_read(name):
  assert dialogue.keeps(model(*name)[0])
  talk, first = Talk(name), opening()
  said, fed = talk.agrees(first)
  assert fed == talk.size(first) and len(set(said)) > 1
  # The last token of an answer is chosen and not yet read.
  second = turn(first, said, words(3, 2))
  said, fed = talk.agrees(second)
  assert fed == 1 + 3
  if name[0] == "prefix_lm":
    return  # a picture behind the first answer is causal, as in the others
  third = turn(second, said, picture(7), words(3, 3))
  _, fed = talk.agrees(third)
  assert fed == 1 + (1 if name[0] == "flamingo" else K) + 3


def test_what_was_not_said_as_it_is_written_is_read_again():
  talk = Talk(STRATEGIES[0])
  talk.agrees(opening())
  said, fed = talk.agrees(opening(5))  # another picture
  assert fed == K + 5
  wrong = [said[0], said[1] + 1, *said[2:]]
  assert talk.agrees(turn(opening(5), wrong, words(3, 2)))[1] == 3 + 3


def test_a_prefix_that_grows_is_read_again():
  talk, first = Talk(("prefix_lm", "")), opening()
  said, _ = talk.agrees(first)
  told = Tokens(np.asarray(said, np.int32), np.zeros(NEW, bool))  # nobody says it: it is a prompt
  longer = dataclasses.replace(first, parts=(*first.parts, told, words(3, 2)))
  assert talk.agrees(longer)[1] == talk.size(longer)


@pytest.mark.parametrize("name, other", [
  (("prefix_lm", ""), "prefix"), (STRATEGIES[0], "picture"), (("flamingo", "last"), "picture"),
], ids=str)
def test_keeping_too_much_is_seen(name, other, monkeypatch):
  """Twin of the comparison: what differs is taken for the same."""
  talk, first = Talk(name), opening()
  said, _ = talk(first)
  if other == "prefix":
    told = Tokens(np.asarray(said, np.int32), np.zeros(NEW, bool))
    after = dataclasses.replace(first, parts=(*first.parts, told, words(3, 2)))
  else:
    after = turn(opening(5), said, words(3, 2))
  monkeypatch.setattr(dialogue, "shared", lambda before, *_: len(before["streams/text/tokens"]))
  assert np.abs(talk(after)[1] - talk.afresh(after)[1]).max() > 100 * TOLERANCE


def test_an_interrupted_answer_is_read_as_far_as_it_was_heard():
  talk, first = Talk(STRATEGIES[0]), opening()
  pieces = talk.dialogue.stream(talk.params, lay_out(first, talk.config), max_tokens=NEW,
                                bucket=BUCKET, stop=(-1,))
  said = next(pieces).tokens[0, 0, :1]
  pieces.close()
  assert talk.agrees(turn(first, said, words(3, 2)))[1] == 1 + 3


def test_a_step_that_fails_leaves_nothing_behind(monkeypatch):
  talk, first = Talk(STRATEGIES[0]), opening()
  said, _ = talk(first)

  def fail(*args, **options):
    raise KeyboardInterrupt
    yield

  with monkeypatch.context() as patch:
    patch.setattr(dialogue, "sayings", fail)
    with pytest.raises(KeyboardInterrupt):
      talk(turn(first, said, words(3, 2)))
  assert talk.agrees(first)[1] == talk.size(first)


def test_what_does_not_fit_is_refused():
  talk = Talk(STRATEGIES[0])
  with pytest.raises(UsageError, match="take 65 slots, and there are 64"):
    talk(Encoded((words(61, 0),), "pictures", "long"))


def test_an_encoder_is_not_kept():
  assert not dialogue.keeps(tiny("simvlm"))


def test_slots_that_see_ahead_are_kept_with_what_they_see():
  config, _ = model("concat", "bidirectional")
  layout = lay_out(opening(), config)
  fields = heard(find_fusion(config).fields(config), "text")
  # Of an image of four slots one changes its position: the others have seen it.
  moved = dict(layout.arrays, **{"streams/text/positions": np.array(
    [0, 1, 9, *range(3, 9)], np.int32)})
  assert dialogue.shared(layout.arrays, layout.arrays, fields, "text") == 9
  assert dialogue.shared(layout.arrays, moved, fields, "text") == 0
  moved["streams/text/positions"] = np.array([*range(6), 9, 7, 8], np.int32)
  assert dialogue.shared(layout.arrays, moved, fields, "text") == 6
