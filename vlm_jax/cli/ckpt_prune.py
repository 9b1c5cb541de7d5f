"""Removes the checkpoints that a keep policy has no use for, never the newest one that is sound.

Says what it would remove; --yes does it. Exit code 75 when a process holds the run.
"""

import argparse

SUMMARY = "remove old checkpoints"


def arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument("--workdir", required=True, help="run directory")
  parser.add_argument("--keep", type=int,
                      help="newest checkpoints that stay (default: config.train.keep)")
  parser.add_argument("--keep-every", type=int, help="every n-th step stays, 0: none (default: "
                      "config.train.keep_every)")
  parser.add_argument("--quarantined", action="store_true",
                      help="also remove what was moved aside as damaged")
  parser.add_argument("--yes", action="store_true", help="really remove them")


def run(args: argparse.Namespace) -> None:
  """Prints what goes."""
  from vlm_jax.train import checkpoint_tools
  from vlm_jax.train.workdir import load_config

  config = load_config(args.workdir).train
  keep = config.keep if args.keep is None else args.keep
  keep_every = config.keep_every if args.keep_every is None else args.keep_every
  gone = checkpoint_tools.prune(args.workdir, keep, keep_every, args.quarantined, args.yes)
  for entry in gone:
    print(f"{entry.path.name:>20}{entry.bytes / 1e6:>12,.2f} MB")
  total = f"{len(gone)} directories, {sum(entry.bytes for entry in gone) / 1e6:,.2f} MB"
  if args.yes or not gone:
    print(f"removed {total}" if gone else "nothing to remove")
  else:
    print(f"would remove {total}; add --yes to do it")
