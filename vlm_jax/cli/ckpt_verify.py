"""Reads every byte of the checkpoints of a run and compares it with the digests of when it was
written. Exit code 65 when one is damaged. Nothing is moved or changed.
"""

import argparse

SUMMARY = "check every byte of the checkpoints"


def arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument("--workdir", required=True, help="run directory")
  parser.add_argument("--step", type=int, help="only this checkpoint (default: all)")


def run(args: argparse.Namespace) -> None:
  """Prints a line for each."""
  from vlm_jax.core.errors import DataError
  from vlm_jax.train import checkpoint, checkpoint_tools

  path = checkpoint_tools.folder(args.workdir)
  newest = checkpoint.choose(path, args.step)
  steps = checkpoint.steps(path) if args.step is None else [newest]
  bad = []
  for step in steps:
    wrong = checkpoint_tools.verify(path, step)
    print(f"{step:>10}  {f'damaged: {wrong}' if wrong else 'as it was written'}", flush=True)
    bad += [step] if wrong else []
  if bad:
    raise DataError(f"{len(bad)} of {len(steps)} checkpoints in {path} are damaged "
                    f"({', '.join(map(str, bad))}); training that continues moves them aside")
