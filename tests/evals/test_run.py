"""Evaluations end to end on a tiny model of noise."""

import json

import jax
import numpy as np
import pytest

from tests.evals.tiny_source import RECORDS
from vlm_jax.core import digest
from vlm_jax.core.errors import DataError, DiskError, UsageError
from vlm_jax.data import pipeline, records
from vlm_jax.evals import asking, run
from vlm_jax.evals.kinds import vqa
from vlm_jax.generate import answer
from vlm_jax.generate.decode import Generated
from vlm_jax.train import checkpoint


def changed(config, name, **fields):
  config = config.copy_and_resolve_references()
  config.evals[name].update(fields)
  return config


def ask(setup, images="real", **fields):
  config, params = setup
  config = changed(config, "look", **fields)
  rows, bad = asking.ask(config, params, config.evals.look, "test", images)
  return vqa.score(rows, config.seed) | {"bad": bad}, rows


def test_side_by_side_is_alone(setup):
  together, rows = ask(setup)
  alone, rows_alone = ask(setup, together=1)
  keys = [row["key"] for row in rows]
  assert keys == [row["key"] for row in rows_alone] == sorted(keys, key=lambda k: k.split("/")[2:])
  assert len(keys) == sum(1 + i % 5 for i in range(RECORDS)) == together["questions"]
  for row, row_alone in zip(rows, rows_alone, strict=True):
    assert row["prediction"] == row_alone["prediction"]
    assert row["log_prob"] == pytest.approx(row_alone["log_prob"], abs=1e-3)
  # The predictions differ by question, or an exchange would not be seen.
  assert len({row["prediction"] for row in rows}) > 5
  assert together["bad"] == alone["bad"] == 1


def test_another_image_gives_other_answers_and_no_image_is_no_image(setup):
  said = {images: {row["key"]: row["prediction"] for row in ask(setup, images)[1]}
          for images in ("real", "shuffled", "none")}
  for one, other in (("real", "shuffled"), ("real", "none"), ("shuffled", "none")):
    both = said[one].keys() & said[other].keys()
    assert len(both) > 10 and sum(said[one][key] != said[other][key] for key in both) > 5
  # Without an image the broken one does no harm, and equal questions have one answer.
  score, rows = ask(setup, "none")
  assert score["bad"] == 0 and score["questions"] == len(said["real"]) + 2
  assert len({(row["question"], row["prediction"]) for row in rows}) == len(
    {row["question"] for row in rows})


def test_what_is_said_is_scored(setup, monkeypatch):
  words = pipeline.load_tokenizer(setup[0])

  def say(config, params, prompts, *, max_tokens, **options):
    """Every odd turn of a row says "Yes.", the others say "no"."""
    shape = (*prompts.ends.shape, max_tokens)
    tokens, lengths = np.zeros(shape, np.int32), np.zeros(shape[:2], np.int32)
    for turn in range(shape[1]):
      said = words.encode("no" if turn % 2 else "Yes.")
      tokens[:, turn, : len(said)], lengths[:, turn] = said, len(said)
    return Generated(tokens, lengths, lengths > 0, np.zeros(shape), np.int32(1))

  monkeypatch.setattr(answer, "generate", say)
  score, rows = ask(setup, max_tokens=8)
  assert {(row["key"].split("/")[-1], row["prediction"], row["score"]) for row in rows} == {
    ("1", "Yes.", 1.0), ("2", "no", 0.0), ("3", "Yes.", 1.0), ("4", "no", 0.0), ("5", "Yes.", 1.0)}
  assert score["accuracy"] == pytest.approx(np.mean([row["score"] for row in rows]))
  assert score["low"] < score["accuracy"] < score["high"] and score["exact_match"] == 0


def test_files(setup, tmp_path):
  config, params = setup
  lines = []
  results = run.evaluate(config, params, tmp_path, step=7, names=["look"], report=lines.append)
  assert list(results) == ["look"]
  assert "look: accuracy 0 [0, 0] with images real, 0 [0, 0] shuffled; 18 questions" in lines[0]
  rows = [json.loads(line) for line in open(tmp_path / "predictions/look.jsonl")]
  assert len(rows) == results["look"]["questions"]
  assert set(rows[0]) == {"key", "document", "question", "prediction", "answers", "score", "exact",
                          "log_prob", "step"} and rows[0]["step"] == 7
  assert (tmp_path / "predictions/look_shuffled.jsonl").exists()
  run.evaluate(config, params, tmp_path, step=7, names=["read"], split="train")
  written = json.loads((tmp_path / "evals/7.json").read_text())
  assert written["step"] == 7 and set(written["evals"]) == {"look", "read_train"}
  assert written["evals"]["look"] == results["look"]
  assert written["evals"]["look"]["entry"]["max_tokens"] == config.evals.look.max_tokens
  assert written["evals"]["read_train"]["entry"]["split"] == "train"
  assert (results["look"]["main"], results["look"]["unit"]) == ("accuracy", "questions")
  flat = run.in_loop(config, None)("look", params, 7)
  assert flat["shuffled/accuracy"] == 0.0 and "seconds" not in flat
  assert {name: value for name, value in run.scalars(results["look"]).items()} == flat


def test_a_number_says_what_it_was_measured_on(setup, tmp_path):
  config, params = setup
  config = changed(config, "read", limit=1)
  origin = lambda params, step=7: run.evaluate(config, params, None, step=step, names=["read"])[
    "read"]["origin"]
  found = origin(params)
  manifest = records.check(config.data.root)["files"]
  path = next(path for path in manifest if path.endswith("test.array_record"))
  words = f"{config.data.root}/tokenizer.json"
  assert found["files"] == {path: manifest[path], words: manifest["tokenizer.json"]}
  assert found["step"] == 7 and found["parameters"] == origin(params, 8)["parameters"]
  # The digest is that of the checkpoint's arrays, and one changed number is another.
  saved = checkpoint.make_manifest({"params": params}, {})["arrays"]
  assert found["parameters"] == digest.of_json(saved)
  leaves, tree = jax.tree.flatten(params)
  leaves[-1] = leaves[-1].at[..., 0].add(1e-6)
  assert found["parameters"] != origin(jax.tree.unflatten(tree, leaves))["parameters"]


def test_wrong_names_and_places(setup, tmp_path):
  config, params = setup
  with pytest.raises(UsageError, match="did you mean 'look'"):
    run.evaluate(config, params, None, names=["lock"])
  with pytest.raises(UsageError, match="config.evals.look.kind: no module 'vqaa' .*mean 'vqa'"):
    run.evaluate(changed(config, "look", kind="vqaa"), params, None)
  with pytest.raises(UsageError, match="did you mean 'pictures'"):
    run.evaluate(changed(config, "look", source="picture"), params, None)
  with pytest.raises(UsageError, match="no split 'tset'"):
    run.evaluate(config, params, None, names=["read"], split="tset")
  with pytest.raises(UsageError, match="together is 0"):
    run.evaluate(changed(config, "look", together=0), params, None)
  with pytest.raises(UsageError, match="limit is -1; use 0 for all"):
    run.evaluate(changed(config, "look", limit=-1), params, None)
  config = changed(config, "read", limit=1)
  for text in ("{", "[]", '{"step": 7, "evals": {"look": 3}}'):  # cut off, or of somebody else
    (tmp_path / "evals").mkdir(exist_ok=True)
    (tmp_path / "evals" / "7.json").write_text(text)
    with pytest.raises(DataError, match=r"evals/7.json is not what an evaluation writes .*again"):
      run.evaluate(config, params, tmp_path, step=7, names=["read"])
    assert (tmp_path / "evals" / "7.json").read_text() == text
  (tmp_path / "evals" / "7.json").rename(tmp_path / "evals" / "7.txt")
  (tmp_path / "predictions").write_text("in the way")
  with pytest.raises(DiskError, match="cannot be written"):
    run.evaluate(config, params, tmp_path, names=["look"])
