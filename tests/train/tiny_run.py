"""A training process for tests: `python -m tests.train.tiny_run WORKDIR CACHE [field=value ...]`.

Beside those of the config, fields are: delay (seconds per batch), hang (the step whose batch never
comes), full (from:to, the steps during which no file can grow).
"""

import resource
import signal
import sys
import time

from tests.train import tiny_fusion
from vlm_jax.cli.config import override
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


def main(workdir, cache, *fields):
  pairs = dict(field.split("=") for field in fields)
  Loader.delay = float(pairs.pop("delay", 0))
  Loader.hang = int(pairs.pop("hang", 0))
  Loader.full = tuple(map(int, pairs.pop("full", "0:0").split(":")))
  config = tiny_fusion.get_config()
  config.train.compilation_cache = cache
  override(config, list(pairs.items()))
  from vlm_jax.train.loop import train

  try:
    train(config, workdir, make_loader=Loader)
  except UserError as error:
    print(f"vlm-jax: {error}", file=sys.stderr, flush=True)
    return error.code
  return 0


if __name__ == "__main__":
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  sys.exit(main(*sys.argv[1:]))
