"""Trains a recipe, or continues the run in --workdir (its own config is enough for that)."""

import argparse
from pathlib import Path

from vlm_jax import runs
from vlm_jax.cli import config as recipes
from vlm_jax.core.errors import UsageError

SUMMARY = "train a recipe, or continue the run of a workdir"


def arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  recipes.argument(parser, required=False)
  parser.add_argument("--workdir", required=True,
                      help="directory of the run; continued if it holds one")


def run(args: argparse.Namespace) -> None:
  """Trains to the last step; the evaluations of the config run at the end and as it says."""
  if not args.config and not (Path(args.workdir) / "config.json").exists():
    raise UsageError(f"--config is missing, and --workdir {args.workdir} holds no run to continue")
  config = recipes.read(args) if args.config else runs.frozen(args.workdir)
  if not args.config:
    recipes.override(config, args.overrides)
  from vlm_jax.configs.older import fill
  from vlm_jax.evals.run import in_loop
  from vlm_jax.train.loop import train

  train(config, args.workdir, evaluate=in_loop(config, args.workdir), fill=fill)
