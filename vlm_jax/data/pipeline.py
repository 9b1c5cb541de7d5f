"""Prepared records to packed steps, in an order that depends on the config alone.

    records --grain: shuffle, repeat, shard, draw in workers--> layouts --cycles--> rows of a step

Every logical shard has one grain pipeline a source and its own cursor into each: the next record
and the next layout within it. Those integers are the whole state. They are taken at the start of
the cycle that did not fit any more, so a resumed run draws it again; nothing is replayed, and
neither the number of workers nor of hosts changes a single batch.
"""

import copy
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator

import grain
import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.layout import Layout
from vlm_jax.data import draw
from vlm_jax.data.bad import AT_LEAST, Bad, Tally
from vlm_jax.data.draw import documents as documents  # random access, for evaluation
from vlm_jax.data.draw import image_decoder as image_decoder
from vlm_jax.data.draw import load_tokenizer as load_tokenizer
from vlm_jax.data.pack import Packed, Packer

Batch = dict[str, np.ndarray]
# grain permutes indices by a cipher of four rounds, too few for many records: one pass over 10^6 or
# 10^9 leaves neighbours in the order with a rank correlation of 0.4 to 0.6, two one of up to 0.06,
# three none above chance. Up to ONCE records one pass leaves less than 0.05.
PASSES = 3
ONCE = 10_000


def make(config: ConfigDict, start: dict | None = None, process_index: int = 0,
         process_count: int = 1) -> "Loader":
  """The training batches of this host.

  Args:
    config: what to read and how to pack it.
    start: a `Loader.state()` (of several hosts, their `core.tree.unite`), None from the beginning.
    process_index, process_count: which hosts' rows of the step to make.

  Raises:
    UsageError: fields that contradict each other, or a state of another config.
    DataError: the prepared data or the tokenizer is missing or damaged.
  """
  check(config, process_count)
  per_host = config.data.shards // process_count
  mine = range(process_index * per_host, (process_index + 1) * per_host)
  drawers = {name: draw.Draw(config, name) for name in sorted(config.data.sources)}
  shards = [Shard(config, shard, drawers, _shard_state(config, start, shard)) for shard in mine]
  return Loader(shards, config.data.prefetch)


def check(config: ConfigDict, process_count: int = 1) -> None:
  """Raises a UsageError when sources, shards, rows and hosts do not go together."""
  data = config.data
  if not data.sources:
    raise UsageError("config.data.sources is empty; name at least one source")
  for name, entry in data.sources.items():
    for field, least in (("ratio", 1), ("epochs", 0)):
      if not isinstance(entry[field], int) or entry[field] < least:
        raise UsageError(f"config.data.sources.{name}.{field} is {entry[field]}; it must be a "
                         f"whole number, at least {least}")
    if not 0 <= entry.weight < float("inf"):
      raise UsageError(f"config.data.sources.{name}.weight is {entry.weight}; it must be 0 or more")
  if all(entry.epochs for entry in data.sources.values()):
    raise UsageError("config.data.sources: every source has a limit in epochs, so the data would "
                     "end; leave one at epochs=0 and set the length by config.train.steps")
  if config.seed < 0:
    raise UsageError(f"config.seed is {config.seed}; it must be 0 or more")
  for field in ("rows", "tokens", "shards"):
    if data[field] < 1:
      raise UsageError(f"config.data.{field} is {data[field]}; it must be at least 1")
  if data.shards % process_count:
    raise UsageError(f"config.data.shards={data.shards} cannot be divided among {process_count} "
                     f"hosts; make it a multiple of {process_count}")
  if data.rows % data.shards:
    raise UsageError(f"config.data.rows={data.rows} cannot be divided among config.data.shards="
                     f"{data.shards}; make it a multiple of {data.shards}")


def _shard_state(config: ConfigDict, start: dict | None, shard: int) -> dict | None:
  if start is None:
    return None
  if start["count"] != config.data.shards:
    raise UsageError(f"the saved data position has {start['count']} shards but config.data.shards "
                     f"is {config.data.shards}; set it back, or start a new run")
  if str(shard) not in start["shards"]:
    raise UsageError(f"the saved data position has no shard {shard}; the states of all hosts are "
                     "needed")
  state = start["shards"][str(shard)]
  if sorted(state) != sorted(config.data.sources):
    raise UsageError(f"the saved data position has the sources {', '.join(sorted(state))} but "
                     f"config.data.sources has {', '.join(sorted(config.data.sources))}; set them "
                     "back, or start a new run")
  return state


class Cursor:
  """The stream of layouts of one source in one shard, and where in it we are."""

  def __init__(self, config: ConfigDict, name: str, shard: int, drawer: draw.Draw,
               state: dict | None):
    """Starts at `state`, a former `state()`, without reading what came before."""
    self._records = len(drawer.records)
    state = state or {"next": 0, "offset": 0, "seen": 0, "bad": {}, "records": self._records}
    if state["records"] != self._records:
      raise DataError(f"source '{name}' has {self._records} records but had {state['records']} "
                      "when the run was saved; prepare the same data again")
    self._next, self._offset = state["next"], state["offset"]
    self.tally = Tally(name, config.data.bad_limit, state["seen"], dict(state["bad"]))
    self._iterator = _iterate(config, name, shard, drawer, self._next)
    self._current: list[Layout] | None = None  # the layouts of record `_next`, once drawn

  def state(self) -> dict:
    """The position of the layout that `take` returns next, and the counts so far."""
    return {"next": self._next, "offset": self._offset, "seen": self.tally.seen,
            "bad": dict(self.tally.bad), "records": self._records}

  def take(self) -> Layout | None:
    """The next layout, None when the source's epochs are over.

    A bad record is counted and the next record of the source takes its place.

    Raises:
      DataError: too many records are bad.
    """
    wasted = 0
    while self._current is None or self._offset >= len(self._current):
      if self._current is not None:
        self._next, self._offset, self._current = self._next + 1, 0, None
      item = next(self._iterator, None)
      if item is None:
        return None
      if self._offset == 0:  # a record that is drawn again after a restart was counted before
        self.tally.count(item)
      self._current = [] if isinstance(item, Bad) else item
      wasted += not self._current
      if wasted > max(self._records, AT_LEAST):
        raise DataError(f"source '{self.tally.source}' has no usable record "
                        f"({self.tally.examples()}); mend the data or leave the source out")
    layout = self._current[self._offset]
    self._offset += 1
    return layout

  def close(self) -> None:
    """Ends the worker processes."""
    getattr(self._iterator, "close", lambda: None)()


def _order(config: ConfigDict, name: str, count: int) -> grain.MapDataset:
  """(epoch, record) of a source of `count` records in the order of its epochs, by index alone."""
  # grain hands down an index that counts on over the epochs; the element is that modulo `count`.
  positions = grain.MapDataset.range(count).map_with_index(lambda i, record: (i // count, record))
  shuffled = positions.shuffle(seed=draw.source_seed(config, name))
  for again in range(1, PASSES if count > ONCE else 1):
    shuffled = shuffled.shuffle(seed=draw.source_seed(config, f"{name}/{again}"))
  return shuffled.repeat(config.data.sources[name].epochs or None)


def _iterate(config: ConfigDict, name: str, shard: int, drawer: draw.Draw, start: int) -> Iterator:
  order = _order(config, name, len(drawer.records))
  dataset = order[shard :: config.data.shards][start:].map(drawer)
  stream = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  if config.data.workers:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # grain reads absl flags that only absl programs parse
    options = grain.multiprocessing.MultiprocessingOptions(
      num_workers=config.data.workers, per_worker_buffer_size=8)
    stream = stream.mp_prefetch(options, worker_init_fn=_start_worker)
  return iter(stream)


def _start_worker(worker_index: int, worker_count: int) -> None:
  del worker_index, worker_count
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
  jax.config.update("jax_platforms", "cpu")  # a reader must never take the trainer's device
  threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
  # A trainer that is killed outright cannot end its workers; they would wait for it for ever.
  parent = multiprocessing.parent_process()
  if parent is not None:
    parent.join()
    os._exit(1)


class Shard:
  """One logical shard: a cursor a source, and the packer of its rows."""

  def __init__(self, config: ConfigDict, number: int, drawers: dict[str, draw.Draw],
               state: dict | None):
    """Starts at `state`, one of `Loader.state()["shards"]`."""
    fusion = find_fusion(config)
    self.number, self.count = number, config.data.shards
    self.cursors = {
      name: Cursor(config, name, number, drawer, state[name] if state else None)
      for name, drawer in drawers.items()
    }
    self._ratios = {name: config.data.sources[name].ratio for name in drawers}
    self._packer = Packer(fusion.fields(config), fusion.axes(config),
                          config.data.rows // config.data.shards)
    self._pending: list[Layout] = []  # the cycle that did not fit the last step

  def step(self) -> tuple[Packed, dict]:
    """The next rows, and the state from which the rows after them come."""
    before = {}
    while True:
      if not self._pending:
        before = {name: cursor.state() for name, cursor in self.cursors.items()}
        self._pending = [
          layout for name, cursor in self.cursors.items() for _ in range(self._ratios[name])
          if (layout := cursor.take()) is not None
        ]
      if not self._packer.add(self._pending):
        return self._packer.build(), before
      self._pending = []


class Loader:
  """Iterates over (flat numpy batch, info); a thread packs the next steps meanwhile.

  info: {"fill": {axis: share}, "documents": {source: n}, "bad": {reason: records so far},
  "epochs": {source: passes over it so far}, "wait": seconds that this batch was waited for}.
  """

  def __init__(self, shards: list[Shard], prefetch: int):
    """Steps of these shards, `prefetch` of them kept ready (0: made when asked for)."""
    self._shards = shards
    self._state = _join(shards, [
      {name: cursor.state() for name, cursor in shard.cursors.items()} for shard in shards
    ])
    self._stop = threading.Event()
    self._ready: queue.Queue = queue.Queue(maxsize=max(prefetch, 1))
    self._thread = threading.Thread(target=self._work, name="vlm_jax-data", daemon=True)
    self._threaded = prefetch > 0
    if self._threaded:
      self._thread.start()

  def __iter__(self) -> "Loader":
    return self

  def __next__(self) -> tuple[Batch, dict]:
    """The next step.

    Raises:
      DataError: too many records are bad, or a file is damaged.
      UsageError: one sampling cycle does not fit the step.
    """
    begin = time.perf_counter()
    if self._stop.is_set():
      raise StopIteration
    item = self._ready.get() if self._threaded else self._make()
    if isinstance(item, BaseException):
      self.close()
      raise item
    batch, info, self._state = item
    return batch, info | {"wait": time.perf_counter() - begin}

  def state(self) -> dict:
    """JSON-able; `make(config, start=state)` continues behind the last batch handed out."""
    return copy.deepcopy(self._state)

  @property
  def tallies(self) -> list[Tally]:
    """The counts of every shard and source, with keys of bad records; ahead of the last batch."""
    return [cursor.tally for shard in self._shards for cursor in shard.cursors.values()]

  def close(self) -> None:
    """Ends the thread and the workers; the loader gives no more batches."""
    self._stop.set()
    while self._threaded and self._thread.is_alive():
      try:
        self._ready.get_nowait()  # the thread may be waiting for room
      except queue.Empty:
        self._thread.join(0.01)
    for shard in self._shards:
      for cursor in shard.cursors.values():
        cursor.close()

  def _make(self) -> tuple[Batch, dict, dict]:
    packed, states = zip(*(shard.step() for shard in self._shards), strict=True)
    batch = {
      path: np.concatenate([one.arrays[path] for one in packed]) for path in packed[0].arrays
    }
    mean = lambda axis: float(np.mean([one.fill[axis] for one in packed]))
    state = _join(self._shards, list(states))
    info = {
      "fill": {axis: mean(axis) for axis in packed[0].fill},
      "documents": _add([one.documents for one in packed]),
      "bad": _add([source["bad"] for shard in states for source in shard.values()]),
      "epochs": {name: float(np.mean([shard[name]["next"] for shard in states]))
                 * self._shards[0].count / first["records"] for name, first in states[0].items()},
    }
    return batch, info, state

  def _work(self) -> None:
    while not self._stop.is_set():
      try:
        item = self._make()
      except BaseException as error:  # handed to whoever asks for the next batch
        item = error
      while not self._stop.is_set():
        try:
          self._ready.put(item, timeout=0.1)
          break
        except queue.Full:
          continue
      if isinstance(item, BaseException):
        return


def _join(shards: list[Shard], states: list[dict]) -> dict:
  return {"count": shards[0].count,
          "shards": {str(shard.number): state for shard, state in zip(shards, states, strict=True)}}


def _add(counts: list[dict[str, int]]) -> dict[str, int]:
  total: dict[str, int] = {}
  for one in counts:
    for name, number in one.items():
      total[name] = total.get(name, 0) + number
  return total
