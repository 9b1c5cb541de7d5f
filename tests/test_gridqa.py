"""GridQA: the recipe's variants see the same documents, and the shortest pair keeps its bands."""

import json

import numpy as np
import pytest

import vlm_jax
from benchmarks import gridqa as benchmark
from vlm_jax import recipes
from vlm_jax.configs.gridqa import BANDS, OBJECTIVES
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_fusion, speaking
from vlm_jax.core.layout import TOLD
from vlm_jax.data import pipeline, prepare
from vlm_jax.data.sources import gridqa
from vlm_jax.evals import run as evals
from vlm_jax.train.loop import train

STEPS = 320  # full16 begins to answer at about 120


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """Prepared data: as many grids as the training below reads."""
  path = str(tmp_path_factory.mktemp("data"))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(gridqa, "RECORDS", {"train": 16 * STEPS, "validation": 10, "test": 200})
    prepare.prepare(path, ["gridqa"], recipes.load("configs/gridqa.py").llm.vocab_size,
                    log=lambda line: None)
  return path


@pytest.mark.parametrize("task", ["", "interleaved"])
def test_all_variants_see_the_same_documents(root, task):
  seen = set()
  for arg in BANDS:
    if ",".join(arg.split(",")[1:]) != task or arg in (*OBJECTIVES, "instructed1"):
      continue
    config = recipes.load(f"configs/gridqa.py:{arg}")
    config.data.root, config.data.prefetch = root, 0
    loader = pipeline.make(config)
    infos = [next(loader)[1] for _ in range(2)]
    assert not any(info["bad"] for info in infos)
    seen.add(tuple(tuple(info["documents"].values()) for info in infos))
  assert seen == {((16, 4), (16, 4)) if task else ((16,), (16,))}


def test_bands_are_of_variants_that_exist_and_numbers_that_are_measured(root):
  for arg, bands in BANDS.items():
    config = recipes.load(f"configs/gridqa.py:{arg}")
    spoken = speaking(config)
    assert len(find_fusion(spoken).rows(spoken)) in (1, 4, 8, 16)
    assert config.fusion.name in (
      "concat", "blip2", "instructblip", "flamingo", "blip2_qformer", "coca")
    for name, (low, high) in bands.items():
      *control, number = name.split("/")
      asked = control.pop(0) if control and control[0] in config.evals else "gridqa"
      kind = config.evals[asked].kind
      main = "text_to_image@1" if kind == "retrieval" else "accuracy"
      assert 0 <= low < high <= 1 and number.startswith(main)
      assert set(control) <= set(config.evals[asked].controls)
  # A blind guess is outside every band that starts above it.
  assert {arg for arg, bands in BANDS.items() if bands.get("accuracy", (0,))[0] > 0.25} == {
    "concat4", "resampler4", "resampler8", "full16", "full16,interleaved",
    "flamingo,interleaved", "instructed1", *OBJECTIVES}


def test_a_query_is_told_the_question_of_its_picture(root):
  """As many questions in a step as the other variants answer; the last picture's is its own."""
  config = recipes.load("configs/gridqa.py:instructed1")
  config.data.root, config.data.prefetch = root, 0
  flat, info = next(pipeline.make(config))
  assert info["documents"] == {"gridqa": 256} and not any(info["bad"].values())
  told, tokens = flat[TOLD][..., 0], flat["streams/text/tokens"].reshape(4, 64, 6)
  np.testing.assert_array_equal(told, tokens[:, :, 2])  # picture, mark, place, mark, colour, end
  assert len(np.unique(told)) == 16


def test_what_compares_sees_hard_negatives_in_every_step(root):
  """Half of the captions of a step differ from another in one cell, whoever compares them."""
  seen = []
  for arg in OBJECTIVES:
    config = recipes.load(f"configs/gridqa.py:{arg}")
    config.data.root, config.data.prefetch = root, 0
    flat, info = next(pipeline.make(config))
    assert info["documents"] == {"gridqa": 32} and not any(info["bad"].values())
    seen.append(sorted(flat["media/images/values"].reshape(32, -1).tolist()))
    grids = np.unique(np.array(seen[-1]).reshape(32, 4, 4, 4, 4, 3)[:, :, 0, :, 0], axis=0)
    changed = (grids[:, None] != grids).any(-1).sum((2, 3))
    assert ((changed == 1).sum(1) >= 1).all()
  assert seen[0] == seen[1]
  with pytest.raises(UsageError, match="'coca,binding' asks 'coca'.*leave that out"):
    recipes.load("configs/gridqa.py:coca,binding")


def test_a_row_that_is_in_the_file_is_not_trained_again(tmp_path, monkeypatch, capsys):
  trained = []

  def one(config, bands):
    trained.append(config.seed)
    low, high = bands["accuracy"]
    return {"numbers": {"accuracy": {"value": high, "interval": [high, high], "band": [low, high],
                                     "inside": config.seed == 0}},
            "tokens": 1, "seconds": 2.0, "steps": 3}

  monkeypatch.setattr(benchmark, "one", one)
  out = f"--out={tmp_path / 'rows.jsonl'}"
  assert benchmark.main(["mean", out]) == 0 and trained == [0]
  assert benchmark.main(["blind", "mean", out]) == 0 and trained == [0, 0]
  first, second = (tmp_path / "rows.jsonl").read_text().splitlines()
  assert json.loads(first)["argument"] == "mean" and json.loads(second)["argument"] == "blind"
  # Another recipe is another row, and what is outside its band is said.
  assert benchmark.main(["mean", out, "--seed=1"]) == 1 and trained == [0, 0, 1]
  assert benchmark.main(["mean", out, "--split=validation"]) == 0 and trained == [0, 0, 1, 0]
  assert '"outside": ["mean accuracy"]' in capsys.readouterr().out


def test_jobs_share_the_cores_and_the_file(tmp_path, monkeypatch, capsys):
  trained, shares = [], []

  def one(config, bands):
    trained.append(config.data.sources.gridqa.images)
    return {"numbers": {}, "tokens": 1, "seconds": 2.0, "steps": 3}

  def run(command, **_):
    assert command[:2] == ["taskset", "--cpu-list"] and command[4].endswith("gridqa.py")
    shares.append(set(command[2].split(",")))
    benchmark.main(command[5:])

  monkeypatch.setattr(benchmark, "one", one)
  monkeypatch.setattr(benchmark.subprocess, "run", run)
  monkeypatch.setattr(benchmark.os, "sched_getaffinity", lambda pid: {0, 1, 2})
  out = f"--out={tmp_path / 'rows.jsonl'}"
  assert benchmark.main(["mean", "blind", out, "--jobs=2"]) == 0
  assert sorted(trained) == ["none", "real"]  # each once: the rest is read from the file
  assert {frozenset(share) for share in shares} <= {frozenset("02"), frozenset("1")}
  with pytest.raises(SystemExit, match="2"):
    benchmark.main(["mean", "--jobs=2"])
  assert "--jobs needs --out=FILE" in capsys.readouterr().err
  # What failed is trained by the caller, which says why.
  monkeypatch.setattr(benchmark.subprocess, "run", lambda command, **_: None)
  assert benchmark.main(["mean", out, "--seed=1", "--jobs=2"]) == 0 and len(trained) == 3


def test_every_cell_a_token_is_read_and_no_picture_is_chance(root, capsys, optimized):
  missed = benchmark.main([f"--steps={STEPS}", f"--data={root}"])
  printed = capsys.readouterr().out
  print(printed)
  assert missed == 0 and '"outside": []' in printed
  # Twin: a picture that nobody sees does not reach the band of one that is seen.
  low, _ = BANDS["full16"]["accuracy"]
  assert BANDS["blind"]["accuracy"][1] < low


@pytest.mark.long
@pytest.mark.parametrize("arg", OBJECTIVES)
def test_all_that_bands_name_is_measured(root, arg, tmp_path):
  config = recipes.load(f"configs/gridqa.py:{arg},debug")
  config.data.root = root
  row = train(config.lock(), tmp_path, evaluate=evals.in_loop(config, tmp_path))
  found = benchmark.numbers(config, row, BANDS[arg])
  assert found.keys() >= BANDS[arg].keys()
  for name, number in found.items():
    (low, high), value = number["interval"], number["value"]
    assert 0 <= low <= value <= high <= 1 and number["band"] == BANDS[arg].get(name)


def test_the_first_stage_is_asked_for_captions(root):
  bundle = vlm_jax.load("configs/gridqa.py:blip2,debug", root=root)
  found = evals.evaluate(bundle.config, bundle.params, None, names=["say"])["say"]
  assert found["kind"] == "vqa" and found["questions"] == 8 == found["controls"]["shuffled"][
    "questions"]
  assert bundle.config.fusion.name == "blip2_qformer"
