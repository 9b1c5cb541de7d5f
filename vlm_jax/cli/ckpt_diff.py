"""Compares two checkpoints array by array: largest and relative difference, what is missing.

A and B are run directories (their newest checkpoints) or RUN/checkpoints/STEP.
"""

import argparse
import dataclasses
import json

SUMMARY = "differences of two checkpoints"


def arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument("a", metavar="A", help="run directory, or RUN/checkpoints/STEP")
  parser.add_argument("b", metavar="B", help="the other one")
  parser.add_argument("--optimizer", action="store_true", help="the optimizer's arrays, too")
  parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> None:
  """Prints the arrays that differ, and how many do not."""
  from vlm_jax.train import checkpoint_tools as tools

  items = tools.ITEMS if args.optimizer else ("params",)
  (path_a, step_a), (path_b, step_b) = tools.locate(args.a), tools.locate(args.b)
  rows = tools.diff(tools.sound(path_a, step_a, items), tools.sound(path_b, step_b, items))
  if args.json:
    print(json.dumps([dataclasses.asdict(row) for row in rows]))
    return
  print(f"A {path_a / str(step_a)}\nB {path_b / str(step_b)}")
  changed = [row for row in rows if row.note or row.largest]
  if changed:
    print(f"{'array':<52}{'max |a - b|':>14}{'relative':>12}")
  for row in changed:
    numbers = row.note or f"{row.largest:>14.4g}{row.relative:>12.3g}"
    print(f"{row.path:<52}{numbers}")
  print(f"{len(rows) - len(changed)} of {len(rows)} arrays are equal to the bit")
