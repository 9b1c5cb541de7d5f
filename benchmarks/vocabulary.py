"""Vocabulary losses a piece of the logits at a time, against all logits at once.

Work: the gradients of the cross-entropy of 4096 slots of width 1024 over 131,072 tokens, f32, with
respect to hidden and head. Sides:

  ours           ops.losses.token_losses, which never holds more than a chunk of the logits
  log_softmax    jax.nn.log_softmax of the [B,T,V] logits, targets picked by index
  logsumexp      the same without a [B,T,V] array of log-probabilities: logsumexp of the logits,
                 targets picked by comparison, whose gradient is not scattered

Both kinds must agree to 1e-5 of the largest value (loss and gradients) before anything is timed.
`--small` runs a 64th of the work, to see that the script runs.

The last line is JSON:
  xent_memory   temporary bytes of our compiled program / of the side with fewer of the other two
  xent_speed    seconds of the faster of the other two / seconds of ours, null when contended
  temporary     bytes of every side, by the compiler's buffer assignment
  resident      by how much one run of a side raises its process's peak memory, its result included
  fastest       which of the other two was faster
  errors        the largest relative difference of loss and gradients from log_softmax
  compile       seconds every side took to compile
  seconds, best, matmul, others, contended, machine   see protocol.py
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import protocol

from vlm_jax.core.typing import Array
from vlm_jax.ops import losses

SLOTS, WIDTH, VOCABULARY = 4096, 1024, 131072
SMALL = (512, 1024, 16384)
TOLERANCE = 1e-5


def ours(hidden: Array, head: Array, targets: Array) -> Array:
  """f32[], the sum of all losses."""
  wanted = jnp.ones(targets.shape, bool)
  return losses.token_losses(hidden, head, targets, wanted).cross_entropy.sum()


def log_softmax(hidden: Array, head: Array, targets: Array) -> Array:
  """f32[], the sum of all losses."""
  log_p = jax.nn.log_softmax(jnp.einsum("btd,dv->btv", hidden, head))
  return -jnp.take_along_axis(log_p, targets[..., None], axis=-1).sum()


def logsumexp(hidden: Array, head: Array, targets: Array) -> Array:
  """f32[], the sum of all losses."""
  logits = jnp.einsum("btd,dv->btv", hidden, head)
  chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
  picked = jnp.where(chosen, logits, 0).sum(-1)
  return (jax.nn.logsumexp(logits, axis=-1) - picked).sum()


SIDES: dict[str, Callable] = {"ours": ours, "log_softmax": log_softmax, "logsumexp": logsumexp}


def inputs(sizes: tuple[int, int, int]) -> tuple[Array, Array, Array]:
  """hidden f[1,T,D], head f[D,V] and targets i32[1,T]; logits have variance 1."""
  slots, width, vocabulary = sizes
  hidden, head, targets = jax.random.split(jax.random.key(0), 3)
  return (jax.random.normal(hidden, (1, slots, width)),
          jax.random.normal(head, (width, vocabulary)) * width**-0.5,
          jax.random.randint(targets, (1, slots), 0, vocabulary))


def compiled(name: str, arguments: tuple) -> jax.stages.Compiled:
  """Loss and gradients of a side."""
  return jax.jit(jax.value_and_grad(SIDES[name], (0, 1))).lower(*arguments).compile()


def once(name: str, sizes: tuple[int, int, int]) -> int | None:
  """By how many bytes running a side once raises what this process has in memory, at its peak.

  The result is part of it. None where /proc cannot tell (macOS).
  """
  arguments = jax.block_until_ready(inputs(sizes))
  run = compiled(name, arguments)
  try:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = _status("VmRSS")
    jax.block_until_ready(run(*arguments))
    return _status("VmHWM") - before
  except OSError:
    return None


def _status(field: str) -> int:
  """A field of /proc/self/status in bytes."""
  lines = Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def error(got: tuple, want: tuple) -> float:
  """The largest difference of any array, relative to its largest value."""
  share = lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max())
  return max(jax.tree.leaves(jax.tree.map(share, got, want)))


def measure(small: bool = False) -> dict:
  """Runs the comparison; the keys are those of the module's docstring without `machine`."""
  sizes = SMALL if small else (SLOTS, WIDTH, VOCABULARY)
  # In processes of their own, and before this one has anything in memory.
  flags = ["--small"] if small else []
  peaks = {name: json.loads(subprocess.run(
    [sys.executable, __file__, "--once", name, *flags], capture_output=True, text=True, check=True,
  ).stdout) for name in SIDES}
  arguments = jax.block_until_ready(inputs(sizes))
  runs, compile_seconds = {}, {}
  for name in SIDES:
    start = time.perf_counter()
    runs[name] = compiled(name, arguments)
    compile_seconds[name] = time.perf_counter() - start
  want = runs["log_softmax"](*arguments)
  errors = {name: error(runs[name](*arguments), want) for name in ("ours", "logsumexp")}
  if not max(errors.values()) < TOLERANCE or not np.isfinite(want[0]):
    raise AssertionError(f"the sides differ: {errors}")
  del want
  timing = protocol.measure({
    name: lambda run=run: jax.block_until_ready(run(*arguments)) for name, run in runs.items()})
  temporary = {name: run.memory_analysis().temp_size_in_bytes for name, run in runs.items()}
  others = [name for name in SIDES if name != "ours"]
  speed, fastest = protocol.ratio(timing, "ours", others)
  return {"xent_memory": temporary["ours"] / min(temporary[name] for name in others),
          "xent_speed": speed, "temporary": temporary, "resident": peaks, "fastest": fastest,
          "errors": errors, "compile": compile_seconds, **timing}


def main() -> None:
  """Runs the comparison, or with --once one side."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--small", action="store_true")
  parser.add_argument("--once", choices=SIDES)
  args = parser.parse_args()
  if args.once:
    print(json.dumps(once(args.once, SMALL if args.small else (SLOTS, WIDTH, VOCABULARY))))
    return
  result = measure(args.small)
  protocol.report(
    ["side", "seconds", "temporary MiB", "resident MiB", "compile s"],
    [[name, result["best"][name], result["temporary"][name] / 2**20,
      (result["resident"][name] or 0) / 2**20, result["compile"][name]] for name in SIDES],
    result,
  )


if __name__ == "__main__":
  main()
