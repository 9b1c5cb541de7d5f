"""Attention on a mesh: each device computes its rows and heads, and needs nothing of the others'.

The compiler partitions what it understands. Loops over blocks it would gather, and a TPU kernel it
refuses; `jax.shard_map` gives every device its own part, and nothing is communicated.
"""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.mesh import spec
from vlm_jax.core.typing import Array
from vlm_jax.ops.attention.bias import Bias, DistanceBias
from vlm_jax.ops.attention.plan import AttentionPlan


def on_mesh(local: Callable, q: Array, k: Array, v: Array, mask: IntervalMask,
            plan: AttentionPlan | None, bias: Bias | None, k_bias: Array | None
            ) -> tuple[Array, Array]:
  """local(q, k, v, mask, plan, bias, k_bias) on each device's part, on the mesh of `jax.set_mesh`.

  Without a mesh of several devices, or inside a `jax.shard_map`, it is called as it is. Heads stay
  on all devices where their groups cannot be split as they are (G neither 1 nor a multiple).

  Args:
    local: returns out f[B,T,H,C] and lse f32[B,T,H] of what it is given.
    q, k, v, mask, plan, bias, k_bias: as `attention` takes them.

  Returns:
    The whole out and lse, sharded by rows and heads.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or mesh.manual_axes:
    return local(q, k, v, mask, plan, bias, k_bias)
  rows, _, heads, _ = spec(("batch", None, "heads", None), q.shape, mesh)
  groups = spec(("batch", None, "kv_heads", None), k.shape, mesh)[2]
  if k.shape[2] > 1 and heads != groups:
    heads = groups = None
  row = PartitionSpec(rows)
  if isinstance(bias, DistanceBias):
    biased = dataclasses.replace(bias, table=PartitionSpec(heads), q_position=row, k_position=row)
  else:
    biased = PartitionSpec(None if bias is None or bias.shape[0] == 1 else rows, heads)
  queries, keys = PartitionSpec(rows, None, heads), PartitionSpec(rows, None, groups)
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(queries, keys, keys, row, row, biased, row),
    out_specs=(queries, queries),
    check_vma=False,  # kernels do not say over which axes their results vary
  )(q, k, v, mask, plan, bias, k_bias)
