"""GridQA: what each strategy keeps of a picture, beside its controls.

Trains the variants of configs/gridqa.py from nothing and compares their numbers on grids that they
have not seen with the bands of that file; a number outside ends the script with exit code 1.
Without an argument the shortest pair: every cell a token, and no picture.

    python benchmarks/gridqa.py [ARG ...] [--full] [--out=FILE] [--jobs=1] [--split=test] [--seed=0]
                                [--steps=0] [--data=FOLDER]

`ARG` is an argument of the recipe that has bands, `--full` takes all of them, and `--steps` changes
how long they train (0: as the recipe says). A row is printed when its training ends and, with
`--out`, added to that file, from where a script that was cut off takes it the next time. With
`--jobs`, on Linux, so many train at a time, each on its share of the cores. Recipes are chosen by
`--split=validation`. There is no other side here, so nothing is timed but the whole of a variant,
compilation included.

The last line is JSON with the keys
  seed, split  of parameters and order; of the grids that are asked about
  steps     of each argument
  numbers   of each argument: name to {"value", "interval" (95%, grids drawn again; the control's
            own), "band" (None: none), "inside"}
  tokens    visual tokens of a picture that each argument's language model reads, 0: none
  seconds   of each argument
  outside   the numbers outside their bands, "ARG NAME"
"""

import argparse
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import time
from concurrent import futures
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from benchmarks import protocol
from vlm_jax import recipes
from vlm_jax.configs.gridqa import BANDS
from vlm_jax.core import digest
from vlm_jax.core.fusion import find_fusion, speaking
from vlm_jax.data import prepare
from vlm_jax.evals import run as evals
from vlm_jax.train.loop import train

SHORT = ("full16", "blind")
HEADER = ("argument", "tokens", "number", "value", "low", "high", "from", "to", "", "seconds")
WIDTHS = (25, 6, 25, 6, 6, 6, 4, 4, 7, 7)
MAIN = re.compile("accuracy|text_to_image@1")  # in place of which "low" and "high" stand
ACCURACY = re.compile(r"accuracy(@\d+)?$")


def recipe(arg: str, args: argparse.Namespace) -> ConfigDict:
  """The recipe of an argument of `BANDS`, with what the command line changes."""
  config = recipes.load(f"configs/gridqa.py:{arg}")
  config.seed = args.seed
  config.data.root = args.data or config.data.root
  for entry in config.evals.values():
    entry.split = args.split
  if args.steps:
    config.train.steps = args.steps
  if config.data.sources.gridqa.images == "none":
    config.evals.gridqa.controls = ()
  return config.lock()


def one(config: ConfigDict, bands: dict[str, tuple[float, float]]) -> dict[str, Any]:
  """Trains and evaluates a recipe.

  Returns:
    {"numbers", "tokens", "seconds", "steps"} as in the module.
  """
  prepare.prepare(config.data.root, ["gridqa"], config.llm.vocab_size)
  start = time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    row = train(config, folder, evaluate=evals.in_loop(config, Path(folder)))
  seconds = round(time.perf_counter() - start, 1)
  shown, spoken = config.data.sources.gridqa.images != "none", speaking(config)
  return {"numbers": numbers(config, row, bands),
          "tokens": len(find_fusion(spoken).rows(spoken)) if shown else 0, "seconds": seconds,
          "steps": config.train.steps}


def numbers(config: ConfigDict, row: dict[str, float], bands: dict[str, tuple[float, float]]
            ) -> dict[str, dict[str, Any]]:
  """Accuracies of evaluation "gridqa" and what bands name, of the last row of a training."""
  found, prefix = {}, "eval/gridqa/"
  measured = {path.removeprefix(prefix) for path in row if path.startswith(prefix)}
  for name in sorted({name for name in measured if ACCURACY.search(name)} | bands.keys()):
    path = f"eval/{name}" if name.split("/")[0] in config.evals else prefix + name
    value, ends = row[path], [row[MAIN.sub(end, path)] for end in ("low", "high")]
    low, high = bands.get(name, (0, 1))
    found[name] = {"value": value, "interval": ends, "band": bands.get(name),
                   "inside": low <= value <= high}
  return found


def known(path: str) -> dict[str, dict[str, Any]]:
  """The rows of a file that an earlier call wrote, by the digest of what was trained."""
  if not path or not Path(path).exists():
    return {}
  rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
  return {row["recipe"]: row for row in rows}


def train_together(args: argparse.Namespace, chosen: list[str]) -> None:
  """Adds the rows of `chosen` to `args.out`, `args.jobs` at a time, each a process of its own.

  The last begin: BLIP-2, which takes longest, is one of them. What fails is missing, and then
  trained by the caller.
  """
  cores, free = sorted(os.sched_getaffinity(0)), queue.SimpleQueue()
  for job in range(args.jobs):
    free.put(",".join(map(str, cores[job::args.jobs] or cores)))
  fields = [f"--{name}={getattr(args, name)}" for name in ("out", "split", "seed", "steps", "data")]

  def one_of_them(arg: str) -> None:
    mine = free.get()
    command = ["taskset", "--cpu-list", mine, sys.executable, __file__, arg, *fields]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    free.put(mine)

  with futures.ThreadPoolExecutor(args.jobs) as pool:
    list(pool.map(one_of_them, reversed(chosen)))


def lines(arg: str, result: dict[str, Any]) -> list[tuple]:
  """The rows of one argument, as `HEADER`."""
  return [(arg, result["tokens"], name, number["value"], *number["interval"],
           *(number["band"] or ("", "")), "" if number["inside"] else "OUTSIDE", result["seconds"])
          for name, number in result["numbers"].items()]


def main(argv: list[str]) -> int:
  """Runs what is asked for; the number of bands that were missed."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("args", nargs="*", metavar="ARG", help="of the recipe")
  parser.add_argument("--full", action="store_true", help="everything that has bands")
  parser.add_argument("--out", default="", help="file of rows, to which missing ones are added")
  parser.add_argument("--jobs", type=int, default=1, help="how many train at a time, with --out")
  parser.add_argument("--split", default="test", choices=("validation", "test"))
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--steps", type=int, default=0)
  parser.add_argument("--data", default="", help="default: the recipe's data.root")
  args = parser.parse_args(argv)
  chosen = list(BANDS) if args.full else args.args or list(SHORT)
  if unknown := set(chosen) - set(BANDS):
    parser.error(f"no bands for {', '.join(sorted(unknown))}; choose among {' '.join(BANDS)}")
  if args.jobs > 1:
    if not args.out:
      parser.error("--jobs needs --out=FILE, which takes the rows")
    train_together(args, chosen)
  done, earlier, outside = {}, known(args.out), []
  print(protocol.line(HEADER, WIDTHS))
  for arg in chosen:
    config = recipe(arg, args)
    name = digest.of_json([config.to_json(), BANDS[arg]])
    done[arg] = earlier.get(name) or one(config, BANDS[arg])
    if args.out and name not in earlier:
      with open(args.out, "a") as file:
        print(json.dumps({"recipe": name, "argument": arg} | done[arg]), file=file)
    for row in lines(arg, done[arg]):
      print(protocol.line(row, WIDTHS), flush=True)
      outside += [f"{arg} {row[2]}"] * bool(row[-2])
  of = lambda key: {arg: result[key] for arg, result in done.items()}
  protocol.finish({
    "seed": args.seed, "split": args.split, "steps": of("steps"), "numbers": of("numbers"),
    "tokens": of("tokens"), "seconds": of("seconds"), "outside": outside})
  return len(outside)


if __name__ == "__main__":
  sys.exit(min(1, main(sys.argv[1:])))
