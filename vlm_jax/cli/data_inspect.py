"""Shows what the model is really given: counts, histograms, fill, decoded rows, and their mask.

With --config the first packed steps of a recipe; with --workdir and --step the exact batch that a
run read in that step (numbered as in its metrics.jsonl: 1 is the first).
"""

import argparse

from vlm_jax.cli import config as recipes
from vlm_jax.core.errors import UsageError

SUMMARY = "counts, histograms, fill and a picture of packed rows"


def arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  recipes.argument(parser, required=False)
  parser.add_argument("--workdir", help="run directory; with --step")
  parser.add_argument("--step", type=int, help="step of the run, 1 is the first")
  parser.add_argument("--steps", type=int, default=4, help="packed steps of the recipe (4)")
  parser.add_argument("--examples", type=int, default=3, help="documents to write out (3)")
  parser.add_argument("--rows", type=int, default=2, help="rows in the picture (2)")
  parser.add_argument("--picture", default="", metavar="FILE.png",
                      help="draw packed rows with their mask")


def run(args: argparse.Namespace) -> None:
  """Prints the description and writes the picture."""
  if bool(args.config) == bool(args.workdir):
    raise UsageError("data inspect needs either --config, or --workdir with --step")
  if args.workdir and (args.step is None or args.step < 1):
    raise UsageError("--workdir needs --step, 1 or more: which batch of the run to show")
  if args.steps < 1 or args.examples < 0 or args.rows < 1:
    raise UsageError("--steps and --rows must be at least 1, --examples at least 0")
  show = {"examples": args.examples, "rows": args.rows, "picture": args.picture}
  config = recipes.read(args) if args.config else None
  from vlm_jax.data import inspect

  if config is None:
    print(inspect.inspect_step(args.workdir, args.step, **show))
  else:
    print(inspect.inspect(config, steps=args.steps, **show))
