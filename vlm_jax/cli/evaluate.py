"""Evaluates a checkpoint of a run: accuracies with their controls, perplexities, 95% intervals.

Writes evals/STEP.json and predictions/NAME.jsonl into the run directory.
"""

import argparse
import json

from vlm_jax.cli import runs

SUMMARY = "evaluate a checkpoint of a run"


def arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  runs.arguments(parser)
  parser.add_argument("--only", help="comma-separated names of config.evals (default: all)")
  parser.add_argument("--split", help="read this split instead of each evaluation's own")
  parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def run(args: argparse.Namespace) -> None:
  """Runs the evaluations and prints a line for each."""
  config, params, step = runs.open_run(args)
  from vlm_jax.evals.run import evaluate

  names = args.only.split(",") if args.only else None
  results = evaluate(config, params, args.workdir, step=step, names=names, split=args.split,
                     report=lambda line: print(f"step {step}  {line}", flush=True))
  if args.json:
    print(json.dumps({"step": step, "evals": results}))
