"""One optimizer step: the total loss, accumulation, gradients, update and numbers to log.

  total = sum over objectives o and sources s of lambda_o * lambda_s * sum[o,s] / weight[o,s]

The weights come from the whole batch before the backward pass, so micro-batches simply add up: a
step split into any number of them has the loss and the gradient of the big batch. So has one whose
objectives compare documents of the whole batch, by another way (`train/accumulate.py`).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from vlm_jax.core import mesh as mesh_lib
from vlm_jax.core.batch import Batch, from_flat
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.fusion import Fusion, embeddings_of
from vlm_jax.core.typing import Array, Params
from vlm_jax.nn.linear import DROPOUT
from vlm_jax.train import accumulate
from vlm_jax.train.optimizer import Optimizer
from vlm_jax.train.state import State, merge


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Numbers:
  """What a step reports; all are over the whole batch of all hosts.

  Attributes:
    total: f32[], what was minimised.
    losses: objective to f32[sources], mean loss per source (0 where `weights` is 0).
    weights: objective to f32[sources].
    grad_norm: f32[], before clipping, trainable parameters only.
    lr: f32[].
    used: "tokens/<stream>", "images/<media>", "texts/<documents>" to f32[], slots that are not
      padding.
    pairs: mask name to f32[], query-key pairs inside the intervals: exact without classes, an upper
      bound with them.
  """

  total: Array
  losses: dict[str, Array]
  weights: dict[str, Array]
  grad_norm: Array
  lr: Array
  used: dict[str, Array]
  pairs: dict[str, Array]


def make_step(config: ConfigDict, module: Fusion, optimizer: Optimizer, mesh: Mesh,
              abstract: State) -> Callable:
  """The jitted (state, flat batch) -> (state, Numbers); the state is donated.

  Raises:
    UsageError: an objective that cannot be accumulated is to be; when traced, if the strategy lacks
      one of `config.fusion.objectives`.
  """
  model = module.Model(config)
  parts = config.train.accumulation
  _check_parts(config, module)

  def run(moved: Params, params: Params, batch: Batch, rng: Array):
    return model.apply({"params": merge(params, moved)}, batch, rng=rng,
                       rngs={DROPOUT: rng} if config.lora.dropout else {})

  def total(output, batch: Batch, scale: dict):
    with jax.named_scope("loss"):
      sums = module.losses(output, batch, config)
    found = {name: sums[name] for name in scale}
    return sum((jnp.sum(scale[name] * found[name]) for name in scale), jnp.float32(0)), found

  def step(state: State, flat: dict[str, Array]) -> tuple[State, Numbers]:
    batch = from_flat(flat)
    weights = module.weights(batch, config)
    scale = _scales(config, weights)
    moved = optimizer.select(state.params)
    rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
    value_and_grad = jax.value_and_grad(lambda moved, params, batch, scale, rng: total(
      run(moved, params, batch, rng), batch, scale), has_aux=True)

    def add(carry, micro):
      index, rows = micro
      key = jax.random.fold_in(rng, index)
      (_, sums), grads = value_and_grad(moved, state.params, from_flat(rows), scale, key)
      return jax.tree.map(jnp.add, carry, (sums, grads)), None

    if parts == 1:
      (_, sums), grads = value_and_grad(moved, state.params, batch, scale, rng)
    else:
      zeros = jax.tree.map(jnp.zeros_like, (scale, moved))
      micros = jnp.arange(parts), {path: _split(array, parts, mesh) for path, array in flat.items()}
      if compared := {name: scale[name] for name in scale if name in getattr(
          module, "GLOBAL", ())}:
        alone = {name: scale[name] for name in scale if name not in compared}

        def micro_forward(moved, micro):
          rows = from_flat(micro[1])
          output = run(moved, state.params, rows, jax.random.fold_in(rng, micro[0]))
          return embeddings_of(output), *total(output, rows, alone)

        (found, added), grads = accumulate.cached(
          micro_forward, lambda embeddings: total(embeddings, batch, compared), moved, micros,
          parts, lambda array: _join(array, mesh), lambda array: _split(array, parts, mesh))
        sums = found | added
      else:
        (sums, grads), _ = jax.lax.scan(add, zeros, micros)

    with jax.named_scope("optimizer"):
      grads = optimizer.mask(grads)
      moved, opt_state = optimizer.apply(grads, state.opt_state, moved)
    numbers = Numbers(
      total=sum(jnp.sum(scale[name] * sums[name]) for name in scale),
      losses={name: sums[name] * _inverse(weights[name]) for name in scale},
      weights={name: weights[name] for name in scale},
      grad_norm=optax.tree.norm(grads),
      lr=optimizer.schedule(state.step),
      used=_used(batch),
      pairs={name: jnp.sum(jnp.maximum(mask.hi - mask.lo, 0).astype(jnp.float32))
             for name, mask in batch.masks.items()},
    )
    return State(state.step + 1, merge(state.params, moved), opt_state), numbers

  out = (jax.tree.map(lambda leaf: leaf.sharding, abstract), NamedSharding(mesh, PartitionSpec()))
  return jax.jit(step, donate_argnums=0, out_shardings=out)


def _check_parts(config: ConfigDict, module: Fusion) -> None:
  """Raises UsageError for an objective that cannot be accumulated and is to be."""
  parts = config.train.accumulation
  undivided = sorted(set(config.fusion.objectives) & set(getattr(module, "UNDIVIDED", ())))
  if parts > 1 and undivided:
    raise UsageError(f"config.train.accumulation is {parts}, but config.fusion.objectives."
                     f"{undivided[0]} of '{config.fusion.name}' compares documents of the whole "
                     "batch inside the model; set it to 1, or leave the objective out")


def place(flat: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Puts this host's rows of a flat batch on its devices."""
  sharding = mesh_lib.row_sharding(mesh)
  if jax.process_count() == 1:
    return jax.device_put(flat, sharding)
  return {path: jax.make_array_from_process_local_data(sharding, array)
          for path, array in flat.items()}


def _scales(config: ConfigDict, weights: dict[str, Array]) -> dict[str, Array]:
  """Objective to f32[sources]: lambda_o * lambda_s / weight, 0 for a source without weight."""
  lambdas = np.asarray([config.data.sources[name].weight for name in sorted(config.data.sources)],
                       np.float32)
  for name in config.fusion.objectives:
    if name not in weights:
      raise UsageError(f"config.fusion.objectives.{name}: '{config.fusion.name}' has no such "
                       f"objective; {nearest(name, weights)}")
  return {name: weight * lambdas * _inverse(weights[name])
          for name, weight in sorted(config.fusion.objectives.items())}


def _inverse(weight: Array) -> Array:
  """1 / weight, 0 where it is 0; the double where keeps 1 / 0 out of the program."""
  return jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1), 0)


def _split(array: Array, parts: int, mesh: Mesh) -> Array:
  """[B, ...] to [parts, B / parts, ...], micro-batch i gets rows i, i + parts, ...

  Every device then splits the rows it already holds; consecutive blocks would move them all.
  """
  array = array.reshape(array.shape[0] // parts, parts, *array.shape[1:]).swapaxes(0, 1)
  spec = PartitionSpec(None, mesh_lib.RULES["batch"])
  return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))


def _join(array: Array, mesh: Mesh) -> Array:
  """[parts, B / parts, ...] to [B, ...], the inverse of `_split`."""
  array = array.swapaxes(0, 1).reshape(-1, *array.shape[2:])
  return jax.lax.with_sharding_constraint(array, mesh_lib.row_sharding(mesh))


def _used(batch: Batch) -> dict[str, Array]:
  count = lambda ids: jnp.sum((ids > 0).astype(jnp.float32))
  used = {f"tokens/{name}": count(stream.segment_ids) for name, stream in batch.streams.items()}
  used |= {f"texts/{name}": count(texts.segment_ids) for name, texts in batch.documents.items()}
  used |= {f"images/{name}": count(media.segment_ids) for name, media in batch.media.items()}
  return used | {f"items/{name}": count(media.time == 0) for name, media in batch.media.items()
                 if media.time is not None}
