"""Stacks of layers: scanned, so that compile time does not grow with depth, and rematerialised.

A stack is a list of *runs*. A run is a layer, or a `Period` of several, scanned r times; parameters
are stacked on a leading axis "layers" under the run's name. Between two runs a model may do what it
likes (read a hidden state, drop tokens). This is the only file that lifts transforms.

A layer is a module called as layer(x, columns, context) -> (x, columns): x f[B,T,D] is carried,
columns is what this layer caches (or None), context (mask, plan, positions) is the same for all.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.typing import Array

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
    A module (x, columns, context) -> (x, columns), columns stacked on a leading axis.

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
    split_rngs={"params": True},
    in_axes=(0, nn.broadcast),
    length=length,
    unroll=unroll,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
  if length < repeats:
    first = lambda params: jax.tree.map(lambda leaf: leaf[:length], params)
    scanned = nn.map_variables(scanned, "params", trans_in_fn=first)
  return scanned(**fields)
