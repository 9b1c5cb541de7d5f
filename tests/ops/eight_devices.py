"""Run by test_attention_devices.py in a process of its own: attention on 8 devices and on 1.

Prints a line per mesh and "ok"; an assertion fails the process.
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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.ops.attention_base import error, inputs, random_bias, random_pack
from vlm_jax.core import mesh as mesh_lib
from vlm_jax.ops.attention import attention, make_plan

ROWS, LENGTH, HEADS, GROUPS, WIDTH = 8, 70, 4, 2, 16
# Rows over devices, rows and heads, and heads that cannot be spread (two groups on four devices).
MESHES = ((8, 1, 1), (2, 2, 2), (1, 2, 4))
MOVES = ("all-gather", "all-to-all", "collective-permute")


def main() -> None:
  rng = np.random.default_rng(0)
  mask, keys = random_pack(rng, ROWS, LENGTH, "cut")
  x = inputs(rng, ROWS, LENGTH, keys, HEADS, GROUPS, WIDTH)
  x["k_bias"] = rng.normal(size=(ROWS, keys)).astype(np.float32)
  weigh = x.pop("weigh_out"), x.pop("weigh_lse")
  for kind in ("distance", "shared"):
    x["bias"] = random_bias(rng, kind, ROWS, HEADS, LENGTH, keys)

    def step(x, mask, weigh):
      plan = make_plan(mask, keys, block_q=16, block_k=24)

      def total(x):
        out, lse = attention(mask=mask, plan=plan, return_lse=True, implementation="xla", **x)
        return (out * weigh[0]).sum() + (jnp.maximum(lse, -1e3) * weigh[1]).sum(), out

      return jax.grad(total, has_aux=True, allow_int=True)(x)

    numbers = lambda grads: grads | (
      {"bias": grads["bias"].table} if kind == "distance" else {})  # noqa: B023
    grads, out = jax.jit(step)(x, mask, weigh)
    grads = numbers(grads)
    for sizes in MESHES:
      mesh = Mesh(np.asarray(jax.devices()).reshape(sizes), mesh_lib.AXES)
      with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        placed = {name: value if name == "bias" else jax.device_put(value, rows)
                  for name, value in x.items()}
        arguments = placed, jax.device_put(mask, rows), jax.device_put(weigh, rows)
        compiled = jax.jit(step).lower(*arguments).compile()
        got, got_out = compiled(*arguments)
      got = numbers(got)
      assert error(got_out, out) < 2e-6
      for name, grad in grads.items():
        assert error(got[name], grad) < 6e-6, (sizes, name)
      assert error(got["q"], np.roll(grads["q"], 1, axis=0)) > 100 * 6e-6, "twin: another row's"
      if sizes[2] == 1:
        assert not [name for name in MOVES if name in compiled.as_text()], "rows must stay"
      print(kind, sizes, flush=True)
  print("ok")


if __name__ == "__main__":
  main()
