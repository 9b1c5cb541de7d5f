"""GridQA: the recipe's variants see the same documents, and the shortest pair keeps its bands."""

import json

import pytest

from benchmarks import gridqa as benchmark
from vlm_jax import recipes
from vlm_jax.configs.gridqa import BANDS
from vlm_jax.core.fusion import find_fusion
from vlm_jax.data import pipeline, prepare
from vlm_jax.data.sources import gridqa

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
    if ",".join(arg.split(",")[1:]) != task:
      continue
    config = recipes.load(f"configs/gridqa.py:{arg}")
    config.data.root, config.data.prefetch = root, 0
    loader = pipeline.make(config)
    infos = [next(loader)[1] for _ in range(2)]
    assert not any(info["bad"] for info in infos)
    seen.add(tuple(info["documents"]["gridqa"] for info in infos))
  assert seen == {(24, 24) if task else (16, 16)}


def test_bands_are_of_variants_that_exist_and_numbers_that_are_measured(root):
  for arg, bands in BANDS.items():
    config = recipes.load(f"configs/gridqa.py:{arg}")
    assert len(find_fusion(config).rows(config)) in (1, 4, 8, 16)
    assert config.fusion.name in ("concat", "blip2", "flamingo")
    for name, (low, high) in bands.items():
      control, _, number = name.rpartition("/")
      assert 0 <= low < high <= 1 and number.startswith("accuracy")
      assert not control or control in config.evals.gridqa.controls
  # A blind guess is outside every band that starts above it.
  assert {arg for arg, bands in BANDS.items() if bands.get("accuracy", (0,))[0] > 0.25} == {
    "concat4", "resampler4", "resampler8", "full16", "flamingo", "full16,interleaved",
    "flamingo,interleaved"}


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


def test_every_cell_a_token_is_read_and_no_picture_is_chance(root, capsys):
  missed = benchmark.main([f"--steps={STEPS}", f"--data={root}"])
  printed = capsys.readouterr().out
  print(printed)
  assert missed == 0 and '"outside": []' in printed
  # Twin: a picture that nobody sees does not reach the band of one that is seen.
  low, _ = BANDS["full16"]["accuracy"]
  assert BANDS["blind"]["accuracy"][1] < low
