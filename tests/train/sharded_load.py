"""Run by test_sharded_load.py in a process of its own: a checkpoint onto 8 devices and onto one.

Prints JSON: bytes of the parameters; the largest share of them that a device of the 8 holds, and
of one device; how far loading lifted the peak of resident memory.
"""

import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "")
                           + " --xla_force_host_platform_device_count=8")
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import ml_dtypes
import numpy as np

from tests.convert import tiny_llava
from vlm_jax.core import pieces
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.mesh import make_mesh
from vlm_jax.core.pieces import Pieces
from vlm_jax.core.tree import flatten, unflatten
from vlm_jax.train import checkpoint_tools, state
from vlm_jax.train.checkpoint import load_params

KIND = np.dtype(ml_dtypes.bfloat16)
SIZES = {"small": dict(width=256, mlp=512, heads=8, kv_heads=8, depth=2),
         "1B": dict(width=2048, mlp=5632, heads=16, kv_heads=16, depth=20, vocab_size=8192)}


def resident(field):
  """Bytes: "VmRSS" now, "VmHWM" the most there ever was."""
  lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
  return int(lines[field].split()[0]) * 1024


def noise(shape, seed):
  read = lambda start, stop: np.random.default_rng((seed, start)).random(
    (stop - start, *shape[1:]), np.float32).astype(KIND)
  return Pieces(shape, KIND, read, pieces.rows(shape, KIND))


def share(params, size):
  """The largest part of the parameters on one device."""
  held = {}
  for leaf in jax.tree.leaves(params):
    for shard in leaf.addressable_shards:
      held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
  return max(held.values()) / size


def main(folder, name):
  config = tiny_llava.get_config()
  config.llm.update(SIZES[name])
  config.precision.param = "bfloat16"
  _, leaves = state.initializer(find_fusion(config), config)
  drawn = {path: noise(leaf.shape, seed) for seed, (path, leaf) in enumerate(leaves.items())}
  size = sum(leaf.nbytes for leaf in drawn.values())
  checkpoint_tools.write_run(folder, config.to_json(), 3, unflatten(drawn), {})
  config.mesh.update(data=1, fsdp=4, tensor=2)
  abstract = state.abstract_params(leaves, make_mesh(config, jax.devices()))
  before = resident("VmRSS")
  Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
  params, _ = load_params(folder / checkpoint_tools.FOLDER, abstract)
  lifted = resident("VmHWM") - before
  for path, leaf in flatten(params).items():
    assert leaf.sharding == flatten(abstract)[path].sharding, path
    for ours, theirs in zip(pieces.of(leaf), drawn[path], strict=True):
      assert ours.tobytes() == theirs.tobytes(), path
  spread = share(params, size)
  del params
  alone = share(load_params(folder / checkpoint_tools.FOLDER, state.abstract_params(
    leaves, make_mesh(tiny_llava.get_config(), jax.devices()[:1])))[0], size)
  print(json.dumps([size, spread, alone, lifted]))


if __name__ == "__main__":
  main(Path(sys.argv[1]), sys.argv[2])
