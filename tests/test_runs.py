"""The frozen config of an older version: what is filled in, what is said, and what is refused."""

import json

import pytest

from tests.train import tiny_fusion
from vlm_jax import runs
from vlm_jax.cli import main as cli
from vlm_jax.configs import base
from vlm_jax.core.errors import UsageError
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
