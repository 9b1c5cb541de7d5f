"""Compiles the TPU attention kernels, forward and backward, where there is no TPU.

usage: python -m tests.ops.compile_for_tpu DUMPS CASE...

A case is JSON: generation, length, width, heads, groups, and options with a default (see
`DEFAULTS`). For each a line of JSON is printed: what the compiler says its kernels take. A program
of its own because libtpu reads its flags from the environment and keeps the process to itself.
"""

import contextlib
import functools
import json
import math
import os
import re
import sys
from pathlib import Path

# Before JAX is imported: look for no TPU, and say what the compiler made of each kernel.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # what is not compiled here says nothing
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # compiling keeps no chip from other processes
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
if __name__ == "__main__":
  os.environ["LIBTPU_INIT_ARGS"] = (
    f"--xla_jf_dump_to={sys.argv[1]} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=.*(original|final_bundles)")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.mesh import AXES, spec
from vlm_jax.ops.attention import (
  ORDER,
  attention,
  make_plan,
  pallas_tpu,
  pallas_tpu_forward,
)

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
DEFAULTS = dict(batch=1, dtype="bfloat16", implementation="pallas_tpu", classes=False,
                k_index=False, k_bias=False, soft_cap=None, partial=True, mesh=(1, 1, 1), told=True)


class Always:
  """In place of the flag WHOLE: every pair is, and the kernel has no code for partial blocks."""

  def __rand__(self, entry):
    return self

  def __ne__(self, other):
    return True

  def __eq__(self, other):
    return False


def compiled(generation, length, width, heads, groups, batch, dtype, implementation, classes,
             k_index, k_bias, soft_cap, mesh, told):
  """The compiled gradient of the sum of out and lse, and the block sizes.

  mesh: devices along data, fsdp and tensor; told: whether attention may know of it.
  """
  devices = topologies.get_topology_desc(
    platform="tpu", topology_name=TOPOLOGIES[generation]).devices
  mesh = Mesh(np.array(devices[: math.prod(mesh)]).reshape(mesh), AXES)
  shape = lambda dtype, *shape, names: jax.ShapeDtypeStruct(
    shape, dtype, sharding=NamedSharding(mesh, spec(names, shape, mesh)))
  row = shape(jnp.int32, batch, length, names=("batch", None))
  maybe = lambda wanted, value: value if wanted else None
  mask = IntervalMask(row, row, maybe(classes, row), maybe(classes, row), maybe(k_index, row))
  blocks = pallas_tpu.block_sizes(length, length, width, dtype, devices[0].device_kind)
  def total(arrays, mask):
    plan = make_plan(mask, length, block_q=blocks[0], block_k=blocks[1])
    out, lse = run(**arrays, mask=mask, plan=plan, scale=width**-0.5, soft_cap=soft_cap)
    return out.astype(jnp.float32).sum() + lse.sum()

  run = functools.partial(attention, implementation=implementation, return_lse=True)
  if not told:
    run = ORDER[implementation].attend

  head = lambda number, name: shape(
    jnp.dtype(dtype), batch, length, number, width, names=("batch", None, name, None))
  key = head(groups, "kv_heads")
  arrays = dict(q=head(heads, "heads"), k=key, v=key)
  if k_bias:
    arrays["k_bias"] = shape(jnp.float32, batch, length, names=("batch", None))
  with jax.set_mesh(mesh) if told else contextlib.nullcontext():
    return jax.jit(jax.grad(total)).lower(arrays, mask).compile(), blocks


def vector_memory(text: str) -> dict[str, int]:
  """Bytes of VMEM of each kernel, from the compiled program's text."""
  calls = re.findall(r'%(\S+?)(?:\.\d+)? = [^%]*custom-call\([^\n]*?"tpu_custom_call".*?'
                     r'"used_scoped_memory_configs":\[(.*?)\]', text, re.DOTALL)
  return {name(kernel): sum(int(size) for size in re.findall(r'"size":"(\d+)"', used))
          for kernel, used in calls}


def name(text: str) -> str:
  """forward, dq or dkv, or the whole text."""
  found = re.search("(forward|dq|dkv|fwd)", text)
  return found.group(1).replace("fwd", "forward") if found else text


def read_dumps(folder: Path) -> dict[str, dict]:
  """Of each kernel: bytes of SMEM, and the bundles of its regions between branches, in order."""
  found: dict[str, dict] = {}
  for path in sorted(folder.rglob("*interval_attention*.txt")):
    kernel = found.setdefault(name(path.name), {})
    text = path.read_text()
    if path.name.endswith("-original.txt"):
      sizes = re.findall(r"space=smem, size = (0x[0-9a-f]+)", text)
      kernel["smem"] = sum(int(size, 16) for size in sizes)
    elif path.name.endswith("-final_bundles.txt") and "schedule" not in path.name:
      # Scalars that found no register.
      kernel["spilled"] = 4 * len(set(re.findall(r"smem:\[#(allocation\d+_spill)\]", text)))
      kernel["regions"] = regions(text)
    path.unlink()
  return found


def regions(text: str) -> list[int]:
  """Numbers of instruction bundles, one a cycle, between branches and their targets."""
  edges, last = [0], 0
  for line in text.splitlines():
    bundle = re.match(r"\s*(0x[0-9a-f]+|0)\s+(\w\w)?\s*:", line)
    if bundle:
      last = int(bundle.group(1), 16)
      if bundle.group(2) or "sbr.rel" in line:
        edges.append(last)
  return [end - start for start, end in zip(edges, [*edges[1:], last + 1], strict=True)]


def report(folder: Path, case: dict) -> dict:
  """Compiles one case and says what its kernels take."""
  case = DEFAULTS | case
  partial = case.pop("partial")
  if not partial:
    pallas_tpu_forward.WHOLE = Always()
  program, (block_q, block_k) = compiled(**case)
  vmem = vector_memory(program.as_text())
  kernels = read_dumps(folder)
  return dict(
    case=case, block_q=block_q, block_k=block_k, vmem=vmem,
    smem={kernel: read["smem"] + read["spilled"] for kernel, read in kernels.items()},
    regions={kernel: read["regions"] for kernel, read in kernels.items()},
    flops=program.cost_analysis().get("flops"))


if __name__ == "__main__":
  for argument in sys.argv[2:]:
    print(json.dumps(report(Path(sys.argv[1]), json.loads(argument))), flush=True)
