"""Stacks of layers: scanned, so that compile time does not grow with depth, and rematerialised.

A stack is a list of *runs*. A run is a layer, or a `Period` of several, scanned r times; parameters
are stacked on a leading axis "layers" under the run's name. Between two runs a model may do what it
likes (read a hidden state, drop tokens). This is the only file that lifts transforms.

A layer is a module called as layer(x, columns, context) -> (x, columns): x f[B,T,D] is carried,
columns is what this layer caches (or None), context (mask, plan, positions) is the same for all.

A loop around a run (decoding) would slice every layer's parameters out of the stacked arrays again
in each of its turns, and on a CPU a slice is a copy. So a run also takes parameters and columns
that `apart` has split once, before the loop.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.typing import Array
from vlm_jax.nn.linear import DROPOUT

# What the backward pass finds saved; the rest of a layer it computes again.
REMAT: dict[str, Any] = {
  "none": jax.checkpoint_policies.everything_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


class Period(nn.Module):
  """Different layers in a row as one layer; `columns` is a tuple with an entry per layer.

  Attributes:
    layers: (parameter name, function of a name that makes the layer).
  """

  layers: tuple[tuple[str, Callable[..., nn.Module]], ...]

  @nn.compact
  def __call__(self, x: Array, columns: Any, context: Any) -> tuple[Array, Any]:
    """See the module."""
    columns = [None] * len(self.layers) if columns is None else list(columns)
    for number, (name, layer) in enumerate(self.layers):
      x, columns[number] = layer(name=name)(x, columns[number], context)
    return x, tuple(columns)


def apart(tree: Any) -> Any:
  """Stacked parameters or columns with the list of its r layers in place of every array [r,...]."""
  return jax.tree.map(lambda leaf: list(jnp.unstack(leaf)), tree)


def _is_list(node: Any) -> bool:
  return isinstance(node, list)


def _layer_of(tree: Any, number: int) -> Any:
  return jax.tree.map(lambda leaves: leaves[number], tree, is_leaf=_is_list)


def run(
  layer: type[nn.Module],
  repeats: int,
  *,
  remat: str = "none",
  unroll: int = 1,
  used: int | None = None,
  **fields,
) -> nn.Module:
  """A module that applies `layer(**fields)` again and again, each time with its own parameters.

  Args:
    layer: class of the layer.
    repeats: how many layers have parameters, r.
    remat: "none" saves every activation for the backward pass, "dots" the results of matrix
      products, "full" only the input of each layer.
    unroll: layers written out in one iteration of the scan. 1 compiles fastest; more spares the
      copies in and out of the scan's stacked arrays, which a small model on a CPU notices.
    used: how many of them are computed, from the first; None: all. The others cost nothing and get
      gradient 0. Leave it None while parameters are initialised: a full pass makes them all.
    fields: the layer's attributes, and the run's `name` in compact modules.

  Returns:
    A module (x, columns, context) -> (x, columns), columns stacked on a leading axis; applied to
    parameters that are `apart`, it takes and returns columns that are, and scans nothing.

  Raises:
    UsageError: an unknown remat policy.
  """
  if remat not in REMAT:
    raise UsageError(f"config: remat is '{remat}'; {nearest(remat, REMAT)}")
  if remat != "none":
    # The scan already keeps XLA from merging the two computations; barriers would only cost.
    layer = nn.remat(layer, policy=REMAT[remat], prevent_cse=False)
  length = repeats if used is None else used
  scanned = nn.scan(
    layer,
    variable_axes={"params": 0},
    split_rngs={"params": True, DROPOUT: True},
    in_axes=(0, nn.broadcast),
    length=length,
    unroll=unroll,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
  if length < repeats:
    first = lambda params: jax.tree.map(lambda leaf: leaf[:length], params)
    scanned = nn.map_variables(scanned, "params", trans_in_fn=first)
  alone = {name: value for name, value in fields.items() if name != "name"}

  class Run(scanned):
    """The scan, or the same layers one after the other."""

    def __call__(self, x: Array, columns: Any, context: Any) -> tuple[Array, Any]:
      params = self.variables.get("params", {})
      if not any(map(_is_list, jax.tree.leaves(params, is_leaf=_is_list))):
        return super().__call__(x, columns, context)
      one, out = layer(**alone, parent=None), []
      for number in range(length):
        x, own = one.apply({"params": _layer_of(params, number)}, x, _layer_of(columns, number),
                           context)
        out.append(own)
      return x, jax.tree.map(lambda *leaves: list(leaves), *out)

  return Run(**fields)
