"""Prepares data, trains a small model with its blind and text-only controls, measures all three.

The last line on standard output is one JSON object, whose keys vlm_jax/quickstart.py explains. The
same command continues an interrupted run. Exit code 65 when the blind control proves a leak.
"""

import argparse
import hashlib
import json
from pathlib import Path

from vlm_jax import recipes
from vlm_jax.cli.config import override
from vlm_jax.core.errors import UsageError

SUMMARY = "prepare, train with controls, evaluate: one command"
RECIPE = "configs/quickstart.py"
WORDS = {"mixed": "", "blind": "blind", "text_only": "text_only"}


def arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument("recipe", nargs="?", default=RECIPE, metavar="RECIPE[:ARG]",
                      help=f"takes the arguments of {RECIPE}; 'debug' is {RECIPE}:debug")
  parser.add_argument("--config", help=argparse.SUPPRESS)  # so that --config.FIELD flags are taken
  parser.add_argument("--workdir", help="directory of the three runs (default: a new one, or the "
                      "last interrupted one, in runs/)")


def run(args: argparse.Namespace) -> None:
  """Runs the quickstart and prints its line."""
  path, arg = split(args.config or args.recipe)
  if mine := {"blind", "text_only"} & set(arg.split(",")):
    raise UsageError(f"quickstart trains the control '{mine.pop()}' itself, beside the model; "
                     "leave the word out")
  configs = {}
  for part, word in WORDS.items():
    configs[part] = recipes.load(f"{path}:{','.join(filter(None, (arg, word)))}")
    override(configs[part], args.overrides)
    configs[part].lock()
  from vlm_jax import quickstart

  workdir = args.workdir or quickstart.choose_workdir(Path("runs"), name(path, configs))
  print(json.dumps(quickstart.run(configs, workdir)), flush=True)


def split(spec: str) -> tuple[str, str]:
  """Recipe and argument; a bare word is an argument of the quickstart's recipe."""
  path, _, arg = spec.rpartition(":")
  if path.endswith(".py"):
    return path, arg
  return (spec, "") if spec.endswith(".py") else (RECIPE, spec)


def name(path: str, configs: dict) -> str:
  """Name of the recipe with a digest of the configs: a changed recipe starts a run of its own."""
  text = "".join(config.to_json(sort_keys=True) for config in configs.values())
  return f"{Path(path).stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
