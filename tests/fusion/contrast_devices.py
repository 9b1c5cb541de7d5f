"""Run by test_contrast.py in a process of its own: losses and gradients on 8 devices and on 1.

The losses go round the devices in chunks; one device has the whole matrix. `--all`: every strategy
on every mesh. Prints "ok" with the error for each; exits with 1 when one is too large, or a broken
twin is not.
"""

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "")
                           + " --xla_force_host_platform_device_count=8")
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax

from tests.fusion import contrast as c
from tests.fusion import testing as t
from tests.fusion.eight_devices import quiet, shardings
from vlm_jax.core import mesh as mesh_lib
from vlm_jax.core.batch import from_flat
from vlm_jax.core.fusion import find_fusion

TOLERANCE = 2e-5
MESHES = {"clip": (8, 1, 1), "siglip": (2, 2, 2), "blip2_qformer": (4, 1, 2)}
ROWS = 8


def main() -> int:
  for name in MESHES if "--all" in sys.argv else c.PLAIN:
    config = c.get_config(name, ROWS)
    module, params, flat = find_fusion(config), t.noise_params(config), c.batch(config)
    flat["documents/captions/digests"][5, 0] = flat["documents/captions/digests"][2, 1]

    def total(params, batch, module=module, config=config):
      return c.total(module.Model(config).apply({"params": params}, batch), batch, config)

    run = jax.value_and_grad(total)
    expected = quiet(jax.jit(run)(params, from_flat(flat)))
    # Twin: half of the batch taken for the whole.
    half = {path: array[: ROWS // 2] for path, array in flat.items()}
    part = jax.jit(total)(params, from_flat(half))
    twin = abs(float(part) / float(expected[0]) - 1)
    for sizes in MESHES.values() if "--all" in sys.argv else [MESHES[name]]:
      config.mesh.update(dict(zip(mesh_lib.AXES, sizes, strict=True)))
      mesh = mesh_lib.make_mesh(config)
      with jax.set_mesh(mesh):
        spread = jax.device_put(params, shardings(config, mesh))
        rows = from_flat(jax.device_put(flat, mesh_lib.row_sharding(mesh)))
        program = jax.jit(run).lower(spread, rows).compile()
        got = quiet(program(spread, rows))
      worst = t.error(got, expected)
      ring = "collective-permute" in program.as_text()
      good = worst < TOLERANCE and twin > 100 * TOLERANCE and ring
      print("ok" if good else "BAD", name, sizes, worst, twin, ring, flush=True)
      if not good:
        return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
