"""The command line as a user meets it: exit codes, one sentence, the nearest name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_jax.cli import main as cli
from vlm_jax.core import errors


@pytest.mark.parametrize("argv,code,sentence", [
  (["trian"], 2, "no command 'trian'; did you mean 'train'?"),
  (["data", "prepair"], 2, "no command 'data prepair'; did you mean 'data prepare'?"),
  (["data"], 2, "no command 'data'; known: data check, data inspect, data prepare"),
  (["train", "--cnofig=x"], 2, "did you mean '--config'?"),
  (["train", "--workdir=w"], 2, "--config"),
  (["train", "--config=nowhere.py", "--workdir=w"], 2, "--config: no file 'nowhere.py'"),
  (["train", "--config=configs/quickstart.py", "--workdir=w", "--config.train.stpes=3"], 2,
   "config.train has no field 'stpes'; did you mean 'steps'?"),
  (["train", "--config=configs/quickstart.py", "--workdir=w", "--config.train.steps=few"], 2,
   "--config.train.steps must be a value of type int"),
  (["train", "--config=configs/quickstart.py", "--workdir=w", "--config.train.steps"], 2,
   "--config.train.steps needs a value"),
  (["train", "--config=configs/quickstart.py", "--workdir=w", "more"], 2,
   "'more' is one argument too many"),
  (["evaluate", "--workdir=w", "--config.train.steps=3"], 2, "takes no config"),
  (["evaluate", "--workdir=no/such/run"], 2, "no/such/run"),
  (["train", "--workdir", "w", "--config"], 2, "--config: expected one argument"),
])
def test_user_errors(argv, code, sentence, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert cli.main(argv) == code
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith("vlm-jax: ") and sentence in lines[0], lines
  assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"


def test_a_file_in_place_of_a_directory_is_a_disk_error(tmp_path, capsys):
  (tmp_path / "taken").write_text("")
  assert cli.main(["data", "prepare", f"--root={tmp_path}/taken/data"]) == errors.DISK
  assert f"{tmp_path}/taken" in capsys.readouterr().err
  assert cli.main(["train", "--config=configs/quickstart.py:debug",
                   f"--workdir={tmp_path}/taken/run"]) == errors.DISK
  assert f"{tmp_path}/taken" in capsys.readouterr().err


def test_unprepared_data_says_what_to_run(tmp_path, capsys):
  code = cli.main(["train", "--config=configs/quickstart.py:debug", f"--workdir={tmp_path}/run",
                   f"--config.data.root={tmp_path}/nothing"])
  assert code == errors.DATA
  assert "vlm-jax data prepare" in capsys.readouterr().err


class Boom:
  """Stands for a subcommand's module; raises what it is told to."""

  SUMMARY = "fails"

  def __init__(self, error):
    self.error = error

  def arguments(self, parser):
    pass

  def run(self, args):
    raise self.error


@pytest.mark.parametrize("error,code,sentence", [
  (errors.DataError("three bad files"), 65, "three bad files"),
  (errors.NumericsError("loss is nan"), 76, "loss is nan"),
  (errors.RetryError("held"), 75, "held"),
  (errors.Interrupted("saved", 143), 143, "saved"),
  (PermissionError(13, "Permission denied", "/ro/run"), 73, "/ro/run: Permission denied; "),
  (OSError(28, "No space left on device", "/full/x"), 73, "/full/x: No space left"),
  (KeyboardInterrupt(), 130, "interrupted"),
  (ZeroDivisionError("x / 0"), 70, "internal error, ZeroDivisionError: x / 0 (a bug of vlm_jax: "),
  (FileNotFoundError(2, "No such file", "/gone"), 70, "internal error, FileNotFoundError"),
])
def test_every_error_has_its_code(error, code, sentence, capsys, monkeypatch):
  monkeypatch.setattr(cli.importlib, "import_module", lambda name: Boom(error))
  assert cli.main(["train"]) == code
  captured = capsys.readouterr().err
  assert captured.startswith(f"vlm-jax: {sentence}") and "Traceback" not in captured
  assert cli.main(["train", "--debug"]) == code
  assert "Traceback" in capsys.readouterr().err


def test_help_lists_commands_and_exit_codes(capsys):
  assert cli.main(["--help"]) == 0
  text = capsys.readouterr().out
  for name in cli.COMMANDS:
    assert f"  {name} " in text
  for code in (0, 2, 65, 70, 73, 75, 76, 130, 143):
    assert f"\n  {code} " in text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
  with pytest.raises(SystemExit) as stop:
    cli.main([*name.split(), "--help"])
  assert stop.value.code == 0
  assert f"usage: vlm-jax {name}" in capsys.readouterr().out


def test_help_loads_nothing_heavy_and_the_module_is_the_script(tmp_path):
  done = subprocess.run([sys.executable, "-X", "importtime", "-m", "vlm_jax", "--help"],
                        capture_output=True, text=True, timeout=300, cwd=tmp_path,
                        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])})
  assert done.returncode == 0 and "usage: vlm-jax COMMAND" in done.stdout
  loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
  assert not loaded & {"jax", "numpy", "flax", "grain", "PIL"}, "help must load nothing heavy"


def test_version(capsys):
  assert cli.main(["--version"]) == 0
  assert capsys.readouterr().out.startswith("vlm-jax 0.")
