"""Killed with SIGKILL at random moments and restarted until done, a run is as if never touched."""

import sys
import time

import pytest

from benchmarks.kill_resume import KINDS, Process, differences, left_behind, run_killed
from vlm_jax.train import trackers

KILLS = [KINDS[1], KINDS[0], KINDS[1], KINDS[2], KINDS[1]]


@pytest.fixture(scope="module")
def command(root, cache):
  """(workdir, workers) to a command of the real loop on real data."""

  def make(workdir, workers):
    fields = {"data.root": root, "data.workers": workers, "train.compilation_cache": cache}
    return [sys.executable, "-m", "tests.train.real_run", str(workdir),
            *(f"{name}={value}" for name, value in fields.items())]

  return make


@pytest.fixture(scope="module")
def clean(command, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("clean")
  process = Process(command(workdir, 0), workdir)
  assert process.wait() == 0, process.lines
  rows = trackers.read(workdir / "metrics.jsonl")
  assert len(rows) == 40 and len({row["batch_crc32"] for row in rows}) == 40
  return workdir


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_five_times(command, clean, tmp_path, workers):
  seed = int(time.time())
  print(f"seed {seed}")
  hits = run_killed(command(tmp_path, workers), tmp_path, KILLS, seed, seconds=0.3)
  print("\n".join(hits))
  assert len(hits) >= 3 and any("writing: True" in hit for hit in hits)
  assert differences(clean, tmp_path) == []
  assert left_behind(tmp_path) == []


def test_differences_twin(clean, command, tmp_path):
  """Another seed differs in everything that is compared."""
  workdir = tmp_path / "other"
  process = Process([*command(workdir, 0), "seed=1"], workdir)
  assert process.wait() == 0
  found = differences(clean, workdir)
  assert "metrics.jsonl" in found and any(name.startswith("params/") for name in found)
  assert any(name.startswith("optimizer/state/") for name in found)
