"""GridQA: what each strategy keeps of a picture, beside its controls.

Trains the variants of configs/gridqa.py from nothing and compares their numbers on test grids with
the bands of that file; a number outside ends the script with exit code 1. Without an argument the
shortest pair: every cell a token, and no picture.

    python benchmarks/gridqa.py [ARG ...] [--full] [--seed=0] [--steps=0] [--data=FOLDER]

`ARG` is an argument of the recipe that has bands, `--full` takes all of them, `--steps` changes how
long they train (0: as the recipe says). There is no other side here, so nothing is timed but the
whole of a variant, compilation included.

The last line is JSON with the keys
  seed      of parameters and order
  steps     of each argument
  numbers   of each argument: name to {"value", "interval" (95%, grids drawn again; the control's
            own), "band", "inside"}
  tokens    visual tokens of a picture that each argument's language model reads, 0: none
  seconds   of each argument
  outside   the numbers outside their bands, "ARG NAME"
"""

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from benchmarks import protocol
from vlm_jax import recipes
from vlm_jax.configs.gridqa import BANDS
from vlm_jax.core.fusion import find_fusion, speaking
from vlm_jax.data import prepare
from vlm_jax.evals import run as evals
from vlm_jax.train.loop import train

SHORT = ("full16", "blind")
MAIN = re.compile("accuracy|text_to_image@1")  # in place of which "low" and "high" stand


def one(arg: str, seed: int, steps: int, data: str) -> dict[str, Any]:
  """Trains and evaluates one argument of the recipe.

  Args:
    arg: of `BANDS`.
    seed: config.seed.
    steps: of training, 0: the recipe's.
    data: prepared data, or where it is prepared.

  Returns:
    {"numbers", "tokens", "seconds", "steps"} as in the module.
  """
  config = recipes.load(f"configs/gridqa.py:{arg}")
  config.seed = seed
  config.data.root = data or config.data.root
  if steps:
    config.train.update(steps=steps, checkpoint_every=steps)
  prepare.prepare(config.data.root, ["gridqa"], config.llm.vocab_size)
  shown = config.data.sources.gridqa.images != "none"
  if not shown:
    config.evals.gridqa.controls = ()
  start = time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    row = train(config.lock(), folder, evaluate=evals.in_loop(config, Path(folder)))
  seconds = round(time.perf_counter() - start, 1)
  spoken = speaking(config)
  tokens = len(find_fusion(spoken).rows(spoken)) if shown else 0
  return {"numbers": numbers(config, row, arg), "tokens": tokens, "seconds": seconds,
          "steps": config.train.steps}


def numbers(config: ConfigDict, row: dict[str, float], arg: str) -> dict[str, dict[str, Any]]:
  """What the bands of an argument name, of the last row of its training; as in the module."""
  found = {}
  for name, (low, high) in BANDS[arg].items():
    path = f"eval/{name}" if name.split("/")[0] in config.evals else f"eval/gridqa/{name}"
    value, ends = row[path], [row[MAIN.sub(end, path)] for end in ("low", "high")]
    found[name] = {"value": value, "interval": ends, "band": [low, high],
                   "inside": low <= value <= high}
  return found


def main(argv: list[str]) -> int:
  """Runs what is asked for; the number of bands that were missed."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("args", nargs="*", metavar="ARG", help="of the recipe")
  parser.add_argument("--full", action="store_true", help="everything that has bands")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--steps", type=int, default=0)
  parser.add_argument("--data", default="", help="default: the recipe's data.root")
  args = parser.parse_args(argv)
  chosen = list(BANDS) if args.full else args.args or list(SHORT)
  if unknown := set(chosen) - set(BANDS):
    parser.error(f"no bands for {', '.join(sorted(unknown))}; choose among {' '.join(BANDS)}")
  done = {arg: one(arg, args.seed, args.steps, args.data) for arg in chosen}
  of = lambda key: {arg: result[key] for arg, result in done.items()}
  rows = [[arg, result["tokens"], name, number["value"], *number["interval"], *number["band"],
           "" if number["inside"] else "OUTSIDE", result["seconds"]]
          for arg, result in done.items() for name, number in result["numbers"].items()]
  outside = [f"{row[0]} {row[2]}" for row in rows if row[-2]]
  protocol.report(
    ["argument", "tokens", "number", "value", "low", "high", "from", "to", "", "seconds"], rows,
    {"seed": args.seed, "steps": of("steps"), "numbers": of("numbers"), "tokens": of("tokens"),
     "seconds": of("seconds"), "outside": outside})
  return len(outside)


if __name__ == "__main__":
  sys.exit(min(1, main(sys.argv[1:])))
