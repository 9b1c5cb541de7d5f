"""Lock, frozen config and the files that describe a run."""

import json
import os
import subprocess
import sys

import pytest

from vlm_jax.core.errors import DiskError, RetryError, UsageError
from vlm_jax.train.workdir import Workdir, load_config


def test_files_and_round_trip(config, tmp_path):
  config.optim.groups = (("tower", 0.1), ("llm", 2.0))
  with Workdir(tmp_path / "a" / "run", config) as work:
    loaded = load_config(work.path)
  assert loaded.outside is False and load_config(work.path, outside=True).outside is True
  loaded.outside = config.outside
  assert loaded == config and loaded.optim.groups[0] == ("tower", 0.1)
  env = json.loads((work.path / "env.json").read_text())
  assert env["versions"]["jax"] and env["devices"]
  assert (work.path / "command.txt").read_text().count("\n") == 1
  with Workdir(work.path, config):
    pass
  assert (work.path / "command.txt").read_text().count("\n") == 2


def test_second_process_is_told_who_holds_it(config, tmp_path):
  with Workdir(tmp_path, config):
    with pytest.raises(RetryError, match=f"process {os.getpid()}") as error:
      Workdir(tmp_path, config)
    assert error.value.code == 75
  Workdir(tmp_path, config).close()


def test_lock_of_a_killed_process_is_gone(config, tmp_path):
  code = ("import fcntl, os, signal; f = open('LOCK', 'a+'); fcntl.flock(f, fcntl.LOCK_EX); "
          "f.write(str(os.getpid())); f.flush(); os.kill(os.getpid(), signal.SIGKILL)")
  subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
  Workdir(tmp_path, config).close()
  assert (tmp_path / "LOCK").read_text() == str(os.getpid())


@pytest.mark.parametrize("made", ["metrics.jsonl", "checkpoints/3", "checkpoints/3.corrupt-0"])
def test_a_config_may_change_until_there_is_something_of_it(made, config, tmp_path):
  Workdir(tmp_path, config).close()
  (tmp_path / "checkpoints").mkdir()
  (tmp_path / "metrics.jsonl").write_text("")
  config.data.root = "where the data is"
  Workdir(tmp_path, config).close()
  assert load_config(tmp_path).data.root == "where the data is"
  (tmp_path / made).write_text("{}\n")
  config.data.root = "elsewhere"
  with pytest.raises(UsageError, match="data.root"):
    Workdir(tmp_path, config)


def test_changed_fields_are_named(config, tmp_path):
  Workdir(tmp_path, config).close()
  (tmp_path / "metrics.jsonl").write_text("{}\n")
  config.optim.lr = 0.5
  config.train.steps = 99
  with pytest.raises(UsageError) as error:
    Workdir(tmp_path, config)
  assert "optim.lr (0.01 -> 0.5)" in str(error.value)
  assert "train.steps (12 -> 99)" in str(error.value)


def test_free_fields_may_change(config, tmp_path):
  Workdir(tmp_path, config).close()
  config.data.update(workers=2, prefetch=5)
  config.train.update(log_every=3, keep=7, compilation_cache="x")
  Workdir(tmp_path, config).close()


def test_unwritable(config, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(DiskError, match="cannot be written") as error:
    Workdir(tmp_path / "file" / "run", config)
  assert error.value.code == 73


def test_checkpoints_without_config(config, tmp_path):
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(UsageError, match=r"no config\.json"):
    Workdir(tmp_path, config)


def test_damaged_or_missing_config(tmp_path):
  with pytest.raises(UsageError, match="does not exist"):
    load_config(tmp_path)
  for text, words in (("{", "no config .Expecting"), ("[]", "no config .it holds no fields")):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=words):
      load_config(tmp_path)
