"""An evaluation can be stopped between two of its batches, of whatever kind they are."""

import pytest

from tests.evals.kinds.test_rerank import asked  # noqa: F401 (a model that compares, of noise)
from vlm_jax.configs import base
from vlm_jax.core.errors import Interrupted
from vlm_jax.core.stopping import stoppable
from vlm_jax.evals import embed, likelihood, pairs, run
from vlm_jax.evals.kinds import few_shot
from vlm_jax.generate import answer

ENTRY = dict(source="pictures", split="test", batch=3, controls=())
# Evaluation, and the program that computes one of its batches.
SPEAKS = {
  "look": (answer, "generate"),
  "read": (likelihood, "log_likelihoods"),
  "few": (few_shot, "features"),
}
COMPARES = {"find": (pairs, "_matching"), "rank": (embed, "embeddings"), "pick": (pairs, "scores")}


@pytest.mark.parametrize("name", [*SPEAKS, *COMPARES])
def test_it_stops_behind_the_batch_and_leaves_nothing(
  setup, asked, name, tmp_path, monkeypatch):  # noqa: F811
  config, params = setup if name in SPEAKS else asked
  config = config.copy_and_resolve_references()
  config.evals.few = base.evaluation(kind="few_shot", form="single", shots=(1,), choose="similar",
                                     shots_split="test", limit=3, max_tokens=2, **ENTRY)
  config.evals.rank = base.evaluation(kind="retrieval", **ENTRY)
  config.evals.pick = base.evaluation(kind="choice", form="match", **ENTRY)
  module, program = (SPEAKS | COMPARES)[name]
  compute, batches = getattr(module, program), []
  monkeypatch.setattr(module, program, lambda *args, **options: (
    batches.append(1), compute(*args, **options))[1])

  def check():
    if batches:
      raise Interrupted("enough", 143)

  with pytest.raises(Interrupted, match="enough"), stoppable(check):
    run.evaluate(config, params, tmp_path, names=[name])
  assert len(batches) == 1 and not list(tmp_path.iterdir())
  batches.clear()
  run.evaluate(config, params, tmp_path, names=[name])  # the twin: nobody listens
  assert len(batches) > 1 and list(tmp_path.iterdir())


def test_it_stops_between_two_documents(setup, tmp_path):
  points = []

  def check():
    points.append(1)
    if len(points) == 2:
      raise Interrupted("enough", 143)

  with pytest.raises(Interrupted, match="enough"), stoppable(check):
    run.evaluate(*setup, tmp_path, names=["read"])
  assert not list(tmp_path.iterdir())
