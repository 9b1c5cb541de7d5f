"""Evaluates a checkpoint of a run: scores with their controls, perplexities, 95% intervals.

Writes evals/STEP.json and predictions/NAME.jsonl into the run directory. With --watch it waits for
checkpoints beside a training process, evaluates each once, appends a row to evals.jsonl, and ends
with the run's last step. --new asks what the run's config did not foresee, with the fields of
`evaluation` in vlm_jax/configs/base.py:

  vlm-jax evaluate --workdir=runs/first --new words kind=choice source=easy_vqa form=choice
"""

import argparse
import json
from typing import Any

from vlm_jax import runs
from vlm_jax.cli import config as recipes
from vlm_jax.core.errors import UsageError

SUMMARY = "evaluate a checkpoint of a run, or every one as it comes"


def arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  recipes.model(parser, "run directory")
  parser.add_argument("--only", help="comma-separated names of config.evals (default: all)")
  parser.add_argument("--split", help="read this split instead of each evaluation's own")
  parser.add_argument("--new", nargs="+", metavar=("NAME", "FIELD=VALUE"),
                      help="run this evaluation instead of the config's")
  parser.add_argument("--watch", action="store_true", help="evaluate checkpoints as they come")
  parser.add_argument("--until", type=int, metavar="STEP",
                      help="with --watch: end with this step (default: the run's last)")
  parser.add_argument("--poll", type=float, metavar="SECONDS",
                      help="with --watch: between two looks (10)")
  parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def run(args: argparse.Namespace) -> None:
  """Runs the evaluations and prints a line for each."""
  if args.only and args.new:
    raise UsageError("--only chooses among the config's evaluations, --new makes another; use one")
  names = args.only.split(",") if args.only else args.new[:1] if args.new else None
  if args.watch:
    return watch(args, names)
  if args.until is not None or args.poll is not None:
    raise UsageError("--until and --poll belong to --watch; add it")
  config, load = runs.open_config(args.workdir, args.root, args.allow_outside)
  add(config, args.new)
  some(config)
  params, step = load(args.step)
  from vlm_jax.evals.run import evaluate

  results = evaluate(config, params, args.workdir, step=step, names=names, split=args.split,
                     report=lambda line: print(f"step {step}  {line}", flush=True))
  if args.json:
    print(json.dumps({"step": step, "evals": results}))
  return None


def add(config: Any, new: list[str] | None) -> None:
  """Adds the evaluation of --new to the config of a run."""
  if not new:
    return
  from vlm_jax.configs.base import evaluation

  name, *fields = new
  if name in config.evals or "=" in name:
    raise UsageError(f"--new needs a name that config.evals does not have, then FIELD=VALUE; got "
                     f"'{name}'; the config has {', '.join(sorted(config.evals)) or 'none'}")
  entry = evaluation()
  for field in fields:
    if "=" not in field:
      raise UsageError(f"--new {name}: '{field}' is no FIELD=VALUE")
  try:
    recipes.override(entry, [tuple(field.split("=", 1)) for field in fields])
  except UsageError as error:
    reason = str(error).replace("--config.", "").replace("config has", "an evaluation has")
    raise UsageError(f"--new {name}: {reason}") from error
  with config.unlocked():
    config.evals[name] = entry


def some(config: Any) -> None:
  """Refuses a run that has no evaluation to do."""
  if not config.evals:
    raise UsageError("the run's config.evals is empty; name an evaluation with --new")


def watch(args: argparse.Namespace, names: list[str] | None) -> None:
  """Evaluates every checkpoint as it comes."""
  if args.step is not None:
    raise UsageError("--watch evaluates every checkpoint; leave --step out, or use --until")
  config, load = runs.open_config(args.workdir, args.root, args.allow_outside)
  add(config, args.new)
  some(config)
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
