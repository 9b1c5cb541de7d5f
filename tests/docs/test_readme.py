"""What README.md shows can be typed: commands, flags, recipes, fields and files are there."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from vlm_jax import recipes
from vlm_jax.cli import main as cli
from vlm_jax.core.errors import UsageError

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
SHOWN = re.sub(r"\\\n\s+", "", TEXT)  # continued lines are one
COMMANDS = [line.replace("[", "").replace("]", "") for line in re.findall(
  r"^    (?:vlm-jax )?((?:ckpt|data|[a-z]+) .*?)(?:  +.*)?$", SHOWN, re.MULTILINE)
  if line.split()[0] in {name.split()[0] for name in cli.COMMANDS}]


def parse(command):
  """The arguments of a command line, as `cli.run` reads them, and nothing is run."""
  name, rest = cli.find_command(shlex.split(command, comments=True))
  parser = cli.Parser(prog=name, allow_abbrev=False)
  importlib.import_module(cli.COMMANDS[name]).arguments(parser)
  return parser.parse(rest)


def test_all_are_found():
  assert len(COMMANDS) > 30 and {"ckpt", "data", "train", "chat", "convert"} <= {
    command.split()[0] for command in COMMANDS}
  with pytest.raises(UsageError, match="has no flag"):  # the twin
    parse("train --confg=x.py")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command(command):
  args = parse(command)
  path = getattr(args, "config", None)
  if not path or path == "my.py" or "finetune" in path:  # what the reader writes; test_finetune.py
    return
  config = recipes.load(path)
  for field, _ in args.overrides:
    node = config
    for name in field.split("."):
      assert name in node, field
      node = node[name]


def test_files_are_there():
  named = re.findall(r"`((?:configs|launch|benchmarks|colabs|docs|tests|vlm_jax)/[\w./]+?\.\w+)`",
                     TEXT)
  places = (ROOT, ROOT / "vlm_jax")  # configs/ of a checkout is that of the package
  assert len(named) > 5
  for name in named:
    assert "NAME" in name or any((place / name).exists() for place in places), name
  for path in re.findall(r"`((?:fusion|llm|towers|connectors|convert|data|ops)/\w+\.py)`", TEXT):
    assert (ROOT / "vlm_jax" / path).exists(), path


def test_what_is_at_parity_says_how_near():
  rows = [row for row in TEXT.splitlines() if re.match(r"\| \d+ \|", row)]
  told = [row for row in rows if "| parity" in row]
  assert len(told) >= 5
  for row in told:
    assert re.search(r"\| parity \([^|]*\de-\d[^|]*\)", row), row
