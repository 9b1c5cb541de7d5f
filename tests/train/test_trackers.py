"""One small interface for all trackers; none of them leaks, and none is loaded unasked."""

import importlib.util
import struct
import sys
import types

import pytest

from tests.train import tiny_fusion
from vlm_jax.core.errors import UsageError
from vlm_jax.train import metrics, trackers
from vlm_jax.train.loop import train

ROWS = [(1, {"loss": 2.5, "name": "a"}), (2, {"loss": float("inf"), "lr": 3}), (3, {"loss": 1.5})]


def events(path):
  """(step, name, value) of every scalar in the event files of a folder."""
  from tensorboardX.proto.event_pb2 import Event

  found = []
  for file in sorted(path.glob("events.*")):
    data = file.read_bytes()
    while data:
      size = struct.unpack("<Q", data[:8])[0]
      event = Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]
      found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
  return found


def test_tensorboard(config, tmp_path):
  tracker = trackers.TensorBoard(tmp_path, 0, config)
  for step, row in ROWS:
    tracker.log(step, row)
  tracker.close()
  assert events(tmp_path) == [(1, "loss", 2.5), (2, "lr", 3.0), (3, "loss", 1.5)]


class FakeRun:
  def __init__(self):
    self.rows, self.finished = [], False

  def log(self, row, step):
    assert not self.finished
    self.rows.append((step, row))

  def finish(self):
    self.finished = True


@pytest.fixture
def fake(monkeypatch):
  """Stands for the package: remembers how it was called."""
  module = types.ModuleType("wandb")
  module.__spec__ = importlib.util.spec_from_loader("wandb", None)
  module.run, module.calls = FakeRun(), []
  module.Settings = lambda **fields: fields
  module.init = lambda **fields: module.calls.append(fields) or module.run
  monkeypatch.setitem(sys.modules, "wandb", module)
  return module


def write(config, path):
  """Sends `ROWS` through the run's writer."""
  path.mkdir(exist_ok=True)
  writer = metrics.Writer(config, path, 0)
  for step, row in ROWS:
    writer.metrics(step, row)
    writer.timing(step, {"step_seconds": 0.5})
  writer.close()


def test_wandb_gets_what_the_files_get(fake, config, tmp_path, monkeypatch):
  monkeypatch.delenv("WANDB_MODE", raising=False)
  config.train.trackers = ("wandb",)
  write(config, tmp_path / "run")
  (call,) = fake.calls
  assert call["mode"] == "offline" and call["config"]["train"]["steps"] == 12
  assert call["settings"]["x_disable_meta"] and not call["settings"]["save_code"]
  assert [row["step"] for row in trackers.read(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
  assert fake.run.rows[::2] == [(1, {"loss": 2.5}), (2, {"lr": 3}), (3, {"loss": 1.5})]
  assert fake.run.rows[1::2] == [(step, {"step_seconds": 0.5}) for step in (1, 2, 3)]
  assert fake.run.finished and not list((tmp_path / "run").glob("events.*"))
  monkeypatch.setenv("WANDB_MODE", "online")
  trackers.make(config, tmp_path / "run", 3)
  assert fake.calls[1]["mode"] == "online" and fake.calls[1]["id"] == call["id"]
  trackers.make(config, tmp_path / "other", 0)
  assert fake.calls[2]["id"] != call["id"]


def test_wandb_itself_works_offline_and_writes_no_secret(config, tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  secret = "0123456789abcdef" * 2 + "01234567"
  monkeypatch.setenv("WANDB_API_KEY", secret)
  monkeypatch.setenv("MY_TOKEN", "hunter2-" + secret)
  monkeypatch.delenv("WANDB_MODE", raising=False)
  tracker = trackers.WandB(tmp_path, 0, config)
  for step, row in ROWS:
    tracker.log(step, row)
  tracker.close()
  files = [file for file in tmp_path.rglob("*") if file.is_file()]
  whole = b"".join(file.read_bytes() for file in files)
  assert b"vocab_size" in whole and any(file.suffix == ".wandb" for file in files)
  assert secret.encode() not in whole and b"hunter2" not in whole


def test_wrong_trackers_are_refused_before_anything_is_made(config, tmp_path, monkeypatch):
  config.train.trackers = ("tensorbord",)
  with pytest.raises(UsageError, match="did you mean 'tensorboard'"):
    train(config, tmp_path / "run", make_loader=tiny_fusion.Loader)
  config.train.trackers = ("wandb",)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UsageError, match=r"wandb, which is not installed; run `pip install"):
    train(config, tmp_path / "run", make_loader=tiny_fusion.Loader)
  assert not (tmp_path / "run").exists()


def test_wandb_is_not_loaded_unasked(config, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
  write(config, tmp_path)
  assert {name for _, name, _ in events(tmp_path)} == {"loss", "lr", "step_seconds"}
