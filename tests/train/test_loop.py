"""The loop as a user meets it: signals, full disks, numbers that are not finite, evaluations."""

import json
import signal
import sys
import time

import numpy as np
import pytest

from benchmarks.kill_resume import Process, differences
from tests.train import tiny_fusion
from vlm_jax.configs import base
from vlm_jax.core.errors import DataError, NumericsError, UsageError
from vlm_jax.train import trackers
from vlm_jax.train.checkpoint import steps
from vlm_jax.train.loop import train


def start(workdir, cache, *fields):
  command = [sys.executable, "-m", "tests.train.tiny_run", str(workdir), str(cache), *fields]
  return Process(command, workdir)


@pytest.fixture(scope="module")
def clean(tmp_path_factory, cache):
  """A run that nobody touched."""
  workdir = tmp_path_factory.mktemp("clean")
  config = tiny_fusion.get_config()
  config.train.compilation_cache = str(cache)
  result = train(config, workdir, make_loader=tiny_fusion.Loader)
  assert result["step"] == 12 and np.isfinite(result["loss"])
  return workdir


def test_files_of_a_run(clean):
  rows = trackers.read(clean / "metrics.jsonl")
  assert [row["step"] for row in rows] == list(range(1, 13))
  assert rows[-1]["loss"] < rows[0]["loss"] and len({row["batch_crc32"] for row in rows}) == 12
  assert {"loss/lm/pairs", "loss/lm/words", "grad_norm", "lr", "tokens/text", "images/images",
          "pairs/text"} <= rows[0].keys()
  timing = trackers.read(clean / "timing.jsonl")
  assert "compile_seconds" in timing[0]
  assert {"step_seconds", "data_wait_share", "tokens/text/second", "images/images/second",
          "fill/tokens/text", "flops_empty_share"} <= timing[-1].keys()
  assert steps(clean / "checkpoints") == [8, 12]
  assert list(clean.glob("events.*"))


def test_finished_run_starts_no_step(clean, config):
  before = (clean / "metrics.jsonl").read_bytes()
  result = train(config, clean, make_loader=tiny_fusion.Loader)
  assert result["step"] == 12 and (clean / "metrics.jsonl").read_bytes() == before


def test_signals(clean, cache, tmp_path):
  """SIGTERM saves and leaves with 143, Ctrl-C with 130; the run that goes on is the same run."""
  for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
    process = start(tmp_path, cache, "delay=0.15")
    assert process.says("compiled")
    time.sleep(0.4)
    process.send(number)
    assert process.wait() == code, process.lines
    last = steps(tmp_path / "checkpoints")[-1]
    assert any(f"stopped after step {last}, which is saved" in line for line in process.lines)
    assert trackers.read(tmp_path / "metrics.jsonl")[-1]["step"] == last
  assert start(tmp_path, cache).wait() == 0
  assert differences(clean, tmp_path) == []


def test_signal_while_compiling(tmp_path):
  process = start(tmp_path / "run", tmp_path / "empty cache")
  assert process.says("compiling")
  process.send(signal.SIGINT)
  assert process.wait(20) == 130, process.lines
  assert any("stopped while compiling, nothing was lost" in line for line in process.lines)
  assert not any(line.startswith("compiled") for line in process.lines)
  assert steps(tmp_path / "run" / "checkpoints") == []


def evaluated(workdir):
  """Steps whose evaluation is in the log."""
  return [row["step"] for row in trackers.read(workdir / "metrics.jsonl")
          if "eval/quiz/accuracy" in row]


def test_a_signal_is_heard_between_two_batches_of_an_evaluation(cache, tmp_path):
  """Within the run, at a step that is saved for it alone, and at its end; nothing is lost."""
  fields = ("train.eval_every=6", "train.checkpoint_every=4")
  assert start(tmp_path / "whole", cache, "quiz=0:1", *fields).wait() == 0
  for number, code, step in ((signal.SIGTERM, 143, 6), (signal.SIGINT, 130, 12)):
    process = start(tmp_path / "run", cache, f"quiz={step}:6000", *fields)
    assert process.says(f"asking at step {step}")
    process.send(number)
    assert process.wait(60) == code, process.lines
    assert any(f"stopped in the evaluation of step {step}, which is saved" in line
               for line in process.lines)
    assert steps(tmp_path / "run" / "checkpoints")[-1] == step
    assert evaluated(tmp_path / "run") == list(range(6, step, 6))
  assert "asking at step 6" in process.lines  # it was asked again from the beginning
  assert start(tmp_path / "run", cache, "quiz=0:1", *fields).wait() == 0
  assert evaluated(tmp_path / "run") == [6, 12]
  assert differences(tmp_path / "whole", tmp_path / "run") == []


def test_a_signal_that_an_evaluation_does_not_hear(cache, tmp_path):
  """The twin: it goes on to its end, and the run to that of the next step."""
  process = start(tmp_path, cache, "quiz=6:20", "deaf=1", "train.eval_every=6")
  assert process.says("asking at step 6")
  process.send(signal.SIGTERM)
  assert process.wait(60) == 143, process.lines
  assert not any("stopped in the evaluation" in line for line in process.lines)
  assert evaluated(tmp_path) == [6] and steps(tmp_path / "checkpoints")[-1] == 7


def test_second_signal_leaves_at_once(cache, tmp_path):
  process = start(tmp_path, cache, "hang=3")
  assert process.says("hanging")
  process.send(signal.SIGTERM)
  time.sleep(0.3)
  assert process.running
  process.send(signal.SIGTERM)
  assert process.wait(5) == 143


def test_full_disk(clean, cache, tmp_path):
  """One checkpoint is lost, loudly; the run goes on, and only the last checkpoint must succeed."""
  process = start(tmp_path / "once", cache, "full=4:8", "delay=0.1", "llm.width=64",
                  "train.keep=9")
  assert process.wait() == 0, process.lines
  assert sum("step 4 was not written, the disk is full" in line for line in process.lines) == 1
  assert steps(tmp_path / "once" / "checkpoints") == [8, 12]
  assert trackers.read(tmp_path / "once" / "timing.jsonl")[-1]["checkpoint_failures"] == 1
  process = start(tmp_path / "end", cache, "full=12:99", "delay=0.1", "llm.width=64",
                  "train.keep=9")
  assert process.wait() == 73, process.lines
  assert any("step 12 could not be written" in line for line in process.lines)
  assert not any("Traceback" in line for line in process.lines)  # one sentence says it
  assert steps(tmp_path / "end" / "checkpoints") == [4, 8]
  assert start(tmp_path / "end", cache, "llm.width=64").wait() == 0
  assert differences(tmp_path / "once", tmp_path / "end") == []


@pytest.mark.parametrize("held", [5, 12])
def test_rows_that_stay_empty_are_told_once(config, tmp_path, capsys, held):
  class Loader(tiny_fusion.Loader):
    def __next__(self):
      flat, info = super().__next__()
      flat["streams/text/segment_ids"][:] = np.arange(config.data.tokens) < held
      return flat, info

  config.train.update(steps=4, log_every=2)
  train(config, tmp_path, make_loader=Loader)
  said = capsys.readouterr().out
  assert said.count(f"fill {100 * held / 12:.0f}%") == 2
  assert said.count("only 42% of the slots of the rows hold tokens") == (held == 5)
  assert trackers.read(tmp_path / "timing.jsonl")[-1]["token_fill"] == held / 12


class Poisoned(tiny_fusion.Loader):
  """A weight that is not a number in the batch of step 6."""

  def __next__(self):
    flat, info = super().__next__()
    if self.index == 6:
      flat["streams/text/loss_weights/lm"][0, 0] = np.nan
    return flat, info


@pytest.mark.parametrize("log_every", [1, 100])
def test_not_finite_stops_and_is_never_saved(config, tmp_path, log_every):
  config.train.log_every = log_every
  with pytest.raises(NumericsError, match="not finite at step") as error:
    train(config, tmp_path, make_loader=Poisoned)
  assert error.value.code == 76 and steps(tmp_path / "checkpoints") == [4]
  record = json.loads(next(tmp_path.glob("numerics-*.json")).read_text())
  assert record["step"] == (6 if log_every == 1 else 8) and record["parameters_not_finite"]
  batch = np.load(next(tmp_path.glob("numerics-*.npz")))
  assert np.isnan(batch["streams.text.loss_weights.lm"]).any() == (log_every == 1)


def test_evaluations_come_after_the_checkpoint_and_are_made_up_for(config, tmp_path):
  config.evals.quiz = base.evaluation()
  config.train.update(eval_every=4)
  calls = []

  def evaluate(name, params, step):
    assert step in steps(tmp_path / "checkpoints") or step % 4 == 0
    calls.append((name, step))
    if len(calls) == 2:
      raise DataError("stopped by the test")
    return {"accuracy": float(params["llm"]["scale"].sum())}

  with pytest.raises(DataError):
    train(config, tmp_path, make_loader=tiny_fusion.Loader, evaluate=evaluate)
  result = train(config, tmp_path, make_loader=tiny_fusion.Loader, evaluate=evaluate)
  assert calls == [("quiz", step) for step in (4, 8, 8, 12)]
  assert np.isfinite(result["eval/quiz/accuracy"]) and result["step"] == 12
  train(config, tmp_path, make_loader=tiny_fusion.Loader, evaluate=evaluate)
  assert len(calls) == 4


def test_keep_nothing_is_refused(config, tmp_path):
  config.train.keep = 0
  with pytest.raises(UsageError, match=r"config\.train\.keep"):
    train(config, tmp_path, make_loader=tiny_fusion.Loader)
