"""Options against a computation by hand: each option alone, from all its logits."""

import dataclasses

import numpy as np
import pytest

from tests.evals.tiny_source import OPTIONS
from tests.generate.helpers import forward
from vlm_jax.core.document import Document, Image, Text
from vlm_jax.core.errors import UsageError
from vlm_jax.data import pipeline, template
from vlm_jax.evals.kinds import choice


def changed(config, **fields):
  config = config.copy_and_resolve_references()
  config.evals.look.update({"kind": "choice", "form": "choice", **fields})
  return config


def decide(setup, images="real", **fields):
  config = changed(setup[0], **fields)
  return choice.decide(config, setup[1], config.evals.look, "test", images)


def alone(config, params, document):
  """log p of every option, the only branch of its document, from all logits; a twin a slot off."""
  words, decode = pipeline.load_tokenizer(config), pipeline.image_decoder(config)
  sums, wrong = [], []
  for number in (1, 2, 3):
    parts = [part for part in document.parts if getattr(part, "branch", 0) in (0, number)]
    last = dataclasses.replace(parts[-1], loss=True)
    encoded = template.encode(Document((*parts[:-1], last), document.source, "x"), words, decode)
    logits = forward(config, params, [encoded])[0][0].astype(np.float64)
    ids = encoded.parts[-1].ids[1:]
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    at = np.arange(len(logits) - len(ids) - 1, len(logits) - 1)
    sums.append(log_p[at, ids].sum())
    wrong.append(log_p[at - 1, ids].sum())
  return np.array(sums), np.array(wrong)


def test_options_side_by_side_are_options_alone(setup):
  config, params = changed(setup[0]), setup[1]
  rows, bad = decide(setup)
  documents = {document.key: document for document in
               pipeline.documents(config, "pictures", "test", "choice")}
  assert bad > 0 and len(rows) > 10
  for row in rows[:4]:
    want, wrong = alone(config, params, documents[row["key"]])
    np.testing.assert_allclose(row["log_probs"], want, atol=2e-3, rtol=1e-5)
    assert np.abs(wrong - want).max() > 0.2
  assert len({row["log_probs"][0] for row in rows}) > 5


def test_a_strategy_without_branches_is_asked_one_option_at_a_time(setup):
  config = changed(setup[0], limit=5)
  config.fusion.name, config.fusion.image_attention = "concat", "causal"  # no slot sees a later one
  plain = config.copy_and_resolve_references()
  plain.data.sources.pictures.form = "single"
  rows, _ = choice.decide(config, setup[1], config.evals.look, "test", "real")
  alone, _ = choice.decide(plain, setup[1], plain.evals.look, "test", "real")
  for one, other in zip(rows, alone, strict=True):
    assert one["tokens"] == other["tokens"]
    np.testing.assert_allclose(one["log_probs"], other["log_probs"], atol=2e-3, rtol=1e-5)
  assert rows[0]["log_probs"] != rows[1]["log_probs"]


def test_numbers_and_controls(setup):
  config = changed(setup[0], controls=("real", "shuffled"))  # real: asked already
  numbers, predictions = choice.run(config, setup[1], config.evals.look, "test")
  rows = predictions[""]
  for row in rows:
    best, mean = np.argmax(row["log_probs"]), np.argmax(np.divide(row["log_probs"], row["tokens"]))
    assert row["prediction"] == OPTIONS[best]
    assert row["score"] == (OPTIONS[best] in row["answers"])
    assert row["score_per_token"] == (OPTIONS[mean] in row["answers"])
  assert numbers["accuracy"] == pytest.approx(np.mean([row["score"] for row in rows]))
  assert numbers["low"] <= numbers["accuracy"] <= numbers["high"]
  assert numbers["chance"] == pytest.approx(1 / 3) and "circular" not in numbers
  assert set(numbers["controls"]) == set(predictions) - {""} == {"shuffled"}
  assert predictions["shuffled"][0]["log_probs"] != rows[0]["log_probs"]


PARTS = (Image(b""), *(part for n, option in enumerate(("x", "y", "z"), 1) for part in (
  Text("q?", "user", branch=n), Text(option, "assistant", loss=n == 2, branch=n))))


def test_rotations_list_every_option_at_every_place():
  document = Document(PARTS, "s", "k")
  asked = choice.read(document)
  assert (asked.options, asked.right, asked.question) == (("x", "y", "z"), 1, "q?")
  for shift, listed in enumerate(("A. x\nB. y\nC. z", "A. y\nB. z\nC. x", "A. z\nB. x\nC. y")):
    turned = choice.rotate(document, asked, shift).parts
    assert {part.text for part in turned[1::2]} == {f"q?\n{listed}\n{choice.INSTRUCTION}"}
    letters = [part.text for part in turned[2::2]]
    # The letter of a branch names its own option in the list.
    assert [listed.split("\n")["ABC".index(letter)][3:] for letter in letters] == ["x", "y", "z"]
    assert [part.loss for part in turned[2::2]] == [False, True, False]
  with pytest.raises(UsageError, match="27 options"):
    choice.rotate(document, dataclasses.replace(asked, options=("x",) * 27), 0)


def test_a_question_counts_when_every_rotation_is_right():
  asked = choice.Choice("k", "q?", ("x", "y"), 1)
  right, wrong = (np.array([-2.0, -1.0]), np.array([1, 1])), (np.array([-1.0, -2.0]), np.ones(2))
  row = lambda *scored: choice._row(asked, list(scored), True)
  assert (row(right, right)["score"], row(right, right)["circular"]) == (1, 1)
  assert (row(right, wrong)["score"], row(right, wrong)["circular"]) == (1, 0)
  assert (row(wrong, right)["score"], row(wrong, right)["circular"]) == (0, 0)
  # The longer option wins per token.
  long = choice._row(asked, [(np.array([-2.0, -3.0]), np.array([1, 3]))], False)
  assert (long["score"], long["score_per_token"]) == (0, 1)


def test_letters_end_to_end(setup, monkeypatch):
  """A model that always says B: right now and then, never under every rotation."""
  def say_b(config, params, documents, rows):
    words, b = pipeline.load_tokenizer(config), np.arange(3)
    letters = [[words.decode(part.ids[1:-1]).strip() for part in document.parts
                if getattr(part, "loss", b)[1:].any() and getattr(part, "branch", 0)]
               for document in documents]
    return [(np.array([-1.0 if letter == "B" else -2.0 for letter in one]), b + 1)
            for one in letters]

  config = changed(setup[0], options="letters", controls=())
  monkeypatch.setattr(choice, "of_branches", say_b)
  numbers, predictions = choice.run(config, setup[1], config.evals.look, "test")
  assert 0 < numbers["accuracy"] < 1 and numbers["circular"] == numbers["circular_high"] == 0
  assert {row["prediction"] for row in predictions[""]} == {OPTIONS[1]}


def test_what_is_no_choice_is_refused(setup):
  with pytest.raises(UsageError, match="is no choice"):
    decide(setup, form="fan_out")
  with pytest.raises(UsageError, match="is no choice"):
    decide(setup, form="single")
  config = changed(setup[0], options="letter")
  with pytest.raises(UsageError, match="did you mean 'letters'"):
    choice.run(config, setup[1], config.evals.look, "test")


def test_options_that_are_questions_of_their_own():
  turns = lambda k, word, loss: (Text(f"Is it: {word}?", "user", branch=k),
                                 Text("yes", "assistant", loss=loss, branch=k))
  document = Document((Image(b""), *turns(1, "lion", False), *turns(2, "taxi", True)), "x", "key")
  found = choice.read(document)
  assert found.options == ("Is it: lion? yes", "Is it: taxi? yes") and found.right == 1
  with pytest.raises(UsageError, match="document key asks no one question.*'text'"):
    choice.rotate(document, found, 1)
