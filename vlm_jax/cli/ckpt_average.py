"""Averages the parameters of several checkpoints of a run into a directory of its own.

`vlm-jax evaluate`, `generate` and `report` take that directory as --workdir. It has no optimizer,
so it cannot be trained on.
"""

import argparse

SUMMARY = "average checkpoints into a new directory"


def arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument("--workdir", required=True, help="run directory")
  parser.add_argument("--steps", required=True, metavar="A,B,...",
                      help="steps of the checkpoints, two or more")
  parser.add_argument("--out", required=True, help="new directory")


def run(args: argparse.Namespace) -> None:
  """Writes it and says what to do with it."""
  from vlm_jax.core.errors import UsageError
  from vlm_jax.train import checkpoint_tools

  try:
    steps = [int(text) for text in args.steps.split(",")]
  except ValueError:
    raise UsageError(f"--steps is '{args.steps}'; write whole numbers with commas between them"
                     ) from None
  step = checkpoint_tools.average(args.workdir, steps, args.out)
  print(f"{args.out}: the mean of steps {', '.join(map(str, sorted(set(steps))))}, as step {step}; "
        f"e.g. vlm-jax evaluate --workdir={args.out}")
