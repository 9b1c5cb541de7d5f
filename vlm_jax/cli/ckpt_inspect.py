"""Shows what is in a checkpoint: every array with its shape and norm, and where the run stood.

CHECKPOINT is a run directory (its newest checkpoint) or RUN/checkpoints/STEP.
"""

import argparse
import json

SUMMARY = "arrays, shapes and norms of a checkpoint"


def arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument("checkpoint", metavar="CHECKPOINT",
                      help="run directory, or RUN/checkpoints/STEP")
  parser.add_argument("--optimizer", action="store_true", help="the optimizer's arrays, too")
  parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> None:
  """Prints the table."""
  from vlm_jax.train import checkpoint_tools as tools

  path, step = tools.locate(args.checkpoint)
  contents = tools.sound(path, step, tools.ITEMS if args.optimizer else ("params",))
  rows, groups = tools.norms(contents), tools.groups(contents)
  if args.json:
    print(json.dumps({"step": step, "parameters": groups, "meta": contents.meta,
                      "data": contents.data, "arrays": rows}))
    return
  versions = contents.meta.get("environment", {}).get("versions", {})
  print(f"{path / str(step)}: step {step}, {sum(groups.values()):,} parameters ("
        + ", ".join(f"{name} {count:,}" for name, count in groups.items()) + ")")
  if averaged := contents.meta.get("averaged"):
    print(f"the mean of steps {', '.join(map(str, averaged))} of {contents.meta.get('of')}")
  if versions:
    print("written with " + ", ".join(f"{name} {text}" for name, text in versions.items())
          + f", mesh {contents.meta.get('mesh')}")
  print(f"{'array':<52}{'shape':<20}{'dtype':<10}{'norm':>12}{'mean':>12}{'largest':>12}")
  for row in rows:
    shape = "x".join(map(str, row["shape"])) or "scalar"
    print(f"{row['path']:<52}{shape:<20}{row['dtype']:<10}{row['norm']:>12.5g}"
          f"{row['mean']:>12.3g}{row['largest']:>12.4g}")
