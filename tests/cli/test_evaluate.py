"""`vlm-jax evaluate` on the directory of a real run whose lock another owner holds."""

import json

import jax
import numpy as np
import pytest

from tests.train import tiny_fusion
from vlm_jax.cli import main as cli
from vlm_jax.configs import base
from vlm_jax.evals import run, watch
from vlm_jax.train.loop import train
from vlm_jax.train.workdir import Workdir


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  config = tiny_fusion.get_config()
  config.evals.look = base.evaluation(source="pairs")
  config.train.compilation_cache = str(workdir.parent / "cache")
  train(config, workdir, make_loader=tiny_fusion.Loader)
  return config, workdir


@pytest.fixture
def asked(monkeypatch):
  """What was evaluated: (step, names, entry of the first name, norm of the parameters)."""
  calls = []

  def evaluate(config, params, workdir, *, step, names, split, report):
    leaves = jax.tree.leaves(params)
    norm = float(np.sqrt(sum(float((leaf**2).sum()) for leaf in leaves)))
    calls.append((step, names, config.evals[names[0]].to_dict() if names else None, norm))
    return {"look": {"accuracy": norm}}

  monkeypatch.setattr(run, "evaluate", evaluate)
  monkeypatch.setattr(watch, "evaluate", evaluate)
  return calls


def content(workdir):
  return {str(path): path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def evaluate(workdir, *flags):
  return cli.main(["evaluate", f"--workdir={workdir}", "--allow-outside", *flags])


def test_watching_disturbs_nothing(trained, asked, capsys):
  config, workdir = trained
  with Workdir(workdir, config):  # the training process still has the run
    before = content(workdir)
    assert evaluate(workdir, "--watch", "--poll=0.1", "--json") == 0
  assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"steps": [8, 12]}
  assert [call[0] for call in asked] == [8, 12] and asked[0][3] != asked[1][3] > 0
  after = content(workdir)
  rows = after.pop(str(workdir / "evals.jsonl")).decode().splitlines()
  assert after == before
  assert [json.loads(row) for row in rows] == [
    {"step": step, "eval/look/accuracy": norm} for step, _, _, norm in asked]


def test_a_new_evaluation_has_the_fields_it_was_given(trained, asked):
  assert evaluate(trained[1], "--new", "mine", "kind=pope", "source=pairs", "limit=3",
                  "controls=none,shuffled") == 0
  step, names, entry, _ = asked[0]
  assert (step, names) == (12, ["mine"])
  assert (entry["kind"], entry["source"], entry["limit"]) == ("pope", "pairs", 3)
  assert entry["controls"] == ("none", "shuffled") and entry["split"] == "validation"


@pytest.mark.parametrize("flags", [[], ["--watch"]])
def test_a_run_without_evaluations_is_asked_for_one(trained, flags, tmp_path, capsys):
  frozen = json.loads((trained[1] / "config.json").read_text()) | {"evals": {}}
  (tmp_path / "config.json").write_text(json.dumps(frozen))
  assert evaluate(tmp_path, *flags) == 2
  assert "config.evals is empty; name an evaluation with --new" in capsys.readouterr().err


@pytest.mark.parametrize("flags,sentence", [
  (["--new", "mine", "limt=3"], "--new mine: an evaluation has no field 'limt'; did you mean 'lim"),
  (["--new", "mine", "limit=few"], "--new mine: limit must be a value of type int"),
  (["--new", "mine", "limit"], "'limit' is no FIELD=VALUE"),
  (["--new", "kind=vqa"], "--new needs a name"),
  (["--only=a", "--new", "b"], "use one"),
  (["--until=3"], "belong to --watch"),
  (["--watch", "--step=8"], "leave --step out"),
  (["--watch", "--until=13"], "the run ends at step 12"),
  (["--watch", "--poll=0"], "--poll is 0.0"),
])
def test_flags_that_do_not_go_together(trained, flags, sentence, capsys):
  assert evaluate(trained[1], *flags) == 2
  assert sentence in capsys.readouterr().err
