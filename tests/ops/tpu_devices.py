"""Run by test_pallas_tpu_grid.py in a process of its own: the TPU kernels on meshes of 8 devices.

Prints a line per case and "ok"; an assertion fails the process.
"""

import functools
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "")
                           + " --xla_force_host_platform_device_count=8")
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from tests.ops.tpu_cases import TOLERANCE, documents, errors, inputs, oracle, program
from vlm_jax.core.mesh import AXES, spec
from vlm_jax.ops.attention import pallas_tpu, splash
from vlm_jax.ops.attention.sharding import on_mesh

NAMES = {"q": ("batch", None, "heads", None), "k": ("batch", None, "kv_heads", None)}
NAMES["v"] = NAMES["k"]


def spread(module, q, k, v, mask, plan, k_bias=None, **options):
  """`attend` of an implementation as `attention` calls it, interpreted."""

  def local(q, k, v, mask, plan, bias, k_bias):
    return module.attend(q, k, v, mask, plan, bias=bias, k_bias=k_bias, interpret=True, **options)

  return on_mesh(local, q, k, v, mask, plan, None, k_bias)


def run(module, heads: int, groups: int, biased: bool, mesh: Mesh | None, policy: str, roll=0):
  """Results and what they should be; `roll` gives rows the metadata of their neighbours."""
  rng = np.random.default_rng(0)
  mask = documents(rng, 4, 130, policy)
  x = inputs(rng, (4, 130, heads, 8), (4, 130, groups, 8))
  want = oracle(x, mask, biased=biased)
  rolled = jax.tree.map(lambda field: np.roll(field, roll, 0), mask)
  if mesh is not None:
    put = lambda name, value: jax.device_put(value, NamedSharding(mesh, spec(
      NAMES.get(name, ("batch",) + (None,) * (value.ndim - 1)), value.shape, mesh)))
    x = {name: put(name, value) for name, value in x.items()}
    rolled = jax.tree.map(lambda field: put("", field), rolled)
  both = program(functools.partial(spread, module), (128, 128), biased=biased)
  return both(x, rolled), want


def main() -> None:
  names = ("out", "lse", "q", "k", "v")
  for module, sizes, heads, groups, biased, policy in (
    (pallas_tpu, (2, 2, 2), 4, 2, True, "fan_out"),
    (pallas_tpu, (2, 1, 4), 4, 1, False, "prefix"),  # one group: on every device
    (pallas_tpu, (4, 1, 2), 6, 3, False, "prefix"),  # groups that cannot be split
    (splash, (2, 2, 2), 4, 2, False, "prefix"),
  ):
    mesh = Mesh(np.array(jax.devices()).reshape(sizes), AXES)
    with jax.set_mesh(mesh):
      got, want = run(module, heads, groups, biased, mesh, policy)
    found = errors(got, want, names + (("k_bias",) if biased else ()))
    assert max(found.values()) < TOLERANCE, found
    local = {shard.data.shape for shard in got["out"].addressable_shards}
    split = heads if groups == 3 else heads // sizes[2]
    assert local == {(4 // (sizes[0] * sizes[1]), 130, split, 8)}, local
    print(module.__name__, sizes, heads, groups, local)
  with jax.set_mesh(mesh):
    got, want = run(splash, 4, 2, False, mesh, "prefix", roll=1)
  got["lse"] = np.where(np.isneginf(want["lse"]), -np.inf, np.nan_to_num(got["lse"], neginf=0.0))
  assert min(errors(got, want, names).values()) > 100 * TOLERANCE
  print("ok")


if __name__ == "__main__":
  main()
