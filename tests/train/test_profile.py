"""Traces of some steps, in which every operation says what it belongs to."""

import re

import jax
import pytest

from tests.generate.helpers import tiny
from tests.train import tiny_fusion
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.mesh import make_mesh
from vlm_jax.train import loop
from vlm_jax.train import profile as profiles
from vlm_jax.train import state as state_lib
from vlm_jax.train.optimizer import make_optimizer
from vlm_jax.train.step import make_step

SCOPES = ("tower", "connector", "llm", "loss", "optimizer")


def test_every_scope_is_in_the_program():
  config = tiny()
  config.data.update(rows=1, tokens=32, images=1)
  mesh, module = make_mesh(config, jax.devices()[:1]), find_fusion(config)
  _, leaves = state_lib.initializer(module, config)
  optimizer = make_optimizer(config, module.STAGES, leaves)
  abstract = state_lib.abstract_state(leaves, optimizer.init, mesh)
  shapes = state_lib.abstract_batch(module, config, mesh)
  with jax.set_mesh(mesh):
    lowered = make_step(config, module, optimizer, mesh, abstract).lower(abstract, shapes)
  # Unoptimised HLO: what it names, the compiled program names too, and it costs no compilation.
  names = re.findall(r'op_name="([^"]*)"', lowered.as_text(dialect="hlo", debug_info=True))
  parts = [set(re.split(r"[/()]", name)) for name in names]
  for scope in SCOPES:
    mine = [name for name, part in zip(names, parts, strict=True) if scope in part]
    assert len(mine) > 5, scope
  backward = [name for name in names if "transpose" in name]
  assert any("/tower/" in name for name in backward) and any("loss" in name for name in backward)
  assert not any("optimizer" in part and "llm" in part for part in parts)


def test_the_trace_has_the_steps_of_the_span(config, tmp_path):
  config.profile = "steps:2-3"
  config.train.steps = 5
  calls = []
  start, stop = jax.profiler.start_trace, jax.profiler.stop_trace
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax.profiler, "start_trace", lambda *a: calls.append("start") or start(*a))
    patch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop") or stop())
    loop.train(config, tmp_path, make_loader=tiny_fusion.Loader)
  assert calls == ["start", "stop"]
  (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
  space = jax.profiler.ProfileData.from_file(str(trace))
  steps = {dict(event.stats).get("step_num") for plane in space.planes for line in plane.lines
           for event in line.events if event.name == "train"}
  assert steps == {2, 3}


def test_a_trace_that_is_cut_off_is_closed(tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append("start"))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
  profile = profiles.Profile("steps:4-9", tmp_path)
  for step in (6, 7):  # a run that goes on inside the span
    profile.before(step, None)
    profile.after(step, None)
  profile.close()
  profile.close()
  assert calls == ["start", "stop"]


@pytest.mark.parametrize("spec", ["10-15", "steps:5-4", "steps:0-3", "steps:3", "steps:a-b"])
def test_wrong_spans(spec, config, tmp_path):
  config.profile = spec
  with pytest.raises(UsageError, match="write steps:FIRST-LAST"):
    loop.train(config, tmp_path / "run", make_loader=tiny_fusion.Loader)
  assert not (tmp_path / "run").exists()
