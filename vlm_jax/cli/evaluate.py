"""Evaluates a checkpoint of a run: scores with their controls, perplexities, 95% intervals.

Writes evals/STEP.json and predictions/NAME.jsonl into the run directory. With --watch it waits for
checkpoints beside a training process, evaluates each once, appends a row to evals.jsonl, and ends
with the run's last step.
"""

import argparse
import json

from vlm_jax.cli import runs
from vlm_jax.core.errors import UsageError

SUMMARY = "evaluate a checkpoint of a run, or every one as it comes"


def arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  runs.arguments(parser)
  parser.add_argument("--only", help="comma-separated names of config.evals (default: all)")
  parser.add_argument("--split", help="read this split instead of each evaluation's own")
  parser.add_argument("--watch", action="store_true", help="evaluate checkpoints as they come")
  parser.add_argument("--until", type=int, metavar="STEP",
                      help="with --watch: end with this step (default: the run's last)")
  parser.add_argument("--poll", type=float, metavar="SECONDS",
                      help="with --watch: between two looks (10)")
  parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def run(args: argparse.Namespace) -> None:
  """Runs the evaluations and prints a line for each."""
  names = args.only.split(",") if args.only else None
  if args.watch:
    return watch(args, names)
  if args.until is not None or args.poll is not None:
    raise UsageError("--until and --poll belong to --watch; add it")
  config, params, step = runs.open_run(args.workdir, args.step, args.root, args.allow_outside)
  from vlm_jax.evals.run import evaluate

  results = evaluate(config, params, args.workdir, step=step, names=names, split=args.split,
                     report=lambda line: print(f"step {step}  {line}", flush=True))
  if args.json:
    print(json.dumps({"step": step, "evals": results}))
  return None


def watch(args: argparse.Namespace, names: list[str] | None) -> None:
  """Evaluates every checkpoint as it comes."""
  if args.step is not None:
    raise UsageError("--watch evaluates every checkpoint; leave --step out, or use --until")
  config, load = runs.open_config(args.workdir, args.root, args.allow_outside)
  from vlm_jax.evals import watch as watching
  from vlm_jax.train.checkpoint import steps

  folder = runs.checkpoints(args.workdir)
  done = watching.watch(
    config, args.workdir, lambda: steps(folder) if folder.is_dir() else [],
    lambda step: load(step)[0], until=args.until or 0,
    poll=10.0 if args.poll is None else args.poll, names=names, split=args.split,
    report=lambda line: print(line, flush=True))
  if args.json:
    print(json.dumps({"steps": done}))
