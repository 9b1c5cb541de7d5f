"""Checkpoints come and go while they are evaluated; the model and its evaluation are replaced."""

import json

import pytest

from vlm_jax.configs import base
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.evals import watch as watching


class Run:
  """A run whose checkpoints appear one look at a time; `gone` are removed before they are read."""

  def __init__(self, appear, gone=()):
    self.appear, self.gone, self.looks, self.loaded = list(appear), set(gone), 0, []

  def steps(self):
    return sorted(set(self.appear[: self.looks + 1]) - self.gone_now())

  def gone_now(self):
    return {step for step in self.gone if step in self.loaded}

  def sleep(self, seconds):
    assert seconds == 0.5
    self.looks += 1
    assert self.looks < 50, "it waits for ever"

  def load(self, step):
    self.loaded.append(step)
    if step in self.gone:
      raise UsageError(f"no checkpoint {step}")
    return {"step": step}


@pytest.fixture
def config(monkeypatch):
  def evaluate(config, params, workdir, *, step, names, split, report):
    assert params == {"step": step}
    found = {}
    for name in sorted(config.evals) if names is None else names:
      label = f"{name}_{split}" if split else name
      report(f"{label}: fine")
      found[label] = {"kind": "vqa", "accuracy": step / 100, "seconds": 3.0,
                      "controls": {"none": {"accuracy": 0.5}}}
    return found

  monkeypatch.setattr(watching, "evaluate", evaluate)
  config = base.get_config()
  config.train.steps = 30
  config.evals.look = base.evaluation(split="test")
  return config


def watch(config, workdir, run, **options):
  said = []
  done = watching.watch(config, workdir, run.steps, run.load, poll=0.5, report=said.append,
                        sleep=run.sleep, **options)
  return done, said


def rows(workdir):
  return [json.loads(line) for line in (workdir / "evals.jsonl").read_text().splitlines()]


def test_every_checkpoint_once_until_the_last(config, tmp_path):
  run = Run([10, 20, 30])
  done, said = watch(config, tmp_path, run)
  assert done == run.loaded == [10, 20, 30] and "step 20  look: fine" in said
  assert rows(tmp_path)[1] == {"step": 20, "eval/look/accuracy": 0.2,
                               "eval/look/none/accuracy": 0.5}
  assert [path.name for path in tmp_path.iterdir()] == ["evals.jsonl"]  # no lock, nothing else
  # Again there is nothing to do, and a torn row is evaluated again.
  done, said = watch(config, tmp_path, Run([10, 20, 30]))
  assert done == [] and "evals.jsonl has all of it already" in said[0]
  text = (tmp_path / "evals.jsonl").read_text()
  (tmp_path / "evals.jsonl").write_text(text[:-9])
  again = Run([30])
  assert watch(config, tmp_path, again)[0] == [30] and rows(tmp_path)[-1]["step"] == 30


def test_what_was_not_asked_before_is_asked_of_the_same_checkpoints(config, tmp_path):
  assert watch(config, tmp_path, Run([10, 20, 30]))[0] == [10, 20, 30]
  config.evals.more = base.evaluation(split="test")
  done, said = watch(config, tmp_path, Run([10, 20, 30]), names=["look", "more"])
  assert done == [10, 20, 30] and "step 10  more: fine" in said
  assert not any("look" in line for line in said)  # that one is known
  assert rows(tmp_path)[3] == {"step": 10, "eval/more/accuracy": 0.1,
                               "eval/more/none/accuracy": 0.5}
  assert watch(config, tmp_path, Run([30]), names=["more"], split="test")[0] == []
  done, said = watch(config, tmp_path, Run([30]), names=["more"], split="train")
  assert done == [30] and said == ["step 30  more_train: fine"]


def test_until_ends_it_early(config, tmp_path):
  assert watch(config, tmp_path, Run([10, 20, 30]), until=15)[0] == [10, 20]
  with pytest.raises(UsageError, match="did you mean 'look'"):
    watch(config, tmp_path, Run([10]), names=["lok"])
  with pytest.raises(UsageError, match="--until is 31, but the run ends at step 30"):
    watch(config, tmp_path, Run([10]), until=31)


def test_a_checkpoint_that_went_away_is_said(config, tmp_path):
  done, said = watch(config, tmp_path, Run([10, 20, 30], gone=[20]))
  assert done == [10, 30] and any("step 20: its checkpoint was removed" in line for line in said)


def test_a_damaged_checkpoint_is_an_error(config, tmp_path):
  run = Run([10])
  run.load = lambda step: (_ for _ in ()).throw(DataError("checkpoint 10 is damaged"))
  with pytest.raises(DataError, match="damaged"):
    watch(config, tmp_path, run)
