"""A training process for tests: `python -m tests.train.tiny_run WORKDIR CACHE [field=value ...]`.

Beside those of the config, fields are: delay (seconds per batch), hang (the step whose batch never
comes), full (from:to, the steps during which no file can grow), quiz (step:n, an evaluation of n
slow batches at that step and of one at others), deaf (1: it has no point where it can be stopped).
"""

import resource
import signal
import sys
import time

from tests.train import tiny_fusion
from vlm_jax.cli.config import override
from vlm_jax.configs import base
from vlm_jax.core import stopping
from vlm_jax.core.errors import UserError


class Loader(tiny_fusion.Loader):
  delay, hang, full = 0.0, 0, (0, 0)

  def __next__(self):
    time.sleep(self.delay)
    if self.index + 1 == self.hang:
      print("hanging", flush=True)
      time.sleep(600)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    inside = self.full[0] <= self.index + 1 < self.full[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if inside else hard, hard))
    return super().__next__()


def quiz(slow, batches, deaf):
  """An evaluation as training calls it."""

  def evaluate(name, params, step):
    print(f"asking at step {step}", flush=True)
    for _ in range(batches if step == slow else 1):
      time.sleep(0.1 if step == slow else 0)
      if not deaf:
        stopping.point()
    return {"accuracy": float(params["llm"]["scale"].sum())}

  return evaluate


def main(workdir, cache, *fields):
  pairs = dict(field.split("=") for field in fields)
  Loader.delay = float(pairs.pop("delay", 0))
  Loader.hang = int(pairs.pop("hang", 0))
  Loader.full = tuple(map(int, pairs.pop("full", "0:0").split(":")))
  slow, _, batches = pairs.pop("quiz", "").partition(":")
  deaf = bool(pairs.pop("deaf", ""))
  config = tiny_fusion.get_config()
  config.train.compilation_cache = cache
  evaluate = None
  if slow:
    config.evals.quiz, evaluate = base.evaluation(), quiz(int(slow), int(batches), deaf)
  override(config, list(pairs.items()))
  from vlm_jax.train.loop import train

  try:
    train(config, workdir, make_loader=Loader, evaluate=evaluate)
  except UserError as error:
    print(f"vlm-jax: {error}", file=sys.stderr, flush=True)
    return error.code
  return 0


if __name__ == "__main__":
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  sys.exit(main(*sys.argv[1:]))
