"""Run by test_mesh.py in a process of its own: training on 8 devices and on 1, checkpoints between.

Prints a line per mesh and "ok"; an assertion fails the process.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "")
                           + " --xla_force_host_platform_device_count=8")
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np

from tests.train import tiny_fusion
from vlm_jax.core import mesh as mesh_lib
from vlm_jax.train import state as state_lib
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.train.optimizer import make_optimizer
from vlm_jax.train.step import make_step, place

STEPS = 4
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (4, 1, 2)}


def build(sizes, devices, accumulation=1):
  """The step function, an abstract state and how to make a fresh one, on a mesh of these sizes."""
  config = tiny_fusion.get_config()
  config.data.rows = 16
  config.train.accumulation = accumulation
  config.mesh.update(dict(zip(mesh_lib.AXES, sizes, strict=True)))
  mesh = mesh_lib.make_mesh(config, devices)
  init, leaves = state_lib.initializer(tiny_fusion, config)
  optimizer = make_optimizer(config, tiny_fusion.STAGES, leaves)
  abstract = state_lib.abstract_state(leaves, optimizer.init, mesh)
  create = lambda: state_lib.create(init, optimizer.init, abstract, config.seed)
  return config, mesh, make_step(config, tiny_fusion, optimizer, mesh, abstract), abstract, create


def losses(config, mesh, step, state, scale=1.0):
  found = []
  for index in range(STEPS):
    flat = tiny_fusion.batch(config, index)
    state, numbers = step(state, place(flat, mesh))
    found.append(float(numbers.total) * scale)
  return np.asarray(found), state


def main():
  devices = jax.devices()
  config, mesh, step, alone, create = build((1, 1, 1), devices[:1])
  state = create()
  initial = jax.device_get(state)
  expected, final = losses(config, mesh, step, state)
  final = jax.device_get(final)
  assert np.isfinite(expected).all() and np.ptp(expected) > 0.1
  worst = lambda found: np.max(np.abs(found - expected) / expected)

  built = {name: build(sizes, devices, accumulation=2 if name == "fsdp" else 1)
           for name, sizes in MESHES.items()}
  with tempfile.TemporaryDirectory() as folder:
    store = Checkpoints(Path(folder) / "checkpoints", keep=9)
    for number, (name, (config, mesh, step, _, create)) in enumerate(built.items(), 1):
      state = create()
      same = jax.tree.map(lambda a, b: np.array_equal(a, b), jax.device_get(state), initial)
      assert all(jax.tree.leaves(same)), "the first parameters depend on the mesh"
      spread = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
      assert name == "data" or spread >= 6, "nothing is sharded"
      found, state = losses(config, mesh, step, state)
      assert worst(found) < 1e-5, (name, worst(found))
      store.save(number, state, {}, {"step": number})
      store.finish(number)
      print(f"{name}: {worst(found):.1e}, {spread} sharded arrays")

      # What one mesh saved is what every other restores, to the bit.
      targets = {other: parts[3] for other, parts in built.items()} | {"one device": alone}
      for other, target in targets.items():
        restored, _, _ = store.restore(target)
        same = jax.tree.map(lambda a, b: np.array_equal(a, b), jax.device_get(restored),
                            jax.device_get(state))
        assert all(jax.tree.leaves(same)), (name, other)
        places = jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, target)
        assert all(jax.tree.leaves(places)), (name, other)
    store.close()

  # Twin: a loss divided by the rows of one device is far off.
  assert worst(expected * 8) > 100 * 1e-5
  assert not np.array_equal(final.params["llm"]["layers"], initial.params["llm"]["layers"])
  print("ok")


if __name__ == "__main__":
  main()
