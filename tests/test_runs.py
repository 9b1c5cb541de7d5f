"""The frozen config of an older version: what is filled in, what is said, and what is refused."""

import json

import pytest

from tests.train import tiny_fusion
from vlm_jax import runs
from vlm_jax.cli import main as cli
from vlm_jax.configs import base
from vlm_jax.configs.older import fill
from vlm_jax.core.errors import UsageError
from vlm_jax.train import loop
from vlm_jax.train.workdir import Workdir


@pytest.fixture
def run(tmp_path):
  config = tiny_fusion.get_config()
  config.evals.look = base.evaluation(source="pairs", limit=7)
  Workdir(tmp_path, config).close()
  return tmp_path


def older(run, *fields):
  """Takes fields out of the config.json of a run."""
  path = run / "config.json"
  config = json.loads(path.read_text())
  for field in fields:
    *groups, name = field.split(".")
    node = config
    for group in groups:
      node = node[group]
    del node[name]
  path.write_text(json.dumps(config))


def test_a_complete_config_is_left_alone(run, capsys):
  assert runs.frozen(run).evals.look.limit == 7
  assert capsys.readouterr().err == ""


def test_fields_that_do_not_decide_the_model_are_filled_and_said(run, capsys):
  whole = runs.frozen(run)
  older(run, "data.decode", "train.keep_every", "evals.look.options", "data.sources.pairs.held_out",
        "llm.unroll", "tower.remat", "mesh.fsdp")
  found = runs.frozen(run)
  assert found.to_dict() == whole.to_dict() | {"outside": found.outside}
  said = capsys.readouterr().err.strip().splitlines()
  assert len(said) == 1 and "config.json is of an older version; from configs/base.py" in said[0]
  for words in ("data.decode", "train.keep_every=0", "evals.look.options='text'",
                "data.sources.pairs.held_out=0.0", "llm.unroll=1", "tower.remat='none'",
                "mesh.fsdp=1"):
    assert words in said[0], words


@pytest.mark.parametrize("field", ["llm.positions", "tower.class_token", "connector.name",
                                   "fusion.image_attention", "precision.compute"])
def test_fields_that_decide_the_model_are_never_guessed(run, field, capsys):
  older(run, field, "train.keep_every")
  with pytest.raises(UsageError, match=f"config.json has no config.{field}, which decides"):
    runs.frozen(run)
  assert cli.main(["evaluate", f"--workdir={run}", "--allow-outside"]) == 2
  assert f"config.{field}" in capsys.readouterr().err


LATER = ("bridge", "connector.width", "connector.latents", "connector.depth", "fusion.new_tokens",
         "fusion.pooling", "llm.cross", "tower.read_class")


def test_what_models_of_before_the_bridge_could_not_have_is_filled(run, capsys):
  whole = runs.frozen(run)
  older(run, *LATER)
  found = runs.frozen(run)
  assert found.to_dict() == whole.to_dict() | {"outside": found.outside}
  said = capsys.readouterr().err
  assert all(field in said for field in LATER)
  older(run, "connector.factor")  # that one there was
  with pytest.raises(UsageError, match="config.json has no config.connector.factor"):
    runs.frozen(run)


def test_what_no_model_had_before_it_could_be_said_is_filled(run, capsys):
  whole = runs.frozen(run)
  older(run, "connector.frames")
  found = runs.frozen(run)
  assert found.to_dict() == whole.to_dict() | {"outside": found.outside}
  assert "connector.frames=0" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["connector.latents", "fusion.new_tokens"])
def test_with_a_bridge_they_are_not_guessed_either(run, field):
  older(run, field)
  with pytest.raises(UsageError, match=f"config.json has no config.{field}, which decides"):
    runs.frozen(run)


def test_a_flamingo_has_a_bridge(tmp_path):
  config = tiny_fusion.get_config()
  config.fusion.name = "flamingo"
  Workdir(tmp_path, config).close()
  older(tmp_path, "bridge")
  with pytest.raises(UsageError, match="config.json has no config.bridge, which decides"):
    runs.frozen(tmp_path)


def test_the_report_of_an_older_run_is_written(run):
  older(run, "data.decode", "optim.groups")
  assert cli.main(["report", f"--workdir={run}", "--allow-outside"]) == 0


ADDED = ("evals.look.rerank", "data.sources.pairs.held_out", "data.decode", "train.keep_every",
         "llm.unroll")


@pytest.fixture
def begun(run):
  """The run of an older version, with a step behind it."""
  (run / "metrics.jsonl").write_text('{"step": 1}\n')
  older(run, *ADDED)
  return run


def config_of(**fields):
  """The recipe of the run as it is now, with changes by flat names: evals__look__rerank=3."""
  config = tiny_fusion.get_config()
  config.evals.look = base.evaluation(source="pairs", limit=7)
  for field, value in fields.items():
    *groups, name = field.split("__")
    node = config
    for group in groups:
      node = node[group]
    node[name] = value
  return config


def test_an_older_run_is_continued_where_new_fields_stand_at_their_defaults(begun):
  before = (begun / "config.json").read_text()
  Workdir(begun, config_of(), fill).close()
  Workdir(begun, config_of(data__workers=2), fill).close()  # as in any run, that may change
  assert (begun / "config.json").read_text() == before
  with pytest.raises(UsageError, match="another config"):  # twin: nobody fills
    Workdir(begun, config_of())


@pytest.mark.parametrize("change,sentence", [
  (dict(evals__look__rerank=128), r"differs in evals.look.rerank \(0 -> 128\);"),
  (dict(data__decode__draft=2), r"differs in data.decode.draft \(0 -> 2\);"),
  (dict(llm__unroll=4), r"differs in llm.unroll \(1 -> 4\);"),
  (dict(evals__look__limit=8), r"differs in evals.look.limit \(7 -> 8\);"),
  (dict(optim__lr=0.5, data__sources__pairs__held_out=0.1),
   r"differs in data.sources.pairs.held_out \(0.0 -> 0.1\), optim.lr \(0.01 -> 0.5\);"),
  (dict(evals__more=base.evaluation(source="pairs")), "differs in evals.more.batch .'absent'"),
])
def test_an_older_run_is_not_continued_by_another_config(begun, change, sentence):
  with pytest.raises(UsageError, match=sentence):
    Workdir(begun, config_of(**change), fill)


def test_what_decides_the_model_is_not_guessed_to_continue_either(begun):
  older(begun, "llm.positions")
  with pytest.raises(UsageError, match="config.json has no config.llm.positions, which decides"):
    Workdir(begun, config_of(), fill)


def test_the_command_continues_an_older_run(begun, monkeypatch, capsys):
  monkeypatch.setattr(loop, "train", lambda config, workdir, *, evaluate, fill: Workdir(
    workdir, config, fill).close())
  assert cli.main(["train", f"--workdir={begun}"]) == 0
  assert "evals.look.rerank=0" in capsys.readouterr().err
  assert cli.main(["train", f"--workdir={begun}", "--config.evals.look.rerank=128"]) == 2
  assert "differs in evals.look.rerank (0 -> 128)" in capsys.readouterr().err
