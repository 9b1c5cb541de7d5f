"""What training carries from step to step, where it lies on the mesh, and how leaves are named."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vlm_jax.core import adapters
from vlm_jax.core import batch as batch_lib
from vlm_jax.core import mesh as mesh_lib
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import Fusion
from vlm_jax.core.tree import flatten, unflatten
from vlm_jax.core.typing import Array, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """Everything the step function changes.

  Attributes:
    step: i32[], steps done.
    params: every parameter, frozen ones included; a nested dict.
    opt_state: the optimizer's state, for trainable parameters only.
  """

  step: Array
  params: Params
  opt_state: Any


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One parameter before it exists: shape, dtype and the logical name of every axis."""

  shape: tuple[int, ...]
  dtype: Any
  names: tuple[str | None, ...]


def merge(params: Params, part: Params) -> Params:
  """`params` with the leaves of `part` (some of its paths) in their places."""
  return unflatten(flatten(params) | flatten(part))


def abstract_batch(module: Fusion, config: ConfigDict,
                   mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """The flat batch of one step as shapes: B = config.data.rows, rows spread over the mesh.

  Raises:
    UsageError: the rows cannot be split evenly over hosts, devices and micro-batches.
  """
  rows, parts = config.data.rows, config.train.accumulation
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  if parts < 1 or rows % parts or (rows // parts) % ways:
    raise UsageError(
      f"config.data.rows is {rows}; it must be a multiple of config.train.accumulation ({parts}) "
      f"times the devices that hold different rows ({ways}, config.mesh.data x config.mesh.fsdp)")
  axes, sharding = module.axes(config), mesh_lib.row_sharding(mesh)
  return {
    path: jax.ShapeDtypeStruct((rows, axes[field.axis], *field.shape), np.dtype(field.dtype),
                               sharding=sharding)
    for path, field in module.fields(config).items()
  }


def initializer(module: Fusion, config: ConfigDict) -> tuple[Callable, dict[str, Leaf]]:
  """How parameters are made, and what they will be, without making one.

  Returns:
    A function key -> params (plain arrays), and path to Leaf.

  Raises:
    UsageError: `config.lora.targets` names no linear layer of the model.
  """
  model = module.Model(config)
  row = batch_lib.empty(module.fields(config), module.axes(config), rows=1)

  @jax.jit  # remembers its trace: the shapes and the parameters cost one pass through the model
  def boxed(key: Array) -> Params:
    return model.init(key, batch_lib.from_flat(row))["params"]

  is_box = lambda leaf: isinstance(leaf, meta.AxisMetadata)
  value = lambda leaf: leaf.value if is_box(leaf) else leaf

  def leaf_of(leaf: Any) -> Leaf:
    shape, dtype = value(leaf).shape, value(leaf).dtype
    return Leaf(shape, dtype, tuple(leaf.names) if is_box(leaf) else (None,) * len(shape))

  abstract = jax.eval_shape(boxed, jax.random.key(0))
  leaves = flatten(jax.tree.map(leaf_of, abstract, is_leaf=is_box))
  adapters.check(adapters.adapters(config), leaves)
  return lambda key: jax.tree.map(value, boxed(key), is_leaf=is_box), leaves


def param_shardings(leaves: dict[str, Leaf], mesh: Mesh) -> dict[str, NamedSharding]:
  """Where every parameter lies, from the logical names of its axes."""
  return {
    path: NamedSharding(mesh, mesh_lib.spec(leaf.names, leaf.shape, mesh))
    for path, leaf in leaves.items()
  }


def abstract_params(leaves: dict[str, Leaf], mesh: Mesh) -> Params:
  """The parameters as shapes with shardings; what a checkpoint is restored into."""
  shardings = param_shardings(leaves, mesh)
  return unflatten({
    path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])
    for path, leaf in leaves.items()
  })


def abstract_state(leaves: dict[str, Leaf], init_optimizer: Callable, mesh: Mesh) -> State:
  """The whole train state as shapes with shardings; moments lie where their parameter lies."""
  params = abstract_params(leaves, mesh)
  shardings = param_shardings(leaves, mesh)
  replicated = NamedSharding(mesh, PartitionSpec())

  def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    # Optimizer states are tuples of NamedTuples around copies of the parameter tree, so the dict
    # keys on the way to a leaf spell the path of its parameter.
    keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
    owner = leaves.get("/".join(keys))
    same = owner is not None and owner.shape == leaf.shape
    sharding = shardings["/".join(keys)] if same else replicated
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  opt_state = jax.tree_util.tree_map_with_path(place, jax.eval_shape(init_optimizer, params))
  step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
  return State(step, params, opt_state)


def create(init_params: Callable, init_optimizer: Callable, abstract: State, seed: int) -> State:
  """A fresh state, every leaf born on its own devices; the same values on every mesh."""

  def init(key: Array) -> State:
    params = init_params(key)
    return State(jnp.zeros((), jnp.int32), params, init_optimizer(params))

  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def begin(params: Params, init_optimizer: Callable, abstract: State) -> State:
  """The state of step 0 around parameters that lie where they belong."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.opt_state)
  step = jax.device_put(jnp.zeros((), jnp.int32), abstract.step.sharding)
  return State(step, params, jax.jit(init_optimizer, out_shardings=shardings)(params))
