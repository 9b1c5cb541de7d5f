"""Prefill and extend inside one compiled function.

    prompt columns          generated columns
    0 ........ T-1          T + s * J + j          cache column
    0 .. n-1  NEVER         n + s * J + j          k_index, n: prompt length of the row

Prompts are padded on the right to T slots and written to the first T columns of the cache at once.
The s-th new token of the j-th open turn of a row sees what the last slot of its turn sees, in the
same class, and everything after it up to itself. Of another stream (an encoder's) it sees what
that slot sees; that stream is computed once, and its keys stay in the cache. The masks are data, so
ragged prompts and several open turns that share an image need nothing else. The image of a row is
computed once, however many questions about it are open.

The prompts are read by scanned layers. For the loop over tokens the layers' parameters and columns
are taken apart once: it costs a copy of the layers and compiles them one by one, and spares a slice
of each in every step.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from ml_collections import ConfigDict, FrozenConfigDict

from vlm_jax.core.batch import Batch, Stream, from_flat
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import Cache, Fusion, empty_cache, find_fusion, find_llm
from vlm_jax.core.layout import IGNORE, mask_axes
from vlm_jax.core.mask import NEVER, IntervalMask
from vlm_jax.core.precision import precision
from vlm_jax.core.tree import flatten, unflatten
from vlm_jax.core.typing import Array, Params
from vlm_jax.generate.prompts import Prompts
from vlm_jax.generate.sampling import GREEDY, Sampling, choose
from vlm_jax.nn import stack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
  """What was said; B rows, J open turns, M = max_tokens.

  Attributes:
    tokens: i32[B,J,M], 0 behind the end.
    lengths: i32[B,J], tokens of the answer without the stop token.
    stopped: bool[B,J], whether a stop token ended the answer (else max_tokens did).
    log_probs: f32[B,J,M] under the model at temperature 1, the stop token's included, 0 behind it.
    steps: i32[], how many tokens the longest answer took.
  """

  tokens: Array
  lengths: Array
  stopped: Array
  log_probs: Array
  steps: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """What stays the same while a batch is decoded.

  Attributes:
    stream: the stream that speaks.
    masks: what the last slot of every open turn sees, i32[B,J] queries, of each axis of keys. The
      keys of its own stream are i32[B,S], of every column of the cache, also the ones yet to be
      written; those of another stream are as they were.
    length: i32[B], n.
    position: i32[B,J], of the last slot of the prompt.
    active: bool[B,J], whether there is such a turn.
  """

  stream: str = dataclasses.field(metadata=dict(static=True))
  masks: dict[str, IntervalMask]
  length: Array
  position: Array
  active: Array


def make_context(module: Fusion, config: ConfigDict, batch: Batch, ends: Array, max_tokens: int,
                 kept: Cache | None = None) -> Context:
  """Lays out the columns of the cache: T for the prompt, J for each new token but the last.

  Where a cache is kept (`generate.dialogue`), column i is slot i of the one row, and the mask's
  classes of keys are those of all columns.
  """
  name = module.STREAM
  stream, mask = batch.streams[name], batch.masks[name]
  rows, slots = stream.tokens.shape
  turns, active = ends.shape[1], ends >= 0
  at = lambda field: jnp.take_along_axis(field, jnp.maximum(ends, 0), axis=1)
  length = (stream.segment_ids > 0).sum(1, dtype=jnp.int32)
  masks = {}
  for other, (queries, _) in mask_axes(module.fields(config)).items():
    if queries == name:
      seen = batch.masks[other]
      # A turn that does not exist sees nothing; its keys have k_index NEVER.
      hi, q_class = jnp.where(active, at(seen.hi), 0), None
      if seen.q_class is not None:
        q_class = at(seen.q_class)
      masks[other] = dataclasses.replace(seen, lo=at(seen.lo), hi=hi, q_class=q_class)
  k_class = mask.k_class
  if kept is not None:
    length = length + kept.length
    k_index = jnp.arange(kept.slots, dtype=jnp.int32)[None]
  else:
    index = length[:, None] + jnp.arange((max_tokens - 1) * turns, dtype=jnp.int32)
    repeat = lambda values: jnp.tile(values, (1, max_tokens - 1))
    prompt = jnp.where(stream.segment_ids > 0, jnp.arange(slots, dtype=jnp.int32), NEVER)
    k_index = jnp.concatenate([prompt, jnp.where(repeat(active), index, NEVER)], axis=1)
    if k_class is not None:
      k_class = jnp.concatenate([k_class, repeat(masks[name].q_class)], axis=1)
  masks[name] = dataclasses.replace(masks[name], k_class=k_class, k_index=k_index)
  return Context(name, masks, length, at(stream.positions), active)


def prefill(model: Any, params: Params, batch: Batch, ends: Array, context: Context,
            cache: Cache) -> tuple[Array, Cache]:
  """Reads the prompts: logits f32[B,J,V] of each open turn's next token, and the filled cache."""
  name, columns = context.stream, context.masks[context.stream]
  mask = dataclasses.replace(batch.masks[name], k_class=columns.k_class, k_index=columns.k_index)
  batch = dataclasses.replace(batch, masks={**batch.masks, name: mask})
  output = model.apply({"params": params}, batch, cache=cache)
  hidden = jnp.take_along_axis(output.hidden, jnp.maximum(ends, 0)[..., None], axis=1)
  return dataclasses.replace(output, hidden=hidden).logits(), output.cache


def extend(model: Any, params: Params, tokens: Array, step: Array, context: Context,
           cache: Cache) -> tuple[Array, Cache]:
  """Reads one more token of every open turn.

  Args:
    model, params: of the strategy.
    tokens: i32[B,J], the tokens of number `step` of the answers.
    step: i32[], s.
    context: of the batch.
    cache: written up to the tokens before.

  Returns:
    The logits f32[B,J,V] of the next token, and the cache with these tokens appended.
  """
  rows, turns = tokens.shape
  own = context.length[:, None] + step * turns + jnp.arange(turns, dtype=jnp.int32)
  name, zeros = context.stream, jnp.zeros((rows, turns), jnp.int32)
  hi = jnp.where(context.active, own + 1, 0)
  masks = {**context.masks, name: dataclasses.replace(context.masks[name], hi=hi)}
  stream = Stream(
    tokens=tokens,
    fill=zeros + IGNORE,
    positions=context.position + 1 + step,
    segment_ids=context.active.astype(jnp.int32),
    source_ids=zeros,
  )
  batch = Batch(streams={name: stream}, media={}, masks=masks)
  output = model.apply({"params": params}, batch, cache=cache)
  return output.logits(), output.cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Saying:
  """A batch in the middle of being decoded.

  Attributes:
    context: what stays the same.
    cache: written up to the tokens before the last.
    keys: PRNG keys [B,J].
    step: i32[], tokens chosen.
    said, log_probs, length: as in `Generated`, so far.
    speaking: bool[B,J], whether the turn goes on.
    token: i32[B,J], the last ones.
  """

  context: Context
  cache: Cache
  keys: Array
  step: Array
  said: Array
  log_probs: Array
  length: Array
  speaking: Array
  token: Array

  def generated(self) -> Generated:
    """What was said so far."""
    stopped = self.context.active & ~self.speaking
    return Generated(self.said, self.length, stopped, self.log_probs, self.step)


def split(config: ConfigDict, params: Params, cache: Cache) -> tuple[Params, Cache]:
  """Parameters and columns with the layers of the runs that are cached apart."""
  runs = tuple(f"{run}/" for run in (*(f"llm/{run}" for run in find_llm(config).RUNS),
                                     *getattr(find_fusion(config), "RUNS", ())))
  leaves = {path: stack.apart(leaf) if path.startswith(runs) else leaf
            for path, leaf in flatten(params).items()}
  k, v, memory = stack.apart((cache.k, cache.v, cache.memory))
  return unflatten(leaves), dataclasses.replace(cache, k=k, v=v, memory=memory)


def begin(config, params, flat, ends, stop, seeds, temperature, top_p, max_tokens, kept=None
          ) -> tuple[Params, Saying]:
  """Reads the prompts and chooses the first tokens; returns the parameters as `advance` wants them.

  Args:
    config, params, max_tokens: as in `generate`, the config frozen.
    flat, ends: of `Prompts`.
    stop: i32[n].
    seeds: u32[B].
    temperature, top_p: f32[], temperature None: greedy.
    kept: a Cache of one row whose first `length` columns are the slots before these, its layers
      apart; the prompts' are written behind them.
  """
  module, batch = find_fusion(config), from_flat(flat)
  model = module.Model(config)
  context = make_context(module, config, batch, ends, max_tokens, kept)
  rows, turns = ends.shape
  if kept is None:
    columns, dtype = context.masks[context.stream].k_index.shape[1], precision(config).compute
    cache = empty_cache(config, rows, columns, dtype)
  else:
    cache = stack.together(kept)
  logits, cache = prefill(model, params, batch, ends, context, cache)
  if kept is not None:  # the first new token is written over what pads the prompt
    cache = dataclasses.replace(cache, length=context.length[0])
  params, cache = split(config, params, cache)

  fold = jax.vmap(jax.random.fold_in, (None, 0))
  keys = jax.vmap(fold, (0, None))(jax.vmap(jax.random.key)(seeds), jnp.arange(turns))
  zeros = jnp.zeros((rows, turns), jnp.int32)
  blank = jnp.zeros((rows, turns, max_tokens), jnp.int32)
  saying = Saying(context, cache, keys, jnp.zeros((), jnp.int32), blank,
                  blank.astype(jnp.float32), zeros, context.active, zeros)
  return params, say(saying, logits, stop, temperature, top_p)


def say(saying: Saying, logits: Array, stop, temperature, top_p) -> Saying:
  """Chooses the next tokens from f32[B,J,V] and writes them down for the turns that still speak."""
  step, speaking = saying.step, saying.speaking
  now = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(saying.keys, step)
  token, log_prob = choose(logits, now, temperature, top_p)
  stops = (token[..., None] == stop).any(-1)
  token = jnp.where(speaking & ~stops, token, 0)
  return dataclasses.replace(
    saying,
    step=step + 1,
    said=saying.said.at[..., step].set(token),
    log_probs=saying.log_probs.at[..., step].set(jnp.where(speaking, log_prob, 0.0)),
    length=saying.length + (speaking & ~stops),
    speaking=speaking & ~stops,
    token=token,
  )


def advance(config, params, saying: Saying, stop, temperature, top_p, limit) -> Saying:
  """Goes on until `limit` (i32[]) tokens are chosen or nobody speaks, in one loop."""
  model = find_fusion(config).Model(config)

  def going(saying):
    return (saying.step < limit) & saying.speaking.any()

  def body(saying):
    logits, cache = extend(model, params, saying.token, saying.step - 1, saying.context,
                           saying.cache)
    return say(dataclasses.replace(saying, cache=cache), logits, stop, temperature, top_p)

  return lax.while_loop(going, body, saying)


@functools.partial(jax.jit, static_argnames=("config", "max_tokens"))
def _run(config, params, flat, ends, stop, seeds, temperature, top_p, max_tokens) -> Generated:
  params, saying = begin(config, params, flat, ends, stop, seeds, temperature, top_p, max_tokens)
  return advance(config, params, saying, stop, temperature, top_p, max_tokens).generated()


# The cache is the largest thing there is: it is handed on, not copied.
_begin = jax.jit(begin, static_argnames=("config", "max_tokens"), donate_argnames="kept")
_advance = jax.jit(advance, static_argnames="config", donate_argnames="saying")


def generate(
  config: ConfigDict,
  params: Params,
  prompts: Prompts,
  *,
  max_tokens: int,
  stop: tuple[int, ...] = (),
  sampling: Sampling = GREEDY,
  seeds: np.ndarray | None = None,
) -> Generated:
  """Continues every open turn of every prompt.

  Args:
    config: of the run; one program is compiled for each shape of `prompts`.
    params: the parameters.
    prompts: rows of one document each.
    max_tokens: M, at least 1.
    stop: tokens that end an answer.
    sampling: how to choose.
    seeds: u32[B], the seed of each row; None: `sampling.seed` plus the row's number.

  Returns:
    The answers.

  Raises:
    ValueError: max_tokens below 1.
    UsageError: more tokens than the model has learned positions.
  """
  return _run(*_arguments(config, params, prompts, max_tokens, stop, sampling, seeds))


def stream(
  config: ConfigDict,
  params: Params,
  prompts: Prompts,
  *,
  max_tokens: int,
  stop: tuple[int, ...] = (),
  sampling: Sampling = GREEDY,
  seeds: np.ndarray | None = None,
  chunk: int = 4,
) -> Iterator[Generated]:
  """As `generate`, in pieces: what was said after each `chunk` of tokens; the last is the whole.

  Raises:
    ValueError: max_tokens or chunk below 1.
  """
  for saying in sayings(config, params, prompts, max_tokens=max_tokens, stop=stop,
                        sampling=sampling, seeds=seeds, chunk=chunk):
    yield jax.device_get(saying.generated())


def sayings(
  config: ConfigDict,
  params: Params,
  prompts: Prompts,
  *,
  max_tokens: int,
  stop: tuple[int, ...] = (),
  sampling: Sampling = GREEDY,
  seeds: np.ndarray | None = None,
  chunk: int = 4,
  kept: Cache | None = None,
) -> Iterator[Saying]:
  """As `stream`, with the cache; the next step takes the arrays of the last over.

  Args:
    config, params, prompts, max_tokens, stop, sampling, seeds, chunk: as in `stream`.
    kept: what was read before the prompts, see `begin`; it is taken over.
  """
  if chunk < 1:
    raise ValueError(f"chunk must be at least 1, got {chunk}")
  arguments = _arguments(config, params, prompts, max_tokens, stop, sampling, seeds)
  frozen, _, _, _, stop_array, _, temperature, top_p, _ = arguments
  params, saying = _begin(*arguments, kept=kept)
  step = 1
  while True:
    # Read before the next call.
    going = step < max_tokens and bool(saying.speaking.any())
    yield saying
    if not going:
      return
    step = min(step + chunk, max_tokens)
    saying = _advance(frozen, params, saying, stop_array, temperature, top_p, np.int32(step))


def _arguments(config, params, prompts, max_tokens, stop, sampling, seeds) -> tuple:
  """The arguments of `begin`."""
  if max_tokens < 1:
    raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
  positions = prompts.flat[f"streams/{find_fusion(config).STREAM}/positions"]
  # The last token of an answer is never read, so it needs no position.
  last = int(positions.max()) + max_tokens - 1
  if config.llm.positions and last >= config.llm.positions:
    raise UsageError(f"config.llm.positions is {config.llm.positions}, too few for {max_tokens} "
                     f"new tokens behind a prompt of {int(positions.max()) + 1}; ask for fewer")
  if seeds is None:
    seeds = sampling.seed + np.arange(len(prompts.ends))
  return (
    FrozenConfigDict(config),
    params,
    prompts.flat,
    prompts.ends,
    np.asarray(stop, np.int32),
    np.asarray(seeds, np.uint32),
    np.float32(sampling.temperature) if sampling.temperature else None,
    np.float32(sampling.top_p),
    max_tokens,
  )
