"""Vocabulary losses a piece of the logits at a time, against all logits at once.

Work: the gradients of the cross-entropy of 4096 slots of width 1024 over 131,072 tokens, f32, with
respect to hidden and head. Sides:

  ours           ops.losses.token_losses, which never holds more than a chunk of the logits
  logsumexp      logsumexp of all logits [B,T,V], targets picked by comparing: nothing is scattered

Both must agree with jax.nn.log_softmax of the logits to 1e-5 of the largest value (loss and
gradients) before anything is timed. That one is the oracle and is not timed: it makes the same
logits, and log-probabilities besides. `--small` runs a 64th of the work.

The last line is JSON:
  xent_memory   temporary bytes of our compiled program / of the other side's
  xent_speed    seconds of the other side / seconds of ours, null when contended
  temporary     bytes of every side, by the compiler's buffer assignment
  errors        the largest relative difference of loss and gradients from log_softmax
  compile       seconds every side took to compile
  seconds, best, matmul, others, contended, machine   see protocol.py
"""

import argparse
import time
from collections.abc import Callable

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


SIDES: dict[str, Callable] = {"ours": ours, "logsumexp": logsumexp}


def inputs(sizes: tuple[int, int, int]) -> tuple[Array, Array, Array]:
  """hidden f[1,T,D], head f[D,V] and targets i32[1,T]; logits have variance 1."""
  slots, width, vocabulary = sizes
  hidden, head, targets = jax.random.split(jax.random.key(0), 3)
  return (jax.random.normal(hidden, (1, slots, width)),
          jax.random.normal(head, (width, vocabulary)) * width**-0.5,
          jax.random.randint(targets, (1, slots), 0, vocabulary))


def compiled(side: Callable, arguments: tuple) -> jax.stages.Compiled:
  """Loss and gradients of a side."""
  return jax.jit(jax.value_and_grad(side, (0, 1))).lower(*arguments).compile()


def error(got: tuple, want: tuple) -> float:
  """The largest difference of any array, relative to its largest value."""
  share = lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max())
  return max(jax.tree.leaves(jax.tree.map(share, got, want)))


def measure(small: bool = False) -> dict:
  """Runs the comparison; the keys are those of the module's docstring without `machine`."""
  sizes = SMALL if small else (SLOTS, WIDTH, VOCABULARY)
  arguments = jax.block_until_ready(inputs(sizes))
  runs, compile_seconds = {}, {}
  for name in SIDES:
    start = time.perf_counter()
    runs[name] = compiled(SIDES[name], arguments)
    compile_seconds[name] = time.perf_counter() - start
  want = compiled(log_softmax, arguments)(*arguments)
  errors = {name: error(run(*arguments), want) for name, run in runs.items()}
  if not max(errors.values()) < TOLERANCE or not np.isfinite(want[0]):
    raise AssertionError(f"the sides differ: {errors}")
  del want
  timing = protocol.measure({
    name: lambda run=run: jax.block_until_ready(run(*arguments)) for name, run in runs.items()})
  temporary = {name: run.memory_analysis().temp_size_in_bytes for name, run in runs.items()}
  return {"xent_memory": temporary["ours"] / temporary["logsumexp"],
          "xent_speed": protocol.ratio(timing, "ours", ["logsumexp"])[0], "temporary": temporary,
          "errors": errors, "compile": compile_seconds, **timing}


def main() -> None:
  """Runs the comparison."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--small", action="store_true")
  result = measure(parser.parse_args().small)
  protocol.report(
    ["side", "seconds", "temporary MiB", "compile s"],
    [[name, result["best"][name], result["temporary"][name] / 2**20, result["compile"][name]]
     for name in SIDES],
    result,
  )


if __name__ == "__main__":
  main()
