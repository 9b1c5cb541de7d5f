"""A run directory with everything a report can show, written without training."""

import json

import pytest

from tests.generate.helpers import tiny
from vlm_jax.configs import base
from vlm_jax.data import prepare
from vlm_jax.train.workdir import Workdir

SOURCE = "tests.evals.tiny_source"
VOCAB = 270
STEPS = range(10, 101, 10)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
  root = str(tmp_path_factory.mktemp("report") / "data")
  prepare.prepare(root, [SOURCE], VOCAB, log=lambda line: None)
  return root


@pytest.fixture
def config(data):
  config = tiny()
  config.llm.vocab_size = VOCAB
  config.data.root, config.data.bad_limit, config.data.prefetch = data, 0.5, 0
  config.data.rows, config.data.tokens, config.data.images = 2, 120, 4
  del config.data.sources["pictures"], config.data.sources["words"]
  config.data.sources.pictures = base.source(name=SOURCE, form="fan_out")
  config.data.sources.words = base.source(name=SOURCE, form="text")
  config.evals.look = base.evaluation(source="pictures", split="test", controls=("shuffled",))
  return config


def losses(step):
  """What the loss of a step is in these runs."""
  return {"pictures": 3.0 / step, "words": 5.0 + 0.01 * step}


@pytest.fixture
def run(config, tmp_path):
  """A finished run of 100 steps with one evaluation at 50 and at 100."""
  path = tmp_path / "a run"
  Workdir(path, config).close()
  rows, timing = [], [{"step": 0, "compile_seconds": 3.0}]
  for step in STEPS:
    each = losses(step)
    rows.append({"step": step, "loss": sum(each.values()), "grad_norm": 1 + 1 / step, "lr": 1e-3,
                 **{f"loss/lm/{name}": value for name, value in each.items()},
                 "weight/lm/pictures": 20.0, "weight/lm/words": 40.0, "tokens/text": 200,
                 "images/images": 6})
    timing.append({"step": step, "step_seconds": 0.5, "data_wait_share": 0.125,
                   "tokens/text/second": 400.0, "fill/tokens/text": 200 / 240,
                   "fill/images/images": 0.75, "flops_empty_share": 0.25})
  lines = lambda found: "".join(json.dumps(row) + "\n" for row in found)
  (path / "metrics.jsonl").write_text(lines(rows))
  (path / "timing.jsonl").write_text(lines(timing))
  (path / "evals").mkdir()
  (path / "predictions").mkdir()
  for step, accuracy in ((50, 0.61), (100, 0.73)):
    origin = {"step": step, "parameters": "3f2a", "files": {
      "pictures/test.array_record": {"bytes": 1234, "sha256": "ab" * 32}}}
    numbers = {"kind": "vqa", "source": "pictures", "split": "test", "images": "real",
               "accuracy": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.04,
               "questions": 18, "origin": origin, "controls": {"shuffled": {
                 "accuracy": 0.321, "low": 0.3, "high": 0.35, "questions": 18}}}
    text = json.dumps({"step": step, "evals": {"look": numbers}})
    (path / "evals" / f"{step}.json").write_text(text)
  for name, word in (("look", "yes"), ("look_shuffled", "elsewhere")):
    found = [{"key": f"pictures/test/r{i}/1", "document": f"pictures/test/r{i}",
              "question": f"question {i}?", "prediction": f"{word} {i}", "answers": ["yes"],
              "score": float(i % 3 > 0), "exact": 0.0, "log_prob": -0.5} for i in range(5)]
    (path / "predictions" / f"{name}.jsonl").write_text(lines(found))
  return path

