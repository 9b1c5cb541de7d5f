"""The device mesh and which logical axis of an array lies on which mesh axis.

Modules name the axes of a parameter where they make it ("embed", "heads", ...). `RULES` is the only
place that knows about devices: FSDP shards "embed" over `fsdp`, tensor parallelism shards heads,
mlp and vocabulary over `tensor`, rows of a batch lie on `data` and `fsdp`.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vlm_jax.core.errors import UsageError

AXES = ("data", "fsdp", "tensor")
RULES: dict[str, str | tuple[str, ...] | None] = {
  "batch": ("data", "fsdp"),
  "embed": "fsdp",
  "heads": "tensor",
  "kv_heads": "tensor",
  "mlp": "tensor",
  "vocab": "tensor",
  "layers": None,
  "head": None,
  "patch": None,
  "position": None,
  "norm": None,
}


def make_mesh(config: ConfigDict, devices: list | None = None) -> Mesh:
  """A mesh of `config.mesh` {data, fsdp, tensor}; one of them may be -1: whatever is left.

  Raises:
    UsageError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [config.mesh[axis] for axis in AXES]
  known = int(np.prod([size for size in sizes if size != -1]))
  if sizes.count(-1) > 1:
    raise UsageError("config.mesh: only one axis can be -1")
  sizes = [len(devices) // known if size == -1 else size for size in sizes]
  if int(np.prod(sizes)) != len(devices):
    shape = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    raise UsageError(f"config.mesh is {shape} but there are {len(devices)} devices; "
                     "the product of the axes must be the number of devices")
  return Mesh(np.asarray(devices).reshape(sizes), AXES)


def spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  """The PartitionSpec of an array whose axes have these logical names.

  An axis that its mesh axis does not divide, and a mesh axis already used, stay replicated: a tiny
  model on a large mesh is slow, never wrong.
  """
  parts, used = [], set()
  for name, size in zip(names, shape, strict=True):
    rule = RULES[name] if name is not None else None
    axes = (rule,) if isinstance(rule, str) else (rule or ())
    ways = int(np.prod([mesh.shape[axis] for axis in axes]))
    if axes and ways > 1 and size % ways == 0 and not used & set(axes):
      used |= set(axes)
      parts.append(rule)
    else:
      parts.append(None)
  return PartitionSpec(*parts)


def row_sharding(mesh: Mesh) -> NamedSharding:
  """Where the rows (first axis) of every batch array lie."""
  return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def constrain(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
  """Pins an activation to the mesh axes of its logical names; does nothing without `jax.set_mesh`.

  Without a pin the compiler may spread the width of activations over `fsdp` instead of gathering
  weights.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh))
