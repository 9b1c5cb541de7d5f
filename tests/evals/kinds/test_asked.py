"""The kinds whose answers are text: what is said is scored as their metric scores it."""

import json

import numpy as np
import pytest

from tests.data.broken_source import png
from tests.evals.tiny_source import CAPTIONS, RECORDS
from vlm_jax.configs import base
from vlm_jax.core.errors import UsageError
from vlm_jax.data import pipeline
from vlm_jax.evals import asking
from vlm_jax.evals.kinds import anls, caption, find_kind, measure, pope, relaxed, vqa
from vlm_jax.evals.metrics import captions, ptb
from vlm_jax.generate import answer
from vlm_jax.generate.decode import Generated


def rows_of(*pairs):
  return [{"document": f"d{i // 2}", "prediction": said, "answers": answers}
          for i, (said, answers) in enumerate(pairs)]


def test_scores_are_those_of_the_metric():
  rows = rows_of(("kitten", ["sitting", "mitten"]), ("a", ["xyz"]))
  assert anls.score(rows, 0)["anls"] == pytest.approx((5 / 6 + 0) / 2)
  assert [row["score"] for row in rows] == pytest.approx([5 / 6, 0])
  rows = rows_of(("10.4", ["10"]), ("11", ["10"]), ("Red", ["red"]))
  assert relaxed.score(rows, 0)["accuracy"] == pytest.approx(2 / 3)
  rows = rows_of(("yes", ["yes"]), ("Yes, it is.", ["no"]), ("No.", ["no"]), ("no", ["yes"]))
  numbers = pope.score(rows, 0)
  assert [row["score"] for row in rows] == [1, 0, 1, 0]
  assert (numbers["f1"], numbers["yes_ratio"], numbers["accuracy"]) == (0.5, 0.5, 0.5)
  with pytest.raises(UsageError, match="yes or no, and 'red' is the answer of"):
    pope.score(rows_of(("yes", ["yes"]), ("blue", ["red"])), 0)
  rows = rows_of(("Two.", ["2"] * 2 + ["three"] * 8), ("x", ["y"]))
  assert vqa.score(rows, 0)["accuracy"] == pytest.approx(0.3)
  for kind in (anls, relaxed, pope, vqa):
    numbers = kind.score(rows_of(("yes", ["yes"]), ("1", ["no"]), ("no", ["no"])), 0)
    assert numbers["low"] <= numbers[kind.MAIN] <= numbers["high"] and numbers[kind.UNIT] == 3


def test_ten_answers_of_a_source_are_scored_officially(setup, tmp_path, monkeypatch):
  """Five said "two", two said "2", three "red": what a model that says "2" earns, and "Red."."""
  said = ["two"] * 5 + ["2"] * 2 + ["red"] * 3
  (tmp_path / "000000000001.jpg").write_bytes(png(1, 16))
  (tmp_path / "q.json").write_text(json.dumps({"data_subtype": "val2017", "questions": [
    {"image_id": 1, "question_id": k, "question": "why"} for k in (1, 2)]}))
  (tmp_path / "a.json").write_text(json.dumps({"annotations": [
    {"question_id": k, "image_id": 1, "multiple_choice_answer": "two",
     "answers": [{"answer": one, "answer_id": i} for i, one in enumerate(said)]}
    for k in (1, 2)]}))
  config = setup[0].copy_and_resolve_references()
  config.data.sources.vqa = base.source(name="vqav2", path=str(tmp_path / "q.json"),
                                        annotations=str(tmp_path / "a.json"))
  config.evals.look.update({"source": "vqa", "form": "fan_out", "controls": ()})
  words = pipeline.load_tokenizer(config)

  def say(config, params, prompts, *, max_tokens, **options):
    """The first question of a row is answered "2", the second "Red."."""
    shape = (*prompts.ends.shape, max_tokens)
    tokens, lengths = np.zeros(shape, np.int32), np.zeros(shape[:2], np.int32)
    for turn, text in enumerate(("2", "Red.")):
      ids = words.encode(text)
      tokens[:, turn, : len(ids)], lengths[:, turn] = ids, len(ids)
    return Generated(tokens, lengths, lengths > 0, np.zeros(shape), np.int32(1))

  monkeypatch.setattr(answer, "generate", say)
  numbers, predictions = measure(vqa, config, setup[1], config.evals.look, "train")
  # "two" is 2, so every one of the ten finds three others; of red's three each finds two.
  assert [row["score"] for row in predictions[""]] == pytest.approx([1, (7 * 1 + 3 * 2 / 3) / 10])
  assert [list(row["answers"]) for row in predictions[""]] == [said, said]
  # Twin: with the one answer that is learned the second would earn nothing.
  assert vqa.score(rows_of(("Red.", ["two"])), 0)["accuracy"] == 0
  assert numbers["accuracy"] == pytest.approx(0.95)


def test_captions_are_scored_as_a_corpus():
  rng = np.random.default_rng()
  words = "a the dog, cat. runs (in) park".split()
  draw = lambda: " ".join(rng.choice(words, rng.integers(2, 9)))
  rows = [{"document": str(i), "prediction": draw(), "answers": [draw() for _ in range(3)]}
          for i in range(20)]
  numbers = caption.score(rows, 0)
  said = [ptb.tokenize(row["prediction"]) for row in rows]
  truth = [[ptb.tokenize(answer) for answer in row["answers"]] for row in rows]
  assert numbers["cider"] == pytest.approx(captions.cider_d(said, truth).mean())
  assert numbers["cider"] == pytest.approx(np.mean([row["score"] for row in rows]))
  bleu = captions.bleu(captions.bleu_counts(said, truth))
  assert [numbers[f"bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx(list(bleu))
  assert numbers["low"] < numbers["cider"] < numbers["high"]
  assert numbers["bleu_4_low"] < numbers["bleu_4_high"]
  assert numbers["rouge_l"] > 0 and numbers["tokenizer"] == "ptb" and numbers["pictures"] == 20


@pytest.mark.parametrize("window", [32, 1])  # batches read together: references come later too
def test_a_picture_is_captioned_once_and_has_all_references(setup, window, monkeypatch):
  monkeypatch.setattr(asking, "WINDOW", window)
  config = setup[0].copy_and_resolve_references()
  config.evals.look.update({"kind": "caption", "form": "caption", "controls": ("none",),
                            "batch": 3})
  kind = find_kind("caption")
  numbers, predictions = kind.run(config, setup[1], config.evals.look, "test")
  rows = predictions[""]
  assert numbers["pictures"] == len(rows) == RECORDS and numbers["bad"] == 2
  assert [list(row["answers"]) for row in rows] == [
    list(CAPTIONS[: 1 + i % 5]) for i in range(RECORDS)]
  assert len({row["prediction"] for row in rows}) > 2
  # Without a picture there is nothing to tell them apart.
  blind = predictions["none"]
  assert len(blind) == RECORDS + 1 and len({row["prediction"] for row in blind}) == 1
