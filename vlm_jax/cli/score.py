"""Scores a file of predictions against the references of a benchmark; no model is needed.

--kind       --references
  vqa          VQA v2 annotations (*.json), or lines of {"id", "answers"}
  caption      COCO captions (*.json)
  pope         POPE labels: lines of {"question_id", "label"}
  choice       an MMBench table (*.tsv); its rotations give CircularEval
  anls         lines of {"id", "answers"}
  relaxed      lines of {"id", "answers"}
--predictions is what `vlm-jax predict` wrote, or a results file of VQA v2, COCO or POPE.
"""

import argparse
import json

from vlm_jax.core.errors import UsageError

SUMMARY = "score a file of predictions against references"


def arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument("--kind", required=True, help="how answers are scored, see above")
  parser.add_argument("--predictions", required=True, metavar="FILE", help="what was said")
  parser.add_argument("--references", required=True, metavar="FILE", help="what is true")
  parser.add_argument("--out", metavar="FILE.jsonl",
                      help="also write a row with its score for every question, for `compare`")
  parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
  parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
  """Prints the numbers."""
  from vlm_jax.core.writing import write_atomically
  from vlm_jax.evals.kinds import find_kind
  from vlm_jax.evals.predictions import lines
  from vlm_jax.evals.references import join

  kind = find_kind(args.kind)
  if not hasattr(kind, "score"):
    raise UsageError(f"--kind {args.kind} needs the model, not its answers; use `vlm-jax evaluate`")
  rows = join(args.predictions, args.references)
  numbers = kind.score(rows, args.seed)
  if args.out:
    write_atomically(args.out, lines(rows))
  if args.json:
    print(json.dumps(numbers))
    return
  print(f"{kind.MAIN} {numbers[kind.MAIN]:.4f} [{numbers['low']:.4f}, {numbers['high']:.4f}]  "
        + "  ".join(f"{name} {value:.4f}" for name, value in numbers.items()
                    if isinstance(value, float) and name not in (kind.MAIN, "low", "high"))
        + f"  ({numbers[kind.UNIT]:,} {kind.UNIT})")
