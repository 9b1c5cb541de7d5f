"""Run by test_losses.py in a process of its own: the vocabulary losses on meshes of 8 devices.

Prints "ok" for every mesh where value and gradients are those of the float64 oracle and the
compiled program gathers neither head nor logits and loops without talking; else exits with 1.
"""

import os
import re
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "")
                           + " --xla_force_host_platform_device_count=8")
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np
from jax.sharding import NamedSharding

from tests.ops import vocabulary_oracle as full
from vlm_jax.core import mesh as mesh_lib
from vlm_jax.ops import losses

TOLERANCE = 5e-6
OPTIONS = {"soft_cap": 4.0, "smoothing": 0.1}
# data, fsdp, tensor, vocabulary: 100 columns are not a multiple of 8, which leaves them whole.
MESHES = [(1, 1, 8, 96), (2, 2, 2, 96), (1, 4, 2, 100), (8, 1, 1, 96), (1, 1, 8, 100)]
ROWS, LENGTH, WIDTH = 8, 12, 16
COLLECTIVES = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def problem(vocabulary: int):
  rng = np.random.default_rng(vocabulary)
  hidden = rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
  head = rng.normal(size=(WIDTH, vocabulary)).astype(np.float32)
  targets = rng.integers(0, vocabulary, (ROWS, LENGTH)).astype(np.int32)
  # Rows differ in how much is wanted: devices loop for different times.
  wanted = rng.random((ROWS, LENGTH)) < np.linspace(0, 1, ROWS)[:, None]
  return hidden, head, targets, wanted


def total(hidden, head, targets, wanted, above, above_z):
  found = losses.token_losses(hidden, head, targets, wanted, chunk=(16, 7), **OPTIONS)
  return (found[0] * above).sum() + (found[1] * above_z).sum(), tuple(found)


def collectives(text: str) -> list[str]:
  """What crosses devices, with shapes; in any computation of the program."""
  return re.findall(rf"= (\(?[^=()]+\)? (?:{COLLECTIVES}))(?:-start)?\(", text)


def loops(text: str) -> str:
  """The computations of the program that are (or are called from) bodies of loops."""
  computations = dict(re.findall(r"^%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", text, re.S | re.M))
  reached, new = set(), set(re.findall(r"body=%?([\w.\-]+)", text))
  while new:
    reached |= new
    bodies = " ".join(computations[name] for name in new)
    new = (set(re.findall(r"(?:calls|to_apply|body)=%?([\w.\-]+)", bodies))) - reached
  return "\n".join(computations[name] for name in reached)


def compiled(mesh, args):
  """The compiled program, and its arguments where they lie."""
  hidden, head, *others = args
  rows = mesh_lib.row_sharding(mesh)
  columns = NamedSharding(mesh, mesh_lib.spec((None, "vocab"), head.shape, mesh))
  places = (rows, columns, *(rows for _ in others))
  placed = [jax.device_put(x, place) for x, place in zip(args, places, strict=True)]
  out = ((rows, columns), (rows, rows))
  run = jax.jit(jax.grad(total, (0, 1), has_aux=True), out_shardings=out)
  return run.lower(*placed).compile(), placed


def check(sizes: tuple[int, ...]) -> bool:
  *axes, vocabulary = sizes
  hidden, head, targets, wanted = problem(vocabulary)
  above = full.cotangents(wanted, 1)
  want = full.token_losses(hidden, head, targets, wanted, *above, **OPTIONS)
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()).reshape(axes), mesh_lib.AXES)
  with jax.set_mesh(mesh):
    run, placed = compiled(mesh, (hidden, head, targets, wanted, *above))
    grads, found = jax.device_get(run(*placed))
    frozen, _ = jax.device_get(jax.jit(jax.grad(total, has_aux=True))(*placed))
  worst = max(full.errors((*found, *grads), want), full.errors((*found, frozen, grads[1]), want))
  text = run.as_text()
  looped = loops(text)
  quiet = "dot(" in looped and not collectives(looped)
  gathered = [line for line in collectives(text) if "gather" in line or "all-to-all" in line]
  # Twin: the losses of the wanted slots with one column of the head gone wrong on one device.
  head[:, -1] += 0.1
  twin = full.errors(full.token_losses(hidden, head, targets, wanted, *above, **OPTIONS), want)
  good = worst < TOLERANCE and twin > 100 * TOLERANCE and quiet and not gathered
  print("ok" if good else "BAD", sizes, worst, collectives(text), flush=True)
  return good


def notices() -> bool:
  """Twin of the check of the program: where no mesh is set, loops slice the sharded head."""
  hidden, head, targets, wanted = problem(96)
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()).reshape(1, 1, 8), mesh_lib.AXES)
  run, _ = compiled(mesh, (hidden, head, targets, wanted, *full.cotangents(wanted, 1)))
  talk = collectives(run.as_text())
  return any("gather" in line for line in talk) and bool(collectives(loops(run.as_text())))


def main() -> int:
  return 0 if all([notices(), *map(check, MESHES)]) else 1


if __name__ == "__main__":
  sys.exit(main())
