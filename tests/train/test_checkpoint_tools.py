"""`vlm-jax ckpt`: what it reads is what was written, and it never removes the last good one."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.test_checkpoint import abstract_of, data_files, flip, make_state, same
from vlm_jax.cli import main as cli
from vlm_jax.core import pieces
from vlm_jax.core.errors import DATA, RETRY, USAGE, DataError, UsageError
from vlm_jax.core.tree import flatten, unflatten
from vlm_jax.train import checkpoint_tools as tools
from vlm_jax.train.checkpoint import Checkpoints, load_params
from vlm_jax.train.optimizer import make_optimizer
from vlm_jax.train.state import State, initializer
from vlm_jax.train.workdir import Workdir


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A run directory with the checkpoints of steps 1, 2 and 3, and no config yet."""
  path = tmp_path_factory.mktemp("written") / "run"
  store = Checkpoints(path / "checkpoints", keep=5)
  for step in (1, 2, 3):
    store.save(step, make_state(step), {"next": step}, {"step": step})
    store.finish(step)
  store.close()
  return path


@pytest.fixture
def run(written, tmp_path, config):
  Workdir(tmp_path / "run", config).close()
  shutil.copytree(written / "checkpoints", tmp_path / "run" / "checkpoints")
  return tmp_path / "run"


def damage(run, step):
  # Single bits of the array's file, until one is not in a part that nobody reads.
  file, rng = data_files(run / "checkpoints" / str(step) / "params")[0], np.random.default_rng(1)
  for _ in range(20):
    flip(file, rng)
    if tools.verify(run / "checkpoints", step):
      return
  raise AssertionError("20 flipped bits, and none was noticed")


def test_ls(run, capsys):
  damage(run, 2)
  shutil.move(run / "checkpoints" / "1", run / "checkpoints" / "1.corrupt-0")
  assert cli.main(["ckpt", "ls", f"--workdir={run}", "--verify"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3"]
  for line, state in zip(lines[1:], ("quarantined", "damaged: ", "verified"), strict=True):
    assert state in line
  assert cli.main(["ckpt", "ls", f"--workdir={run}"]) == 0
  assert capsys.readouterr().out.count("not verified") == 2


def test_inspect_needs_no_code_and_reads_the_optimizer(run, capsys):
  assert cli.main(["ckpt", "inspect", str(run / "checkpoints" / "2"), "--json", "--optimizer"]) == 0
  found = json.loads(capsys.readouterr().out)
  state = make_state(2)
  kernel = np.asarray(state.params["tower"]["kernel"], np.float64)
  rows = {row["path"]: row for row in found["arrays"]}
  assert rows["params/tower/kernel"]["norm"] == pytest.approx(np.linalg.norm(kernel))
  assert rows["params/tower/kernel"]["largest"] == pytest.approx(np.abs(kernel).max())
  assert rows["params/llm/half"]["dtype"] == "bfloat16"
  assert rows["optimizer/state/1/tower/kernel"]["norm"] == pytest.approx(2 * np.linalg.norm(kernel))
  assert found["parameters"] == {"llm": 32, "tower": 512} and found["data"] == {"next": 2}
  assert cli.main(["ckpt", "inspect", str(run)]) == 0
  assert "step 3, 544 parameters" in capsys.readouterr().out


def test_a_real_optimizer_is_read_back(config, tmp_path):
  from tests.train import tiny_fusion

  init, leaves = initializer(tiny_fusion, config)
  optimizer = make_optimizer(config, tiny_fusion.STAGES, leaves)

  @jax.jit  # one compilation, not one for every operation
  def begin(key):
    params = init(key)
    return State(jnp.int32(4), params, optimizer.init(params))

  state = begin(jax.random.key(3))
  store = Checkpoints(tmp_path, keep=1)
  store.save(4, state, {}, {"step": 4})
  store.finish(4)
  store.close()
  contents = tools.load(tmp_path, 4)
  assert len(contents.arrays) == len(jax.tree.leaves(state)) > 10
  assert tools.verify(tmp_path, 4) is None


def test_verify(run, capsys):
  assert cli.main(["ckpt", "verify", f"--workdir={run}"]) == 0
  assert capsys.readouterr().out.count("as it was written") == 3
  damage(run, 2)
  assert cli.main(["ckpt", "verify", f"--workdir={run}"]) == DATA
  captured = capsys.readouterr()
  assert "(2)" in captured.err and captured.out.count("as it was written") == 2
  assert cli.main(["ckpt", "verify", f"--workdir={run}", "--step=3"]) == 0
  assert cli.main(["ckpt", "verify", f"--workdir={run}", "--step=9"]) == USAGE
  assert "it has 1, 2, 3" in capsys.readouterr().err
  shutil.rmtree(run / "checkpoints" / "3" / "optimizer")
  assert "optimizer" in tools.verify(run / "checkpoints", 3)


def test_diff(run, capsys):
  a, b = (tools.load(run / "checkpoints", step, ("params",)) for step in (1, 2))
  rows = {row.path: row for row in tools.diff(a, b)}
  gap = np.abs(a.arrays["params/tower/kernel"] - b.arrays["params/tower/kernel"])
  assert rows["params/tower/kernel"].largest == pytest.approx(gap.max()) and gap.max() > 1
  assert not any(row.largest for row in tools.diff(a, a))
  a.arrays["params/extra"] = np.ones(3)
  a.arrays["params/llm/half"] = np.ones((2, 2))
  notes = {row.path: row.note for row in tools.diff(a, b) if row.note}
  assert notes == {"params/extra": "only in A", "params/llm/half": "[2, 2] in A, [8, 4] in B"}
  one, two = (str(run / "checkpoints" / str(step)) for step in (1, 2))
  assert cli.main(["ckpt", "diff", one, two]) == 0
  assert "0 of 2 arrays are equal" in capsys.readouterr().out
  assert cli.main(["ckpt", "diff", one, one, "--optimizer"]) == 0
  assert "6 of 6 arrays are equal" in capsys.readouterr().out


def test_average_is_loaded_as_any_other(run, tmp_path, capsys):
  out = tmp_path / "mean"
  assert cli.main(["ckpt", "average", f"--workdir={run}", "--steps=3,1", f"--out={out}"]) == 0
  params, step = load_params(out / "checkpoints", abstract_of(make_state(0).params))
  mean = jax.tree.map(lambda x, y: ((np.asarray(x, np.float64) + np.asarray(y, np.float64)) / 2
                                    ).astype(x.dtype), make_state(1).params, make_state(3).params)
  assert step == 3 and same(params, mean) and not same(params, make_state(3).params)
  assert (out / "config.json").read_text() == (run / "config.json").read_text()
  assert tools.verify(out / "checkpoints", 3) is None
  for steps, words in (("1", "two checkpoints"), ("1,9", "of step 9"), ("1,x", "whole numbers")):
    code = cli.main(["ckpt", "average", f"--workdir={run}", f"--steps={steps}", f"--out={out}2"])
    assert code == USAGE and words in capsys.readouterr().err
  with pytest.raises(UsageError, match="holds something already"):
    tools.average(run, [1, 2], out)
  damage(run, 2)
  with pytest.raises(DataError, match="checkpoints/2 is damaged"):
    tools.average(run, [1, 2], tmp_path / "other")
  assert not (tmp_path / "other").exists()


def left(run):
  return [entry.path.name for entry in tools.entries(run / "checkpoints")]


def test_prune(run, capsys, config):
  assert cli.main(["ckpt", "prune", f"--workdir={run}"]) == 0
  assert "would remove 1 directories" in capsys.readouterr().out  # config.train.keep is 2
  assert left(run) == ["1", "2", "3"]
  with Workdir(run, config):
    assert cli.main(["ckpt", "prune", f"--workdir={run}", "--keep=1", "--yes"]) == RETRY
  assert left(run) == ["1", "2", "3"]
  assert cli.main(["ckpt", "prune", f"--workdir={run}", "--keep=1", "--keep-every=2",
                   "--yes"]) == 0
  assert left(run) == ["2", "3"]
  assert cli.main(["ckpt", "prune", f"--workdir={run}", "--keep=0", "--yes"]) == USAGE


def test_prune_keeps_the_newest_sound_one(run):
  for step in (2, 3):
    damage(run, step)
  shutil.copytree(run / "checkpoints" / "3", run / "checkpoints" / "9.corrupt-0")
  gone = tools.prune(run, keep=1, keep_every=0, quarantined=True, really=True)
  assert [entry.path.name for entry in gone] == ["2", "9.corrupt-0"] and left(run) == ["1", "3"]
  damage(run, 1)
  with pytest.raises(DataError, match="nothing is removed"):
    tools.prune(run, keep=1, keep_every=0, quarantined=True, really=True)
  assert left(run) == ["1", "3"]


@pytest.mark.parametrize("size", [64, 300, 2**25])
def test_parameters_in_pieces_are_the_parameters(tmp_path, monkeypatch, size):
  monkeypatch.setattr(pieces, "BYTES", size)
  state = make_state(1)
  params = flatten(jax.device_get(state.params))
  tools.write_run(tmp_path / "alone", "{}", 1, unflatten(
    {path: pieces.of(array) for path, array in params.items()}), {})
  store = Checkpoints(tmp_path / "trained" / "checkpoints", keep=1)
  store.save(1, state, {}, {})
  store.finish(1)
  store.close()
  for name in ("alone", "trained"):
    folder = tmp_path / name / "checkpoints"
    found = tools.open_params(folder, 1)
    assert found.keys() == params.keys()
    assert all(leaf.whole().tobytes() == params[path].tobytes() for path, leaf in found.items())
    kernel = found["tower/kernel"]  # f32[64,8]
    assert size > 2000 or len(list(kernel)) > 1 and kernel.rows < 64
    back, _ = load_params(folder, abstract_of(state.params))
    assert same(back, state.params)
    assert tools.verify(folder, 1) is None
    for file in data_files(folder / "1" / "params"):
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DataError, match="is damaged"):
      tools.open_sound(folder, 1)
