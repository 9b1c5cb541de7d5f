"""Batches are a function of the config: workers, hosts, threads and restarts change nothing."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.data import broken_source
from tests.data.conftest import ROOT
from vlm_jax.configs import base
from vlm_jax.core.document import Image
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.core.tree import unite
from vlm_jax.data import draw, pipeline, prepare
from vlm_jax.data.bad import REASONS


def steps(config, count, **arguments):
  """(batch, info, state before it) of the first steps."""
  loader = pipeline.make(config, **arguments)
  made = []
  for _ in range(count):
    state = loader.state()
    made.append((*next(loader), state))
  loader.close()
  return made


def same(one, other):
  return one.keys() == other.keys() and all(np.array_equal(one[p], other[p]) for p in one)


def test_fill_and_ratio(config):
  for batch, info, _ in steps(config, 5):
    assert info["fill"]["text"] > 0.5 and info["fill"]["images"] > 0.3
    assert info["documents"]["easy_vqa"] == 2 * info["documents"]["pydoc"] > 0
    assert info["bad"] == {} and info["wait"] > 0
    assert batch["streams/text/tokens"].shape == (4, 256)
    assert batch["media/images/values"].any()


def test_workers_change_nothing(config):
  with config.unlocked():
    del config.data.sources.pydoc  # every source starts its own processes: slow
  alone = steps(config, 4)
  config.data.workers = 2
  shared = steps(config, 4)
  for (batch, _, state), (other, _, other_state) in zip(alone, shared, strict=True):
    assert same(batch, other) and state == other_state
  assert not same(alone[0][0], alone[1][0])
  for child in multiprocessing.active_children():  # told to stop; a busy machine needs a moment
    child.join(timeout=30)
  assert not multiprocessing.active_children()


def test_workers_die_with_a_killed_trainer(config, tmp_path):
  (tmp_path / "config.json").write_text(config.to_json_best_effort())
  code = f"""
import json, multiprocessing, os, signal
from ml_collections import ConfigDict
from vlm_jax.data import pipeline
config = ConfigDict(json.load(open({str(tmp_path / "config.json")!r})))
config.data.workers = 1
del config.data.sources["pydoc"]
next(pipeline.make(config))
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                        env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120)
  workers = [int(pid) for pid in done.stdout.split()]
  assert done.returncode == -signal.SIGKILL and workers
  end = time.monotonic() + 30
  while any(os.path.exists(f"/proc/{pid}") for pid in workers):
    assert time.monotonic() < end, "a worker outlives the trainer"
    time.sleep(0.1)


def test_thread_changes_nothing_and_its_state_is_of_the_last_batch(config):
  alone = steps(config, 6)
  config.data.prefetch = 3
  ahead = steps(config, 6)
  for (batch, _, state), (other, _, other_state) in zip(alone, ahead, strict=True):
    assert same(batch, other) and state == other_state


def test_resumes_exactly_anywhere(config):
  config.data.window = 30  # several windows a passage: states lie within documents
  made = steps(config, 14)
  states = [json.loads(json.dumps(state)) for _, _, state in made]
  offsets = [state["shards"]["0"]["pydoc"]["offset"] for state in states]
  assert any(offsets), "no state lies within a document"
  within = next(i for i, offset in enumerate(offsets) if offset)
  for k in {within, *np.random.default_rng(0).choice(13, 3, replace=False).tolist()}:
    again = steps(config, 14 - k, start=states[k])
    for (batch, _, state), (other, _, other_state) in zip(made[k:], again, strict=True):
      assert same(batch, other) and state == other_state
  moved = json.loads(json.dumps(states[within]))
  moved["shards"]["0"]["pydoc"]["offset"] += 1
  assert not same(steps(config, 1, start=moved)[0][0], made[within][0])


def test_hosts_change_nothing(config):
  config.data.shards = 2
  whole = steps(config, 3)
  halves = [steps(config, 3, process_index=i, process_count=2) for i in range(2)]
  for (batch, _, state), (first, _, a), (second, _, b) in zip(whole, *halves, strict=True):
    assert same(batch, {path: np.concatenate([first[path], second[path]]) for path in first})
    assert unite([a, b]) == state
  resumed = steps(config, 1, start=whole[2][2], process_index=1, process_count=2)
  assert same(resumed[0][0], halves[1][2][0])
  first, second = (half[0][0]["streams/text/tokens"] for half in halves)
  assert not np.array_equal(first, second)


def test_every_epoch_has_every_record_once_in_another_order(config):
  class Count:
    records = range(50)

    def __call__(self, position):
      return [position]

  streams = []
  config.data.shards = 3
  for shard in range(3):
    stream = pipeline._iterate(config, "pydoc", shard, Count(), 0)
    streams.append([next(stream)[0] for _ in range(34)])
  order = [position for together in zip(*streams, strict=True) for position in together][:100]
  epochs = [[index for epoch, index in order if epoch == number] for number in range(2)]
  assert [epoch for epoch, _ in order] == [0] * 50 + [1] * 50
  assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50))
  assert epochs[0] != epochs[1] and epochs[0] != list(range(50))


def test_seed_decides(config):
  first = steps(config, 1)[0][0]
  assert same(first, steps(config, 1)[0][0])
  config.seed = 1
  assert not same(first, steps(config, 1)[0][0])


def test_blind_control_has_no_images(config):
  config.data.sources.easy_vqa.images = "none"
  batch, info, _ = steps(config, 1)[0]
  assert not batch["media/images/segment_ids"].any() and info["documents"]["easy_vqa"]


def test_a_partner_without_a_picture_is_passed_over(config):
  """Records that the form "caption" has nothing of are nobody's other picture."""
  real, other = (pipeline.documents(config, "easy_vqa", "test", "caption", images=images)
                 for images in ("real", "shuffled"))
  records = draw.Records(config, "easy_vqa", "test", "caption")
  assert {records.count(index) for index in range(len(records))} == {0, 1}
  pairs = [(real[index].parts[0], other[index].parts[0]) for index in range(len(real))]
  assert all(isinstance(part, Image) for pair in pairs for part in pair)
  assert all(one.data != stranger.data for one, stranger in pairs)


def test_shuffled_control_shows_another_image(config):
  real = pipeline.documents(config, "easy_vqa", "validation", "single")
  other = pipeline.documents(config, "easy_vqa", "validation", "single", images="shuffled")
  blind = pipeline.documents(config, "easy_vqa", "validation", "single", images="none")
  assert len(real) == len(other) == len(blind) > 3000
  picture = lambda document: next(p.data for p in document.parts if isinstance(p, Image))
  for index in range(0, len(real), 97):
    assert real[index].parts[1:] == other[index].parts[1:] == blind[index].parts
    assert picture(real[index]) != picture(other[index])
  records = other.records
  partners = [records.partner(index) for index in range(len(records))]
  assert sorted(partners) == list(range(400)) and all(i != p for i, p in enumerate(partners))


def test_documents_by_index(config):
  documents = pipeline.documents(config, "easy_vqa", "test", "single")
  assert len(documents) == 9673
  assert documents[0].key == "easy_vqa/test/test/0?0"
  assert [part.text for part in documents[len(documents) - 1].parts[1:]]
  with pytest.raises(IndexError):
    documents[9673]
  assert len(pipeline.documents(config, "pydoc", "validation")) > 10


@pytest.mark.parametrize("change, message", [
  (lambda c: c.data.update(shards=3), "config.data.rows=4 .* config.data.shards=3"),
  (lambda c: c.data.update(rows=0), "config.data.rows is 0"),
  (lambda c: c.data.sources.pydoc.update(ratio=0), "config.data.sources.pydoc.ratio"),
  (lambda c: c.llm.update(vocab_size=1000), r"1024 tokens but config.llm.vocab_size is 1000"),
  (lambda c: c.data.sources.pydoc.update(split="trian"), "did you mean 'train'"),
  (lambda c: c.data.sources.easy_vqa.update(form="fan"), "did you mean 'fan_out'"),
  (lambda c: c.data.sources.easy_vqa.update(images="shufled"), "did you mean 'shuffled'"),
  (lambda c: c.data.sources.easy_vqa.update(augment=("flop",)), "did you mean 'flip'"),
  (lambda c: c.data.sources.pydoc.update(name="pydok"), "did you mean 'pydoc'"),
  (lambda c: setattr(c.data, "sources", type(c)()), "config.data.sources is empty"),
  (lambda c: c.data.update(tokens=240, rows=1, images=1), "does not fit an empty step"),
])
def test_wrong_fields_are_named(config, change, message):
  change(config)
  with pytest.raises(UsageError, match=message):
    next(pipeline.make(config))


def test_hosts_must_divide_shards(config):
  with pytest.raises(UsageError, match="config.data.shards=1 cannot be divided among 2"):
    pipeline.make(config, process_count=2)


def test_state_of_another_config_is_refused(config):
  state = steps(config, 1)[0][2]
  config.data.shards = 2
  with pytest.raises(UsageError, match="1 shards but config.data.shards is 2"):
    pipeline.make(config, start=state)
  config.data.shards = 1
  with config.unlocked():
    del config.data.sources.pydoc
  with pytest.raises(UsageError, match="easy_vqa, pydoc"):
    pipeline.make(config, start=state)


@pytest.fixture(scope="module")
def broken_root(tmp_path_factory):
  path = str(tmp_path_factory.mktemp("broken") / "root")
  prepare.prepare(path, ["tests.data.broken_source", "pydoc"], 400, log=lambda line: None)
  return path


@pytest.fixture
def broken(config, broken_root):
  config.data.root, config.llm.vocab_size = broken_root, 400
  with config.unlocked():
    del config.data.sources.easy_vqa
    config.data.sources.broken = base.source(name="tests.data.broken_source", ratio=2)
  config.data.window = 30
  return config


def test_every_kind_of_bad_record_is_named(broken):
  drawer = draw.Draw(broken, "broken")
  reasons = [item.reason for item in map(drawer, [(0, i) for i in range(len(drawer.records))])
             if not isinstance(item, list)]
  assert reasons == list(broken_source.BAD) and set(reasons) == set(REASONS)


def test_bad_records_are_replaced_and_counted(broken):
  broken.data.bad_limit = 1.0
  made = steps(broken, 6)
  assert set(made[-1][1]["bad"]) == set(REASONS)
  for _, info, _ in made:
    assert info["documents"]["broken"] == 2 * info["documents"]["pydoc"]
  state = made[3][2]
  assert sum(state["shards"]["0"]["broken"]["bad"].values()) > 0
  again = steps(broken, 3, start=state)
  for (batch, info, _), (other, other_info, _) in zip(made[3:], again, strict=True):
    assert same(batch, other) and info["bad"] == other_info["bad"]


def test_too_many_bad_records_stop_the_run(broken):
  broken.data.prefetch = 1
  loader = pipeline.make(broken)
  with pytest.raises(DataError, match=r"source 'broken': .* truncated .*broken/train\[.*bad_limit"):
    for _ in range(200):
      next(loader)
  assert DataError.code == 65
  with pytest.raises(StopIteration):
    next(loader)


def test_errors_of_workers_arrive(broken):
  broken.data.workers = 1
  broken.fusion.image_attention = "sideways"
  broken.fusion.name = "concat"
  with pytest.raises(UsageError, match="image_attention"):
    loader = pipeline.make(broken)
    next(loader)
  loader.close()


def test_two_streams_continue_where_they_stopped(two_streams):
  """Drawn prefixes and all: a document's two sides stay together and are drawn once."""
  loader = pipeline.make(two_streams)
  batches, states = [], []
  for _ in range(4):
    states.append(loader.state())
    batches.append(next(loader)[0])
  again = pipeline.make(two_streams, start=states[2])
  for want in batches[2:]:
    got = next(again)[0]
    assert all(np.array_equal(got[path], want[path]) for path in want)
  lengths = set()
  for batch in batches:
    encoder, decoder = (batch[f"streams/{side}/segment_ids"] for side in ("encoder", "decoder"))
    for row in range(len(encoder)):
      assert encoder[row].max() <= decoder[row].max()  # every document has a decoder
      image = batch["media/images/segment_ids"][row]
      for number in range(1, decoder[row].max() + 1):
        # What a decoder slot sees of the encoder is of its own document.
        mine = decoder[row] == number
        lo, hi = (batch[f"masks/cross/{field}"][row][mine] for field in ("lo", "hi"))
        assert all((encoder[row][a:b] == number).all() for a, b in zip(lo, hi, strict=True))
        if number not in image:
          lengths.add(int((encoder[row] == number).sum()))
  assert len(lengths) > 4  # texts are cut at random
