"""Kernels on a mesh: each device computes its rows and heads.

The compiler partitions what it understands; a TPU kernel it does not, and refuses. Rows and heads
are independent, so `jax.shard_map` gives every device its own and nothing is communicated.
"""

import functools
import math

import jax
from jax.sharding import PartitionSpec

from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.mesh import spec
from vlm_jax.core.typing import Array
from vlm_jax.ops.attention.plan import AttentionPlan


def rows_here(batch: int) -> int:
  """How many of the rows of a batch a device computes, on the mesh of `jax.set_mesh`."""
  mesh = jax.sharding.get_abstract_mesh()
  if _whole(mesh):
    return batch
  return batch // _ways(spec(("batch",), (batch,), mesh)[0], mesh)


def _ways(axes: str | tuple[str, ...] | None, mesh) -> int:
  """Over how many devices an entry of a PartitionSpec spreads its axis."""
  names = (axes,) if isinstance(axes, str) else axes or ()
  return math.prod(mesh.shape[name] for name in names)


def _whole(mesh) -> bool:
  """Whether arrays are here as they are: one device, or already a part, in a `jax.shard_map`."""
  return mesh.empty or mesh.size == 1 or bool(mesh.manual_axes)


def on_mesh(local, q: Array, k: Array, v: Array, k_bias: Array | None, mask: IntervalMask,
            plan: AttentionPlan) -> tuple[Array, Array]:
  """local(q, k, v, k_bias, mask, plan) on each device's part under the mesh of `jax.set_mesh`.

  Without a mesh of several devices, or inside a `jax.shard_map`, it is called as it is. Heads stay
  on all devices where their groups cannot be split as they are (G neither 1 nor a multiple).

  Args:
    local: returns out f[B,T,H,C] and lse f32[B,T,H] of what it is given.
    q, k, v: f[B,T,H,C], f[B,S,G,C], f[B,S,G,C].
    k_bias: f[B,S] or None.
    mask, plan: of all rows.

  Returns:
    The whole out and lse, sharded by rows and heads.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if _whole(mesh):
    return local(q, k, v, k_bias, mask, plan)
  q_spec = spec(("batch", None, "heads", None), q.shape, mesh)
  k_spec = spec(("batch", None, "kv_heads", None), k.shape, mesh)
  if k.shape[2] > 1 and q_spec != k_spec:
    q_spec, k_spec = (PartitionSpec(x[0], None, None, None) for x in (q_spec, k_spec))
  rows = PartitionSpec(q_spec[0])
  same = functools.partial(jax.tree.map, lambda _: rows)
  return jax.shard_map(
    local,
    in_specs=(q_spec, k_spec, k_spec, same(k_bias), same(mask), same(plan)),
    out_specs=(q_spec, PartitionSpec(*q_spec[:3])),
    check_vma=False,  # kernels do not say over which axes their results vary
  )(q, k, v, k_bias, mask, plan)
