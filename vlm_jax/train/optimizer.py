"""AdamW from `config.optim`: schedules, clipping, decay, learning-rate groups, frozen parameters.

A *pattern* is a regular expression over parameter paths; it matches a path or any parent of it, so
"tower" is the whole tower. A slice behind a name picks layers of stacked parameters, whose leading
axis is the layer: "llm/layers[:2]/.*" is the first two, "tower/layers[30:]" those from 30 on.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from vlm_jax.core import adapters
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.fusion import FROZEN, Stage, find_fusion, find_tower
from vlm_jax.core.tree import flatten, unflatten
from vlm_jax.core.typing import Array, Params
from vlm_jax.train.state import Leaf

SLICE = re.compile(r"\[(-?\d*):(-?\d*)\]")
Choice = dict[str, np.ndarray]  # path to bool[] (the whole leaf) or bool[L] (layers of it)


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """What moves the parameters.

  Attributes:
    transform: the optax transformation, over the nested dict of trainable parameters.
    trainable: path to bool[] or bool[L,1,..], which part of it moves; a path that is not in it is
      frozen as a whole, has no gradient and no optimizer memory.
    schedule: i32[] step to f32[] learning rate.
  """

  transform: optax.GradientTransformation
  trainable: dict[str, np.ndarray]
  schedule: Callable[[Array], Array]

  def select(self, params: Params) -> Params:
    """The trainable leaves of `params`, nested."""
    flat = flatten(params)
    return unflatten({path: flat[path] for path in self.trainable})

  def init(self, params: Params) -> optax.OptState:
    """The optimizer state for all parameters `params` (frozen ones get none)."""
    return self.transform.init(self.select(params))

  def mask(self, grads: Params) -> Params:
    """Gradients of the trainable leaves with those of frozen layers set to zero."""
    return unflatten({
      path: jnp.where(self.trainable[path], grad, 0) for path, grad in flatten(grads).items()
    })

  def apply(self, grads: Params, opt_state: optax.OptState,
            moved: Params) -> tuple[Params, optax.OptState]:
    """One update of the trainable leaves `moved`; frozen layers keep their bits (-0.0 too)."""
    updates, opt_state = self.transform.update(grads, opt_state, moved)
    change = flatten(updates)
    new = {
      path: jnp.where(self.trainable[path], old + change[path].astype(old.dtype), old)
      for path, old in flatten(moved).items()
    }
    return unflatten(new), opt_state


def make_optimizer(config: ConfigDict, stages: tuple[Stage, ...],
                   leaves: dict[str, Leaf]) -> Optimizer:
  """Builds the optimizer of one run.

  Args:
    config: reads `optim`, `fusion.stage` and `train.steps`.
    stages: the strategy's STAGES.
    leaves: path to Leaf of every parameter.

  Raises:
    UsageError: an unknown optimizer, schedule or stage, a pattern that matches no parameter, or
      nothing left to train.
  """
  optim = config.optim
  if optim.name != "adamw":
    raise UsageError(f"config.optim.name is '{optim.name}'; {nearest(optim.name, ['adamw'])}")
  trainable = _trainable(config, stages, leaves)
  schedule = make_schedule(config)

  decay = _match((optim.decay_pattern,), leaves, "config.optim.decay_pattern")
  rates = _spread_over(optim.groups, leaves, "config.optim.groups", 1.0)
  warmups = _spread_over(optim.warmups, leaves, "config.optim.warmups", optim.warmup)
  scaled = {path: rate for path, rate in rates.items() if path in trainable and np.any(rate != 1)}
  decayed = {path: _spread(choice, leaves[path]) for path, choice in decay.items()
             if path in trainable}

  def add_decay(updates: Params, params: Params) -> Params:
    flat = flatten(params)
    return unflatten({
      path: update + optim.weight_decay * jnp.where(decayed[path], flat[path], 0)
      if path in decayed else update for path, update in flatten(updates).items()
    })

  def scale(updates: Params, params: Params | None) -> Params:
    del params
    return unflatten({
      path: update * scaled[path].astype(np.float32) if path in scaled else update
      for path, update in flatten(updates).items()
    })

  clip = optax.clip_by_global_norm(optim.clip) if optim.clip else optax.identity()
  transform = optax.chain(
    clip,
    optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
    optax.stateless(add_decay),
    optax.stateless(scale),
    *([_warm_up(warmups, optim.warmup)] if warmups else []),
    optax.scale_by_learning_rate(schedule),
  )
  return Optimizer(transform, trainable, schedule)


def make_schedule(config: ConfigDict) -> Callable[[Array], Array]:
  """Step (from 0) to learning rate: linear warm-up, then `config.optim.schedule` until train.steps.

  The first step already moves (rate lr / warmup). rsqrt is lr * sqrt(warmup / step).
  """
  optim, steps = config.optim, config.train.steps
  warmup = max(optim.warmup, 1)
  shapes = {
    "constant": lambda step, part: 1.0,
    "linear": lambda step, part: 1 - (1 - optim.end_lr) * part,
    "cosine": lambda step, part: (
      optim.end_lr + (1 - optim.end_lr) * 0.5 * (1 + jnp.cos(jnp.pi * part))),
    "rsqrt": lambda step, part: jnp.sqrt(warmup / jnp.maximum(step + 1, warmup)),
  }
  if optim.schedule not in shapes:
    raise UsageError(
      f"config.optim.schedule is '{optim.schedule}'; {nearest(optim.schedule, shapes)}")
  shape = shapes[optim.schedule]

  def schedule(step: Array) -> Array:
    step = jnp.asarray(step, jnp.float32)
    warm = jnp.minimum((step + 1) / warmup, 1.0)
    part = jnp.clip((step - optim.warmup) / max(steps - optim.warmup, 1), 0.0, 1.0)
    return (optim.lr * warm * shape(step, part)).astype(jnp.float32)

  return schedule


def _trainable(config: ConfigDict, stages: tuple[Stage, ...], leaves: dict[str, Leaf]) -> dict:
  by_name = {stage.name: stage for stage in stages}
  if config.fusion.stage not in by_name:
    raise UsageError(f"config.fusion.stage is '{config.fusion.stage}' but '{config.fusion.name}' "
                     f"has no such stage; {nearest(config.fusion.stage, by_name)}")
  stage = by_name[config.fusion.stage]
  chosen = _match(stage.trainable, leaves, f"stage '{stage.name}' of '{config.fusion.name}'")
  frozen = _match(config.optim.frozen, leaves, "config.optim.frozen")
  for path, choice in unread_of(config, leaves).items():  # they would still decay
    frozen[path] = frozen[path] | choice if path in frozen else choice
  # A node with adapters trains by them alone, as in LLaVA: projector whole, decoder by adapters.
  adapted = {_node(path) for path in leaves if adapters.is_adapter(path)}
  result = {}
  for path, choice in chosen.items():
    if path.rsplit("/", 1)[-1].startswith(FROZEN) or (
        _node(path) in adapted and not adapters.is_adapter(path)):
      continue
    choice = choice & ~frozen[path] if path in frozen else choice
    if np.any(choice):
      whole = bool(np.all(choice))
      result[path] = np.asarray(True) if whole else _spread(choice, leaves[path])
  if config.lora.rank and not any(map(adapters.is_adapter, result)):
    raise UsageError(f"config.lora: none of its adapters trains in stage '{stage.name}'; choose "
                     "another config.fusion.stage, other targets or fewer config.optim.frozen")
  if not result:
    raise UsageError(f"config.optim.frozen leaves nothing to train in stage '{stage.name}'; "
                     "take a pattern away or choose another config.fusion.stage")
  return result


def unread_of(config: ConfigDict, leaves: dict[str, Leaf]) -> dict[str, np.ndarray]:
  """Path to bool[] or bool[L] (which layers) of parameters that nothing computed depends on."""
  patterns = [f"tower/{pattern}" for pattern in find_tower(config).unread(config.tower)]
  patterns += getattr(find_fusion(config), "unread", lambda config: ())(config)
  return _match(patterns, leaves, "unread")


def _node(path: str) -> str:
  """The node of the config that a parameter belongs to: "tower", "connector", "llm", ..."""
  return path.partition("/")[0]


def _spread_over(groups: Iterable, leaves: dict[str, Leaf], field: str,
                 default: float) -> dict[str, np.ndarray]:
  """Path to the number of the first (pattern, number) that matches, f64[] or f64[L,1,..]."""
  found = {}
  for pattern, number in reversed(tuple(groups)):
    for path, choice in _match((pattern,), leaves, field).items():
      found[path] = np.where(_spread(choice, leaves[path]), float(number),
                             found.get(path, default))
  return found


def _warm_up(warmups: dict[str, np.ndarray], usual: int) -> optax.GradientTransformation:
  """Puts warm-ups of `warmups[path]` steps in the place of the one that the schedule has."""
  ramp = lambda step, steps: jnp.minimum((step + 1) / np.maximum(steps, 1), 1.0)

  def update(updates: Params, state: optax.ScaleByScheduleState, params: Params | None = None):
    del params
    step = state.count
    changed = {
      path: change * (ramp(step, warmups[path]) / ramp(step, usual)).astype(change.dtype)
      if path in warmups else change for path, change in flatten(updates).items()
    }
    return unflatten(changed), optax.ScaleByScheduleState(optax.safe_increment(step))

  init = lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))
  return optax.GradientTransformation(init, update)


def _spread(choice: np.ndarray, leaf: Leaf) -> np.ndarray:
  """bool[L] as bool[L,1,..] of the leaf's rank; a scalar as it is."""
  return choice.reshape(choice.shape + (1,) * (len(leaf.shape) - 1)) if choice.ndim else choice


def _match(patterns: Iterable[str], leaves: dict[str, Leaf], field: str) -> Choice:
  """Which leaves, or which layers of them, any of the patterns matches."""
  chosen: Choice = {}
  for pattern in patterns:
    slices = SLICE.findall(pattern)
    if len(slices) > 1:
      raise UsageError(f"{field}: pattern '{pattern}' has more than one layer slice; use one")
    try:
      regex = re.compile(f"(?:{SLICE.sub('', pattern)})(/.*)?")
    except re.error as error:
      raise UsageError(f"{field}: '{pattern}' is not a regular expression: {error}") from error
    paths = [path for path in leaves if regex.fullmatch(path)]
    if not paths:
      raise UsageError(f"{field}: pattern '{pattern}' matches no parameter; "
                       f"{_close(pattern, leaves)}")
    for path in paths:
      choice = np.asarray(True)
      if slices:
        choice = _layers(pattern, slices[0], path, leaves[path], field)
      chosen[path] = chosen[path] | choice if path in chosen else choice
  return chosen


def _layers(pattern: str, bounds: tuple[str, str], path: str, leaf: Leaf, field: str) -> np.ndarray:
  """bool[L] of one layer slice."""
  if not leaf.names or leaf.names[0] != "layers":
    raise UsageError(f"{field}: pattern '{pattern}' slices layers, but '{path}' is not stacked; "
                     "take the slice away")
  chosen = np.zeros(leaf.shape[0], bool)
  chosen[slice(*(int(bound) if bound else None for bound in bounds))] = True
  if not chosen.any():
    raise UsageError(f"{field}: pattern '{pattern}' selects none of the {leaf.shape[0]} layers "
                     f"of '{path}'")
  return chosen


def _close(pattern: str, leaves: dict[str, Leaf]) -> str:
  """The nearest paths, parents included, else the top of the tree."""
  known = {"/".join(path.split("/")[:depth]) for path in leaves for depth in range(1, 9)}
  plain = re.sub(r"[.*$^\\]+", "", SLICE.sub("", pattern)).strip("/")
  close = difflib.get_close_matches(plain, sorted(known), n=3, cutoff=0.5)
  return f"nearest: {', '.join(close)}" if close else (
    f"the tree has {', '.join(sorted({path.split('/')[0] for path in leaves}))}")


def count(optimizer: Optimizer, leaves: dict[str, Leaf]) -> tuple[int, int]:
  """Parameters that move and parameters in all."""
  size = lambda path: int(np.prod(leaves[path].shape, dtype=np.int64))
  moving = sum(int(np.mean(mask) * size(path)) for path, mask in optimizer.trainable.items())
  return moving, sum(map(size, leaves))


def state_bytes(tree: Params) -> int:
  """Bytes of all arrays (or shapes) of a tree."""
  return sum(int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize
             for leaf in jax.tree.leaves(tree))
