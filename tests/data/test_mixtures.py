"""Mixtures: sources that end, and sources of 10^9 records: at once, small, well shuffled."""

import collections
import copy
import time
import tracemalloc

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.data import simulated_source
from vlm_jax.configs import base
from vlm_jax.core.errors import UsageError
from vlm_jax.data import draw, pipeline, records

BILLION = 10**9


@pytest.fixture
def simulated(config, monkeypatch):
  """A function: sizes of sources by name to a config whose records are computed."""
  def make(**sizes):
    monkeypatch.setattr(records, "open_split",
                        lambda root, source, split: simulated_source.Reader(sizes[split]))
    with config.unlocked():
      config.data.sources = ConfigDict({
        name: base.source(name="tests.data.simulated_source", split=name) for name in sizes})
    return config

  return make


def drawn(loader, count):
  """Source to the numbers of the records in the next `count` steps, in the order of packing."""
  keys = collections.defaultdict(list)
  build = pipeline.Packer.build

  def spy(packer):
    for layout in packer._layouts:
      keys[layout.source].append(int(layout.key.rsplit("/", 1)[1]))
    return build(packer)

  pipeline.Packer.build = spy
  try:
    batches = [next(loader) for _ in range(count)]
  finally:
    pipeline.Packer.build = build
  return keys, batches


def same(one, other):
  return all(np.array_equal(one[path], other[path]) for path in one)


def test_a_billion_records_start_at_once_in_constant_memory(simulated):
  peaks = []
  for size in (1000, BILLION):
    config = simulated(big=size)
    next(pipeline.make(config))  # caches of the tokenizer and of modules are not the source's
    tracemalloc.start()
    start = time.perf_counter()
    loader = pipeline.make(config)
    keys, _ = drawn(loader, 5)
    seconds = time.perf_counter() - start
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert len(keys["big"]) > 50 and seconds < 10
  assert peaks[1] < peaks[0] + 100_000, "memory grows with the number of records"


@pytest.mark.parametrize("count, bound", [
  (10**5, 0.015), pytest.param(10**6, 0.01, marks=pytest.mark.long)])
def test_the_first_of_a_billion_never_repeat_and_have_no_order(simulated, count, bound):
  config = simulated(big=BILLION)
  order = pipeline._order(config, "big", BILLION)
  numbers = np.fromiter((order[i][1] for i in range(count)), np.int64, count)
  assert len(np.unique(numbers)) == count
  edge = 10 * BILLION // count
  assert 0 <= numbers.min() < edge and BILLION - edge < numbers.max() < BILLION
  ranks = np.argsort(np.argsort(numbers))
  correlation = lambda one, other: abs(np.corrcoef(one, other)[0, 1])
  assert correlation(ranks, np.arange(count)) < bound
  for lag in 2 ** np.arange(13):  # neighbours in the order are not neighbours on disk
    assert correlation(ranks[lag:], ranks[:-lag]) < bound
  tenths = np.histogram(numbers, 10, (0, BILLION))[0]
  assert np.abs(tenths - count / 10).max() < 5 * (count / 10) ** 0.5
  keys, _ = drawn(pipeline.make(config), 2)
  assert keys["big"] == numbers[: len(keys["big"])].tolist() and len(keys["big"]) > 20


@pytest.mark.parametrize("size", [pipeline.ONCE, pipeline.ONCE + 1, 100_000, 10**6, 10**7])
def test_neighbours_in_the_order_have_nothing_in_common(simulated, size, monkeypatch):
  config = simulated(some=size)
  count = min(size, 30_000)

  def worst():
    order = pipeline._order(config, "some", size)
    numbers = np.array([order[i][1] for i in range(count)])
    return max(abs(np.corrcoef(numbers[lag:], numbers[:-lag])[0, 1]) for lag in (1, 2, 4, 8))

  assert worst() < 5 / count**0.5  # five standard deviations of what chance gives
  monkeypatch.setattr(pipeline, "PASSES", 1)
  if size > 100_000:
    assert worst() > 0.1, "one pass would do: drop the others"


def test_epochs_of_a_billion_differ(simulated):
  order = pipeline._order(simulated(big=BILLION), "big", BILLION)
  first, second = ([order[epoch * BILLION + i] for i in range(1000)] for epoch in (0, 1))
  assert {epoch for epoch, _ in first} == {0} and {epoch for epoch, _ in second} == {1}
  assert len({number for _, number in first} & {number for _, number in second}) < 5


def test_resumes_in_the_middle_of_a_billion(simulated):
  config = simulated(big=BILLION)
  loader = pipeline.make(config)
  next(loader)
  state = copy.deepcopy(loader.state())
  middle = 123_456_789
  state["shards"]["0"]["big"].update(next=middle, offset=0)
  start = time.perf_counter()
  loader = pipeline.make(config, start=state)
  keys, batches = drawn(loader, 2)
  saved = loader.state()
  later, after = drawn(loader, 2)
  again, after_again = drawn(pipeline.make(config, start=saved), 2)
  assert time.perf_counter() - start < 10
  order = pipeline._order(config, "big", BILLION)
  expected = [order[middle + i][1] for i in range(len(keys["big"]))]
  assert keys["big"] == expected and later == again
  assert all(same(one, other) for (one, _), (other, _) in zip(after, after_again, strict=True))
  assert not same(batches[0][0], after[0][0])
  assert batches[1][1]["epochs"]["big"] == pytest.approx(middle / BILLION, rel=1e-5)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_source_leaves_the_mix_after_its_epochs(simulated, shards):
  config = simulated(few=30, many=10**6)
  config.data.shards = shards
  config.data.sources.few.update(ratio=2, epochs=2)
  config.data.sources.many.ratio = 3
  loader = pipeline.make(config)
  keys, batches = drawn(loader, 10)
  counts = collections.Counter(keys["few"])
  assert sorted(counts) == list(range(30)) and set(counts.values()) == {2}
  assert len(keys["many"]) == len(set(keys["many"])) > 100
  with_both, without = [info["documents"] for _, info in batches[:1]], batches[-1][1]
  assert all(2 * n["many"] == 3 * n["few"] for n in with_both)
  assert "few" not in without["documents"] and without["documents"]["many"]
  assert without["epochs"]["few"] == 2 and 0 < without["epochs"]["many"] < 0.01
  # A run that is continued behind the end does not begin the source again.
  state = loader.state()
  following, _ = drawn(loader, 2)
  again, _ = drawn(pipeline.make(config, start=state), 2)
  assert again == following and "few" not in again


def test_a_source_ends_within_workers_too(config):
  config.data.sources.pydoc.update(split="validation", epochs=1)
  drawer = draw.Draw(config, "pydoc")
  alone = list(pipeline._iterate(config, "pydoc", 0, drawer, 3))
  config.data.workers = 1
  shared = pipeline._iterate(config, "pydoc", 0, drawer, 3)
  keys = [[layouts[0].key for layouts in stream] for stream in (alone, shared)]
  assert keys[0] == keys[1] and len(keys[0]) == len(drawer.records) - 3 > 10
  assert next(shared, None) is None
  shared.close()


@pytest.mark.parametrize("change, message", [
  (lambda s: s.few.update(epochs=-1), "config.data.sources.few.epochs is -1"),
  (lambda s: s.few.update(ratio=0), "config.data.sources.few.ratio is 0"),
  (lambda s: s.many.update(weight=-0.5), "config.data.sources.many.weight is -0.5"),
  (lambda s: (s.few.update(epochs=1), s.many.update(epochs=3)), "leave one at epochs=0"),
])
def test_wrong_mixtures_are_named(simulated, change, message):
  config = simulated(few=30, many=100)
  change(config.data.sources)
  with pytest.raises(UsageError, match=message):
    pipeline.make(config)
