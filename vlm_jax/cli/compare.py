"""Compares two files of scored predictions: is B better than A, and how sure is that?

Paired bootstrap over the questions (of one picture together): the difference of the mean scores,
its 95% interval and a two-sided p-value. `vlm-jax evaluate` and `vlm-jax score` write such files.
"""

import argparse
import dataclasses
import json

from vlm_jax.core.errors import UsageError

SUMMARY = "paired comparison of two files of predictions"


def arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument("files", nargs="*", metavar="FILE.jsonl", help="A and B")
  parser.add_argument("--field", default="score", help="number of a row that is compared (score)")
  parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
  parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
  """Prints the comparison."""
  if len(args.files) != 2:
    raise UsageError(f"compare needs two files, A.jsonl and B.jsonl; got {len(args.files)}")
  from vlm_jax.evals.predictions import compare

  found, means = compare(*args.files, field=args.field, seed=args.seed)
  if args.json:
    print(json.dumps({**means, **dataclasses.asdict(found)}))
    return
  print(f"A {means['a']:.4f}  B {means['b']:.4f}  B - A {found.difference:+.4f} "
        f"[{found.low:+.4f}, {found.high:+.4f}]  p {found.p:.4f}  "
        f"({means['questions']:,} questions, {means['documents']:,} documents)")
