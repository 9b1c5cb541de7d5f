"""Files of numbers: rows of steps that are done again go, everything else stays to the byte."""

import io
import json

import numpy as np

from tests.train import tiny_fusion
from vlm_jax.core.mesh import make_mesh
from vlm_jax.train import metrics
from vlm_jax.train import state as state_lib


def test_rows_behind_the_checkpoint_are_cut(tmp_path):
  writer = metrics.Writer(tmp_path, 0)
  for step in range(1, 5):
    writer.metrics(step, {"loss": step / 3})
    writer.timing(step, {"step_seconds": 0.1})
  writer.close()
  whole = (tmp_path / "metrics.jsonl").read_bytes()
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 5, "lo')  # killed while writing
  writer = metrics.Writer(tmp_path, 2)
  assert [row["step"] for row in metrics.read(tmp_path / "metrics.jsonl")] == [1, 2]
  assert [row["step"] for row in metrics.read(tmp_path / "timing.jsonl")] == [1, 2]
  for step in (3, 4):
    writer.metrics(step, {"loss": step / 3})
  writer.close()
  assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_checksum_sees_every_bit_and_name():
  flat = {"a": np.arange(6, dtype=np.int32), "b": np.zeros((2, 2), np.uint8)}
  value = metrics.checksum(flat)
  assert metrics.checksum({"b": flat["b"], "a": flat["a"]}) == value
  changed = flat["b"].copy()
  changed[1, 1] = 1
  assert metrics.checksum(flat | {"b": changed}) != value
  assert metrics.checksum({"a": flat["a"], "c": flat["b"]}) != value


def test_work_of_empty_slots(config):
  _, leaves = state_lib.initializer(tiny_fusion, config)
  shapes = state_lib.abstract_batch(tiny_fusion, config, make_mesh(config))
  work = metrics.Work(config, leaves, shapes)
  assert work.slots == {"tokens/text": 96, "images/images": 16}
  full = work.fills({"tokens/text": 96, "images/images": 16})
  assert full["flops_empty_share"] == 0 and full["fill/tokens/text"] == 1
  half = work.fills({"tokens/text": 48, "images/images": 8})
  assert abs(half["flops_empty_share"] - 0.5) < 1e-12
  assert work.attention({"text": 10.0}) == 10 * 3 * 4 * config.llm.width * config.llm.depth


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_progress():
  row = {"loss": 1.5, "lr": 1e-3, "grad_norm": 0.5}
  timing = {"step_seconds": 0.2, "data_wait_share": 0.25, "tokens/text/second": 1234.0}
  plain, terminal = io.StringIO(), Terminal()
  for stream in (plain, terminal):
    progress = metrics.Progress(10, stream)
    progress.step(1, row, timing)
    progress.step(2, row, timing)
    progress.say("hello")
    progress.close()
  lines = plain.getvalue().splitlines()
  assert len(lines) == 3 and "step 2/10" in lines[1] and "data wait 25%" in lines[1]
  assert "1,234 tokens/s" in lines[0]
  assert terminal.getvalue().count("\r") == 2 and terminal.getvalue().count("\n") == 2


def test_duration():
  assert [metrics.duration(s) for s in (5, 65, 3720)] == ["5s", "1m05s", "1h02m"]


def test_read_of_a_missing_file(tmp_path):
  assert metrics.read(tmp_path / "none.jsonl") == []
  (tmp_path / "x.jsonl").write_text(json.dumps({"step": 1}) + "\n{")
  assert metrics.read(tmp_path / "x.jsonl") == [{"step": 1}]
