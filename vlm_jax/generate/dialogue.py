"""A conversation of which every slot is read once: the cache is kept from answer to answer.

    slots of the second question    q q q q q a a a q q q
    read before                     r r r r r s s .            r prompt, s said, both in the cache
    fed                                           f f f f      from the first difference on

Column i of the cache is slot i. The document of every question is laid out anew and as a whole; the
cache holds good for as many slots as are the same and see the same in it. So a strategy whose
earlier slots see other things when something follows (a longer prefix), an answer that is tokenized
in another way than it was said, or turns that were forgotten need no rule of their own: they are
read again. What is behind the slots in use stays in its columns, where nothing sees it.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import Cache, find_fusion, find_llm
from vlm_jax.core.layout import IGNORE, Field, Layout, heard, mask_axes, streams_of
from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.precision import precision
from vlm_jax.core.typing import Params
from vlm_jax.generate.decode import Generated, sayings
from vlm_jax.generate.prompts import Prompts, stack
from vlm_jax.generate.sampling import GREEDY, Sampling
from vlm_jax.nn.stack import apart

COLUMNS = 512  # of a cache at first; it doubles when a conversation needs more
READ = ("tokens", "fill", "positions")  # of a stream, what a model reads

Arrays = dict[str, np.ndarray]


def keeps(config: ConfigDict) -> bool:
  """Whether a cache may be kept: what another stream holds is read as a whole, or not at all.

  Nor where the strategy has a cache of its own, which begins with what stands in no slot.
  """
  module = find_fusion(config)
  read = streams_of(heard(module.fields(config), module.STREAM))
  return read == [module.STREAM] and not hasattr(module, "empty_cache")


class Dialogue:
  """What a model has read and said of one conversation.

  Attributes:
    room: slots that the conversation and its answers may take.
    fed: slots that were read for the last question.
  """

  def __init__(self, config: ConfigDict, room: int):
    """Of a config that `keeps`."""
    self._config, self.room, self.fed = config, room, 0
    module = find_fusion(config)
    self._stream, self._fields = module.STREAM, heard(module.fields(config), module.STREAM)
    self._kept: tuple[Cache, Arrays] | None = None  # the cache, and what stands in its columns

  def stream(self, params: Params, layout: Layout, *, max_tokens: int, bucket: int,
             stop: tuple[int, ...] = (), sampling: Sampling = GREEDY) -> Iterator[Generated]:
    """As `decode.stream` of one prompt of one open turn.

    Args:
      params, max_tokens, stop, sampling: as there.
      layout: of the whole conversation up to the answer.
      bucket: what is fed is padded to a multiple of this.

    Raises:
      UsageError: the conversation and the answer do not fit.
    """
    size = layout.sizes[self._stream]
    if size + max_tokens > self.room:
      raise UsageError(f"document {layout.key} and an answer of {max_tokens} tokens take "
                       f"{size + max_tokens} slots, and there are {self.room} "
                       "(config.data.tokens); shorten it, or ask for fewer tokens")
    columns = COLUMNS
    while columns < size + max_tokens:
      columns *= 2
    prompts, cache = self._prompts(layout, min(columns, self.room), bucket)
    pieces = sayings(self._config, params, prompts, max_tokens=max_tokens, stop=stop,
                     sampling=sampling, kept=cache)
    kept = None
    while True:
      self._kept = None  # an interrupted step has taken the arrays over and gives none back
      saying = next(pieces, None)
      if saying is None:
        self._kept = kept
        return
      said = jax.device_get(saying.generated())
      read = said.tokens[0, 0, : int(saying.cache.length) - size]
      kept = self._kept = saying.cache, self._grown(layout.arrays, read)
      yield said

  def _prompts(self, layout: Layout, columns: int, bucket: int) -> tuple[Prompts, Cache]:
    """The slots to feed, and a cache of at least so many columns with those before them."""
    name, size, same = self._stream, layout.sizes[self._stream], 0
    cache, before = self._kept or (self._empty(), {})
    cache = _widened(cache, columns - cache.slots)
    columns = cache.slots
    if before:
      same = min(shared(before, layout.arrays, self._fields, name), size - 1)
    wide = min(-(-(size - same) // bucket) * bucket, columns)
    start = min(same, columns - wide)  # the padding has columns, too
    self.fed = size - start
    new = {path: layout.arrays[path][start:] if field.axis == name else layout.arrays[path]
           for path, field in self._fields.items()}
    sizes = layout.sizes | {name: self.fed}
    if start and self._known(before, layout.arrays) and (new[f"streams/{name}/fill"] < 0).all():
      beside = {field.axis for field in self._fields.values()} - {name}
      new |= {path: new[path][:0] for path, field in self._fields.items() if field.axis in beside}
      sizes |= dict.fromkeys(beside, 0)
    else:
      cache = dataclasses.replace(cache, memory=None)  # made again, of all pictures
    prompts = stack([Layout(new, sizes, layout.source, layout.key)], self._config, rows=1,
                    bucket=wide)
    if (path := f"masks/{name}/k_class") in self._fields:
      classes = layout.arrays[path]
      prompts.flat[path] = np.pad(classes, (0, columns - size), "edge")[None]
    return prompts, dataclasses.replace(cache, length=np.int32(start))

  def _empty(self) -> Cache:
    cache = find_llm(self._config).empty_cache(self._config.llm, 1, min(COLUMNS, self.room),
                                               precision(self._config).compute)
    k, v = apart((cache.k, cache.v))
    return dataclasses.replace(cache, k=k, v=v)

  def _known(self, before: Arrays, arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether there is nothing beside the stream that there was not before."""
    return all(len(arrays[path]) == len(before[path]) for path, field in self._fields.items()
               if field.axis != self._stream)

  def _grown(self, arrays: Mapping[str, np.ndarray], tokens: np.ndarray) -> Arrays:
    """The arrays of a document, its last slot followed by tokens as `decode.extend` reads them."""
    name, number = self._stream, np.arange(1, 1 + len(tokens), dtype=np.int32)

    def more(path: str) -> np.ndarray:
      last = np.repeat(arrays[path][-1:], len(tokens), axis=0)
      return {f"streams/{name}/tokens": tokens, f"streams/{name}/fill": last * 0 + IGNORE,
              f"streams/{name}/positions": last + number,
              f"masks/{name}/hi": len(arrays[path]) + number}.get(path, last)

    return {path: np.concatenate([arrays[path], more(path)]) if field.axis == name
            else arrays[path] for path, field in self._fields.items()}


def _widened(cache: Cache, more: int) -> Cache:
  """The cache with so many columns more, if any."""
  if more <= 0:
    return cache
  k, v = jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (0, more), (0, 0), (0, 0))),
                      (cache.k, cache.v))
  return dataclasses.replace(cache, k=k, v=v)


def shared(before: Mapping[str, np.ndarray], now: Mapping[str, np.ndarray],
           fields: Mapping[str, Field], stream: str) -> int:
  """How many slots of `before`, from the first on, are the same and see the same in `now`.

  Args:
    before, now: path to array of a document, as in `Layout`; `now` may have more pictures behind.
    fields: those that the stream depends on.
    stream: the one that speaks, there is no other.

  Returns:
    The number, 0 where a picture of `before` is another one in `now`.
  """
  size = min(len(some[f"streams/{stream}/tokens"]) for some in (before, now))
  masks = mask_axes(fields)
  same = np.ones(size, bool)
  for path, field in fields.items():
    kind, name, what = path.split("/", 2)
    if field.axis != stream:
      if not np.array_equal(before[path], now[path][: len(before[path])]):
        return 0
    elif what in READ or kind == "masks" and name != stream and masks[name][0] == stream:
      same &= before[path][:size] == now[path][:size]
  past, seen = (IntervalMask(**{
    path.rpartition("/")[2]: some[path] for path in fields if path.startswith(f"masks/{stream}/")
  }).dense() for some in (before, now))
  same &= (past[:size, :size] == seen[:size, :size]).all(1)
  same &= ~past[:size, size:].any(1) & ~seen[:size, size:].any(1)
  size = size if same.all() else int(same.argmin())
  while (ahead := seen[:size, size:].any(1)).any():  # what a kept slot sees is kept
    size = int(ahead.argmax())
  return size
