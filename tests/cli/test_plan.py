"""The plan's numbers against parameters that are really made, and against counting by hand."""

import json
import math

import pytest

from vlm_jax import recipes
from vlm_jax.cli import main as cli
from vlm_jax.cli import plan
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.ops import attention
from vlm_jax.train import state as states


@pytest.fixture(scope="module", params=["quickstart", "llava"])
def config(request, tmp_path_factory):
  config = recipes.load(f"configs/{request.param}.py:debug")
  config.data.root = str(tmp_path_factory.mktemp("none"))
  config.fusion.stage = "all"
  return config


def test_parameters_and_shapes(config):
  made = plan.make(config)
  total = made["modules"].pop("total")
  count = sum(row["parameters"] for row in made["modules"].values())
  assert total["parameters"] == count
  llm = config.llm
  width = llm.width // llm.heads
  attention = llm.width * width * (2 * llm.heads + 2 * llm.kv_heads)
  layer = attention + 3 * llm.width * llm.mlp + 2 * llm.width  # and SwiGLU, and two norms
  assert made["modules"]["llm/layers"]["parameters"] == llm.depth * layer
  assert made["modules"]["llm/embed"]["parameters"] == llm.vocab_size * llm.width
  assert total["bytes"] == 4 * (count + 2 * total["trainable"]), "f32, AdamW"
  rows = config.data.rows
  assert made["batch"]["streams/text/tokens"] == ["int32", [rows, config.data.tokens]]
  assert set(made["batch"]) == set(find_fusion(config).fields(config))


def test_both_sides_of_an_encoder_decoder(tmp_path):
  config = recipes.load("configs/simvlm.py:debug")
  config.data.root = str(tmp_path)
  made = plan.make(config)
  width, depth, mlp = config.llm.width, config.llm.depth, config.llm.mlp
  attention = 4 * width * width + 4 * width  # four projections with biases
  layer = attention + 2 * width * mlp + mlp + width + 4 * width  # and two norms
  modules = made["modules"]
  assert modules["llm/encoder"]["parameters"] == depth * layer + 2 * width + (
    config.llm.positions * width)
  more = depth * (attention + 2 * width)
  assert modules["llm/decoder"]["parameters"] == modules["llm/encoder"]["parameters"] + more
  rows = plan.kernels(config)
  assert set(rows) == {"encoder", "decoder", "cross"}
  assert rows["encoder"]["implementation"] == "xla", "also with the bias of its images"
  cross = rows["cross"]
  assert (cross["length"], cross["keys"]) == (config.data.decoder_tokens, config.data.tokens)


def test_videos_are_told(tmp_path):
  config = recipes.load("configs/flamingo.py:debug")
  config.data.root = str(tmp_path)
  config.data.frames = config.connector.frames = 5
  made = plan.make(config)
  assert made["batch"]["media/images/time"] == ["int32", [config.data.rows, config.data.images]]
  assert made["modules"]["connector/time"]["parameters"] == 5 * config.connector.width
  assert "an image or a video of up to 5 frames takes 4 slots" in plan.render(made)
  config = recipes.load("configs/llava.py:debug")  # which has no videos, whatever is asked for
  config.data.root, config.data.frames = str(tmp_path), 5
  assert not plan.make(config)["frames"]


@pytest.mark.parametrize("name, millions", [("base", 252), ("large", 768), ("huge", 1556)])
def test_the_published_sizes_are_whole_models(name, millions):
  config = recipes.load(f"configs/simvlm.py:{name}")
  module = find_fusion(config)
  _, leaves = states.initializer(module, config)
  total = sum(math.prod(leaf.shape) for leaf in leaves.values())
  assert round(total / 1e6) == millions
  # 224 pixels are 196 slots, and the ratio of image-text documents to texts is 4096 to 512.
  assert len(module.rows(config)) == 196
  sources = config.data.sources
  assert (sources.captions.ratio + sources.easy_vqa.ratio) * 512 == 4096 * sources.pydoc.ratio


def test_a_size_that_nobody_published():
  with pytest.raises(UsageError, match="no argument 'hug'; did you mean 'huge'"):
    recipes.load("configs/simvlm.py:hug")


def test_frozen_parameters_have_no_moments(config):
  before = plan.make(config)["modules"]["total"]
  with config.unlocked():
    config.optim.frozen = ("tower/.*",)
  after = plan.make(config)["modules"]
  config.optim.frozen = ()
  tower = sum(row["parameters"] for name, row in after.items() if name.startswith("tower/"))
  assert tower and before["trainable"] - after["total"]["trainable"] == tower
  assert before["bytes"] - after["total"]["bytes"] == 2 * 4 * tower


def test_kernels_say_why_not(config):
  rows = plan.kernels(config)
  assert rows["text"]["length"] == rows["text"]["keys"] == config.data.tokens
  assert set(rows) == {"text", "tower"}
  for row in rows.values():
    assert row["implementation"] not in row["refused"]
    assert all(reason for reason in row["refused"].values())
  with config.unlocked():
    config.attention.implementation = "dense"
  assert plan.kernels(config)["text"]["implementation"] == "dense"
  config.attention.implementation = "auto"


@pytest.mark.parametrize("recipe, classes", [("quickstart", True), ("llava_1_5", False)])
def test_kernels_are_asked_for_what_the_model_needs(recipe, classes, monkeypatch):
  """Classes where the layout writes them; the soft-cap of the language model, not of the tower."""
  asked, choose = [], attention.choose
  monkeypatch.setattr(attention, "choose", lambda request, name: (
    asked.append(request), choose(request, name))[1])
  config = recipes.load(f"configs/{recipe}.py:debug")
  with config.unlocked():
    config.llm.attention_soft_cap = 50.0
  assert list(plan.kernels(config)) == ["text", "tower"]
  text, tower = asked
  assert (text.has_classes, text.soft_cap) == (classes, 50.0)
  assert (tower.has_classes, tower.soft_cap) == (False, None)


def test_without_data_it_says_how_to_get_it(capsys, tmp_path):
  argv = ["plan", "--config=configs/quickstart.py:debug", f"--config.data.root={tmp_path}"]
  assert cli.main(argv) == 0
  text = capsys.readouterr().out
  assert "vlm-jax data prepare" in text and "llm/layers" in text and "FLOPs of a step" in text
  assert cli.main([*argv, "--json"]) == 0
  assert json.loads(capsys.readouterr().out)["flops"]["dense"] > 0
