"""Checkpoints are bit-exact, and every way of damaging the newest one is noticed."""

import asyncio
import gc
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.core import digest
from vlm_jax.core.errors import DataError, DiskError, UsageError
from vlm_jax.train import arrays
from vlm_jax.train import checkpoint as checkpoint_lib
from vlm_jax.train.checkpoint import Checkpoints, load_params, quiet
from vlm_jax.train.state import State

DATA = {"shards": {"0": {"next": 5}}}


def make_state(step):
  rng = np.random.default_rng(step)
  params = {"tower": {"kernel": jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)},
            "llm": {"half": jnp.asarray(rng.normal(size=(8, 4)), jnp.bfloat16)}}
  moments = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) * 2, params)
  return State(jnp.asarray(step, jnp.int32), params, ({"count": jnp.int32(step)}, moments))


def abstract_of(state):
  shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
  return jax.tree.map(shape, state)


def same(a, b):
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
             for x, y in pairs)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A directory with the checkpoints of steps 1 and 2."""
  path = tmp_path_factory.mktemp("written") / "checkpoints"
  store = Checkpoints(path, keep=3)
  for step in (1, 2):
    store.save(step, make_state(step), DATA | {"step": step}, {"step": step})
    store.finish(step)
  store.close()
  return path


@pytest.fixture
def path(written, tmp_path):
  shutil.copytree(written, tmp_path / "checkpoints")
  return tmp_path / "checkpoints"


def restore(path):
  lines = []
  store = Checkpoints(path, keep=3, report=lines.append)
  try:
    return store.restore(abstract_of(make_state(0))), lines
  finally:
    store.close()


def test_round_trip(path):
  (state, data, meta), lines = restore(path)
  assert same(state, make_state(2)) and not same(state, make_state(1))
  assert data == DATA | {"step": 2} and meta == {"step": 2} and not lines
  params, step = load_params(path, abstract_of(make_state(0).params))
  assert step == 2 and same(params, make_state(2).params)
  params, step = load_params(path, abstract_of(make_state(0).params), step=1)
  assert step == 1 and same(params, make_state(1).params)


def data_files(path):
  files = [file for file in path.rglob("d/*") if file.is_file()]
  return sorted(files, key=lambda file: -file.stat().st_size)


def flip(file, rng):
  content = bytearray(file.read_bytes())
  content[rng.integers(len(content))] ^= 1 << rng.integers(8)
  file.write_bytes(content)


def truncate(path, name):
  file = data_files(path / name)[0]
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(path):
  shutil.rmtree(path)
  path.mkdir()


def forge(path, name, key):
  file = path / name / "metadata"
  content = json.loads(file.read_text())
  content[key] = "forged"
  file.write_text(json.dumps(content))


FAULTS = {
  "truncated parameters": lambda path: truncate(path, "params"),
  "truncated optimizer": lambda path: truncate(path, "optimizer"),
  "removed file": lambda path: data_files(path / "params")[0].unlink(),
  "removed arrays": lambda path: shutil.rmtree(path / "params"),
  "empty directory": empty,
  "missing manifest": lambda path: shutil.rmtree(path / "manifest"),
  "forged manifest": lambda path: forge(path, "manifest", "arrays"),
  "forged data position": lambda path: forge(path, "data", "step"),
  "half a document": lambda path: (path / "meta" / "metadata").write_text('{"st'),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_newest_is_moved_aside(path, fault):
  FAULTS[fault](path / "2")
  (state, data, _), lines = restore(path)
  assert same(state, make_state(1)) and data["step"] == 1
  assert len(lines) == 1 and "checkpoint 2 is damaged" in lines[0]
  assert (path / "2.corrupt-0").is_dir() and not (path / "2").exists()


def test_missing_tree_metadata_is_no_matter(path):
  (path / "2" / "params" / "_METADATA").unlink()
  (state, _, _), lines = restore(path)
  assert same(state, make_state(2)) and not lines  # the target says what the file would


def flip_until(path, written, rounds, seed=0):
  """How often a flipped bit in an array file gave a wrong state, and how often it was noticed."""
  rng = np.random.default_rng(seed)
  wrong = noticed = 0
  for _ in range(rounds):
    shutil.rmtree(path)
    shutil.copytree(written, path)
    flip(data_files(path / "2")[rng.integers(2)], rng)  # the large ones hold the arrays
    (state, _, _), lines = restore(path)
    noticed += bool(lines)
    wrong += not same(state, make_state(1 if lines else 2))
  return wrong, noticed


def test_flipped_bits_are_never_restored(path, written):
  wrong, noticed = flip_until(path, written, rounds=12)
  assert wrong == 0 and noticed >= 8


def test_flipped_bits_twin_without_digests(path, written, monkeypatch):
  real = digest.of_arrays
  blind = lambda tree: {path: entry | {"digest": ""} for path, entry in real(tree).items()}
  shutil.copytree(written, path.parent / "blind")
  for file in (path.parent / "blind").glob("*/manifest/metadata"):
    manifest = json.loads(file.read_text())
    manifest.pop("digest")
    for entry in manifest["arrays"].values():
      entry["digest"] = ""
    file.write_text(json.dumps(manifest | {"digest": digest.of_json(manifest)}))
  monkeypatch.setattr(digest, "of_arrays", blind)
  wrong, _ = flip_until(path, path.parent / "blind", rounds=8)
  assert wrong >= 3  # Orbax alone restores wrong numbers without a word


def test_second_quarantine_of_a_step_gets_its_own_name(path):
  (path / "2.corrupt-0").mkdir()
  empty(path / "2")
  _, lines = restore(path)
  assert "2.corrupt-1" in lines[0] and (path / "2.corrupt-1").is_dir()


def test_none_valid_is_an_error_for_good(path):
  for step in (1, 2):
    empty(path / str(step))
  for _ in range(2):  # also at the next start, when only the quarantined are left
    with pytest.raises(DataError, match=r"corrupt-\*") as error:
      restore(path)
  assert error.value.code == 65 and len(list(path.glob("*.corrupt-*"))) == 2


def test_nothing_there(tmp_path):
  assert restore(tmp_path / "new")[0] is None
  with pytest.raises(UsageError, match="has no checkpoint"):
    load_params(tmp_path / "absent", {})


def test_other_model_is_refused_not_moved(path):
  state = make_state(0)
  other = State(state.step, {"tower": {"kernel": jnp.zeros((64, 9))}}, state.opt_state)
  store = Checkpoints(path, keep=3)
  with pytest.raises(UsageError, match=r"params/tower/kernel.*\[64, 8\].*\[64, 9\]"):
    store.restore(abstract_of(other))
  other = State(state.step, {"tower": {"bias": jnp.zeros(3)}}, state.opt_state)
  with pytest.raises(UsageError, match="has no 'params/tower/bias'"):
    store.restore(abstract_of(other))
  store.close()
  assert (path / "2").is_dir()


def test_load_params_of_a_damaged_checkpoint(path):
  truncate(path / "2", "params")
  with pytest.raises(DataError, match="is damaged") as error:
    load_params(path, abstract_of(make_state(0).params))
  assert "bound method" not in str(error.value)  # TensorStore's details are for its authors
  assert (path / "2").is_dir()  # reading never moves anything


def test_leftovers_are_cleaned(path):
  (path / "3.orbax-checkpoint-tmp-17").mkdir()
  (_, data, _), lines = restore(path)
  assert data["step"] == 2 and not lines and not list(path.glob("*tmp*"))


def test_keep_policy(tmp_path):
  store = Checkpoints(tmp_path / "c", keep=2, keep_every=3)
  for step in range(1, 8):
    store.save(step, make_state(step), DATA, {"step": step})
  store.finish(7)
  store.close()
  assert checkpoint_lib.steps(tmp_path / "c") == [3, 6, 7]


def test_failures_that_nobody_asks_about_are_silent(caplog):
  """Of many arrays that a full disk refused, the first one's error is the one that is told."""

  async def fail():
    raise ValueError("no space left")

  async def write():
    tasks = [asyncio.ensure_future(fail()) for _ in range(3)]
    with pytest.raises(ValueError):
      await asyncio.gather(tasks[0])
    await asyncio.sleep(0)

  said = []
  logging.getLogger("asyncio").setLevel(logging.NOTSET)
  for prepare in (lambda: None, quiet):
    prepare()
    caplog.clear()
    asyncio.run(write())
    gc.collect()
    said.append(len(caplog.records))
  assert said == [2, 0]


def test_full_disk_keeps_the_previous(path, monkeypatch):
  lines = []
  store = Checkpoints(path, keep=3, report=lines.append)

  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(store._manager, "save", full)
  store.save(3, make_state(3), DATA, {"step": 3})
  assert store.failures == 1 and "disk is full" in lines[0]
  with pytest.raises(DiskError) as error:
    store.finish(3)
  assert error.value.code == 73
  store.save(4, make_state(4), DATA, {"step": 4})
  store.finish(4)
  state, _, _ = store.restore(abstract_of(make_state(0)))
  store.close()
  assert same(state, make_state(4)) and checkpoint_lib.steps(path) == [1, 2, 4]


def test_what_the_machine_refuses_is_no_damage():
  with pytest.raises(PermissionError, match="permission denied: 'llm/embed'"), (
      arrays.reading("llm/embed")):
    raise ValueError("PERMISSION_DENIED: Error opening file")
  with pytest.raises(arrays.Corrupt, match="'llm/embed' cannot be read: NOT_FOUND"), (
      arrays.reading("llm/embed")):
    raise ValueError("NOT_FOUND: no such chunk")
