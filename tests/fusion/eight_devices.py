"""Run by test_contract.py in a process of its own: losses and gradients on 8 devices and on 1.

`--all`: meshes of one axis as well. Prints "ok" with the errors of loss and gradients for every
mesh and strategy; exits with 1 when one is too large, or when a broken twin is not.
"""

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "")
                           + " --xla_force_host_platform_device_count=8")
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import NamedSharding

from tests.fusion import testing as t
from vlm_jax.core import batch as batches
from vlm_jax.core import mesh as mesh_lib
from vlm_jax.core.batch import from_flat
from vlm_jax.core.fusion import find_fusion

LOSS = 1e-5
# Those of nearly uniform attention are small differences of large numbers, where another order of
# sums was seen to change 1.3e-5 of a parameter's largest.
GRADIENTS = 2e-5
MESHES = [(2, 2, 2)]  # every axis at once
ALL_MESHES = [*MESHES, (8, 1, 1), (1, 8, 1), (1, 4, 2)]
ROWS = 8


def batch_of(config) -> dict:
  """Eight rows with different documents in each."""
  flats = []
  for seed in range(ROWS // 2):
    documents = t.documents(seed, fan_out=True)
    flats.append(t.pack(t.lay_out(documents, config, seed), config)[0])
  return {path: np.concatenate([flat[path] for flat in flats]) for path in flats[0]}


def shardings(config, mesh):
  module = find_fusion(config)
  row = from_flat(batches.empty(module.fields(config), module.axes(config), 1))
  boxed = jax.eval_shape(module.Model(config).init, jax.random.key(0), row)["params"]
  is_box = lambda leaf: isinstance(leaf, meta.AxisMetadata)
  return jax.tree.map(
    lambda box: NamedSharding(mesh, mesh_lib.spec(box.names, box.value.shape, mesh)),
    boxed, is_leaf=is_box,
  )


def quiet(loss_and_grads) -> tuple:
  loss, grads = jax.device_get(loss_and_grads)
  return loss, t.silence(grads)


def main() -> int:
  meshes = ALL_MESHES if "--all" in sys.argv else MESHES
  # The strategies of a group have one network, compiled once.
  groups = [[("concat", "bidirectional", True), ("prefix_lm", None, True)],
            [("simvlm", None, True)], [("llava_next", "causal", True)],
            [("flamingo", "last", True)]]
  return 0 if all(same(variants, meshes) for variants in groups) else 1


def same(variants, meshes) -> bool:
  """Whether eight devices compute what one does; prints a line a mesh and strategy."""
  configs = [t.get_config(*variant) for variant in variants]
  params = t.noise_params(configs[0])
  model = find_fusion(configs[0]).Model(t.same_network(configs[0]))
  losses = find_fusion(configs[0]).losses

  def total(params, batch, scale):
    output = model.apply({"params": params}, batch)
    return jnp.sum(losses(output, batch, configs[0])["lm"] * scale)

  scales, data, expected = [], [], []
  single = jax.jit(jax.value_and_grad(total))
  for config in configs:
    flat = batch_of(config)
    weights = np.asarray(find_fusion(config).weights(from_flat(flat), config)["lm"])
    assert (weights > 0).all()
    data.append(flat)
    scales.append((1 / weights).astype(np.float32))
    expected.append(quiet(single(params, from_flat(flat), scales[-1])))
  for sizes in meshes:
    config = configs[0]
    config.mesh.update(dict(zip(mesh_lib.AXES, sizes, strict=True)))
    mesh = mesh_lib.make_mesh(config)
    with jax.set_mesh(mesh):
      spread = jax.device_put(params, shardings(config, mesh))
      run = jax.jit(jax.value_and_grad(total))
      for (name, *_), flat, scale, reference in zip(variants, data, scales, expected, strict=True):
        rows = jax.device_put(flat, mesh_lib.row_sharding(mesh))
        got = quiet(run(spread, from_flat(rows), scale))
        off = lambda loss, true=float(reference[0]): abs(float(loss) - true) / true
        worst = t.error(got[1], reference[1])
        # Twin: the loss of one device's rows taken for the whole.
        good = (off(got[0]) < LOSS and worst < GRADIENTS and off(got[0] / ROWS) > 100 * LOSS)
        print("ok" if good else "BAD", name, sizes, off(got[0]), worst, flush=True)
        if not good:
          return False
  return True


if __name__ == "__main__":
  sys.exit(main())
