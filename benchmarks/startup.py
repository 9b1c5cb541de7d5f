"""How long the quickstart's training takes to reach step 1: first start, and a second one.

Two processes train the quickstart's mix for one step, each in a new workdir, both with one
compilation cache that starts empty. A start is everything a user waits for: the interpreter, the
imports, opening the data, initialising, compiling, one step. Bar: the second at most 30% of it.

The last line is JSON with the keys
  first_seconds, second_seconds   from the start of the process to the end of step 1
  share                           second / first
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def start(folder: Path, number: int) -> float:
  """Seconds until the process that trains one step prints its line for it."""
  command = [
    sys.executable, "-m", "vlm_jax", "train", "--config=configs/quickstart.py",
    "--config.train.steps=2", "--config.train.log_every=1",
    f"--config.train.compilation_cache={folder / 'cache'}", f"--workdir={folder / str(number)}",
  ]
  began = time.perf_counter()
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    reached = None
    for line in process.stdout:
      if reached is None and line.startswith("step 1/"):
        reached = time.perf_counter() - began
        process.kill()
  if reached is None:
    raise RuntimeError("the training ended before step 1; run its command by hand to see why")
  return reached


def main() -> None:
  """Starts twice and prints both."""
  from vlm_jax.configs import quickstart
  from vlm_jax.data import prepare

  config = quickstart.get_config()
  prepare.prepare(config.data.root, ["easy_vqa", "openmoji", "pydoc"], config.llm.vocab_size)
  with tempfile.TemporaryDirectory() as name:
    first, second = (start(Path(name), number) for number in (1, 2))
  result = {"first_seconds": first, "second_seconds": second, "share": second / first}
  for key, value in result.items():
    print(f"{key:16s} {value:8.2f}")
  print(json.dumps(result), flush=True)


if __name__ == "__main__":
  main()
