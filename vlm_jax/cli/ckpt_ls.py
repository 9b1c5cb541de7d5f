"""Lists the checkpoints of a run: step, size, time, and whether they are what was written.

Without --verify nothing but the directory is read, so it is instant at any size.
"""

import argparse
import time

SUMMARY = "list the checkpoints of a run"


def arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument("--workdir", required=True, help="run directory")
  parser.add_argument("--verify", action="store_true", help="read every byte of each of them")


def run(args: argparse.Namespace) -> None:
  """Prints a line for each."""
  from vlm_jax.train import checkpoint_tools as tools

  path = tools.folder(args.workdir)
  print(f"{'step':>10}{'MB':>12}  {'written':<20}state")
  for entry in tools.entries(path):
    state = entry.kind
    if state == "checkpoint":
      state = "not verified"
      if args.verify:
        wrong = tools.verify(path, entry.step)
        state = f"damaged: {wrong}" if wrong else "verified"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.seconds))
    print(f"{entry.step:>10}{entry.bytes / 1e6:>12,.2f}  {when:<20}{state}", flush=True)
