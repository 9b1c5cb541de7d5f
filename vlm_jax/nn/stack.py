"""Stacks of layers: scanned, so that compile time does not grow with depth, and rematerialised.

A stack is a list of *runs*. A run is a layer, or a `Period` of several, scanned r times; parameters
are stacked on a leading axis "layers" under the run's name. Between two runs a model may do what it
likes (read a hidden state, drop tokens). This is the only file that lifts transforms.

Layers of another run may stand between those of a run, one in every period of them (`visit`): a
frozen decoder keeps its own stacked arrays, and its visitors have theirs.

A layer is a module called as layer(x, columns, context) -> (x, columns): x f[B,T,D] is carried,
columns is what this layer caches (or None), context (mask, plan, positions) is the same for all.

A loop around a run (decoding) would slice every layer's parameters out of the stacked arrays again
in each of its turns, and on a CPU a slice is a copy. So a run also takes parameters and columns
that `apart` has split once, before the loop.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

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


def together(tree: Any) -> Any:
  """The inverse of `apart`."""
  return jax.tree.map(lambda node: jnp.stack(node) if _is_list(node) else node, tree,
                      is_leaf=_is_list)


def _is_list(node: Any) -> bool:
  return isinstance(node, list)


def _is_apart(tree: Any) -> bool:
  return any(map(_is_list, jax.tree.leaves(tree, is_leaf=_is_list)))


def _layer_of(tree: Any, number: int) -> Any:
  return jax.tree.map(lambda leaves: leaves[number], tree, is_leaf=_is_list)


class _Stacked(NamedTuple):
  """What a run is made of: a function that makes its layer, how many, how many in an iteration."""

  make: Callable[[], nn.Module]
  layers: int
  unroll: int


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

    stacked = _Stacked(lambda: layer(**alone, parent=None), length, unroll)

    def __call__(self, x: Array, columns: Any, context: Any) -> tuple[Array, Any]:
      params = self.variables.get("params", {})
      if not _is_apart(params):
        return super().__call__(x, columns, context)
      apply, out = _applied(self, context), []
      for number in range(length):
        x, own = apply(x, _layer_of((params, columns, None), number))
        out.append(own)
      return x, _listed(out)

  return Run(**fields)


@dataclasses.dataclass(frozen=True)
class Visitors:
  """Layers of another run between those of a run.

  Attributes:
    run: theirs, a `run` of `visits` layers with parameters of its own.
    every, first: one stands before layer i where i % every == first.
    columns: what they returned in an earlier call, stacked or `apart`, or None.
    context: what all of them share.
  """

  run: nn.Module
  every: int
  first: int
  columns: Any
  context: Any


def visits(layers: int, every: int, first: int) -> int:
  """How many of `layers` have a visitor before them."""
  return len(range(first, layers, every))


def visit(host: nn.Module, visitors: Visitors, x: Array, columns: Any, context: Any
          ) -> tuple[Array, Any, Any]:
  """Applies a run with visitors between its layers.

  A period of `every` layers and their visitor is one iteration of a scan; what is left behind the
  last whole period follows it. Both runs keep the paths and shapes of their parameters.

  Args:
    host: a `run`.
    visitors: see `Visitors`.
    x, columns, context: as the run takes them.

  Returns:
    x, the run's columns and the visitors'.
  """
  if host.is_initializing():
    x, columns = host(x, columns, context)
    return x, columns, visitors.run(x, visitors.columns, visitors.context)[1]
  every, first, (_, layers, unroll) = visitors.every, visitors.first, host.stacked
  own = _items(host, columns)
  theirs = _items(visitors.run, visitors.columns)
  apply, greet = _applied(host, context), _applied(visitors.run, visitors.context)

  def walk(x: Array, own: Sequence[Any], theirs: Sequence[Any]) -> tuple[Array, list, list]:
    guests, out, kept = iter(theirs), [], []
    for number, item in enumerate(own):
      if number % every == first:
        x, one = greet(x, next(guests))
        kept.append(one)
      x, one = apply(x, item)
      out.append(one)
    return x, out, kept

  def period(x: Array, items: tuple[Any, Any]) -> tuple[Array, tuple[Any, Any]]:
    own, theirs = items
    x, out, (kept,) = walk(x, [_at(own, number) for number in range(every)], [theirs])
    return x, (_joined(out), kept)

  count = visits(layers, every, first)
  if _is_apart(own):
    x, out, kept = walk(x, [_layer_of(own, number) for number in range(layers)],
                        [_layer_of(theirs, number) for number in range(count)])
    return x, _listed(out), _listed(kept)
  whole = layers // every
  size = whole * every
  periods = jax.tree.map(lambda leaf: leaf[:size].reshape(whole, every, *leaf.shape[1:]), own)
  begun = jax.tree.map(lambda leaf: leaf[:whole], theirs)
  x, (out, kept) = jax.lax.scan(period, x, (periods, begun), unroll=max(1, unroll // every))
  out = jax.tree.map(lambda leaf: leaf.reshape(size, *leaf.shape[2:]), out)
  if size < layers:
    x, more, last = walk(x, [_at(own, number) for number in range(size, layers)],
                         [_at(theirs, number) for number in range(whole, count)])
    append = lambda leaf, *rest: jnp.concatenate([leaf, jnp.stack(rest)])
    out = jax.tree.map(append, out, *more)
    kept = jax.tree.map(append, kept, *last) if last else kept
  return x, out, kept


def _items(run: nn.Module, columns: Any) -> Any:
  """(parameters, columns, keys of randomness) of all layers of a run."""
  keys = None
  if run.has_rng(DROPOUT):
    keys = jax.random.split(run.make_rng(DROPOUT), run.stacked.layers)
  return meta.unbox(run.variables["params"]), columns, keys


def _applied(run: nn.Module, context: Any) -> Callable[[Array, Any], tuple[Array, Any]]:
  """A function (x, (parameters, columns, key)) -> (x, columns) of one layer of a run."""
  one = run.stacked.make()

  def apply(x: Array, item: Any) -> tuple[Array, Any]:
    params, columns, key = item
    rngs = {} if key is None else {DROPOUT: key}
    return one.apply({"params": params}, x, columns, context, rngs=rngs)

  return apply


def _at(tree: Any, number: int) -> Any:
  return jax.tree.map(lambda leaf: leaf[number], tree)


def _joined(items: Sequence[Any]) -> Any:
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *items)


def _listed(items: Sequence[Any]) -> Any:
  return jax.tree.map(lambda *leaves: list(leaves), *items)
