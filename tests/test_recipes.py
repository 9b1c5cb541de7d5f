"""The recipes of published systems are whole models of the sizes that they name."""

import math
import re

import numpy as np
import pytest

from vlm_jax import recipes
from vlm_jax.configs import base
from vlm_jax.connectors import qformer
from vlm_jax.convert import llava, processor, systems
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.data import images
from vlm_jax.train import state as states
from vlm_jax.train.optimizer import make_optimizer


def moved(config) -> set[str]:
  """The modules of which something trains."""
  module = find_fusion(config)
  _, leaves = states.initializer(module, config)
  return {path.split("/")[0] for path in make_optimizer(config, module.STAGES, leaves).trainable}


@pytest.mark.parametrize("words, trains, rate, rows, steps", [
  ("pretrain", {"connector"}, 1e-3, 256, 2180),
  ("finetune,7b", {"connector", "llm"}, 2e-5, 128, 5197),
])
def test_stages_of_llava_1_5(words, trains, rate, rows, steps):
  config = recipes.load(f"configs/llava_1_5.py:{words}")
  assert moved(config) == trains
  assert (config.optim.lr, config.data.rows, config.train.steps) == (rate, rows, steps)
  assert len(find_fusion(config).rows(config)) == 576
  assert config.optim.warmup == round(0.03 * steps) and config.optim.weight_decay == 0


@pytest.mark.parametrize("name", ["llava_1_5", "llava_next"])
def test_llavas_are_whole_models_and_can_be_written(name):
  config = recipes.load(f"configs/{name}.py")
  # 7,063,427,072 with 64 rows more of embedding and head each, and a last norm that nothing reads.
  total = sum(map(math.prod, systems.shapes(config).values()))
  newline = config.llm.width if name == "llava_next" else 0
  assert total == 7_063_427_072 - 2 * 1024 - 2 * 64 * 4096 + newline
  theirs, pixels = llava.write_config(config, 31_999), processor.write(config)
  assert theirs["model_type"] == ("llava_next" if newline else "llava")
  again = llava.read_config(theirs, base.get_config())
  tower, decode = processor.read(pixels)
  again.tower.update(tower)
  again.data.decode.update(decode)
  same = ("name", "width", "depth", "mlp", "heads", "image_size", "feature_layer", "mean")
  assert all(again.tower[field] == config.tower[field] for field in same)
  assert again.data.decode.to_dict() == config.data.decode.to_dict()


def test_llava_next_sees_tiles_when_it_is_finetuned():
  config = recipes.load("configs/llava_next.py")
  assert moved(config) == {"connector", "llm", "newline", "tower"}
  assert config.optim.groups == (("tower", 0.1),)
  pixels = np.zeros((480, 640, 3), np.uint8)
  picture = images.picture(pixels, config.tower.image_size, images.decoding(config))
  assert len(picture.squares) == config.data.images == 5
  assert len(find_fusion(config).order(config, picture)) == 2340 < config.data.tokens
  first = recipes.load("configs/llava_next.py:pretrain")
  assert moved(first) == {"connector", "newline"} and not first.data.decode.grids


@pytest.mark.parametrize("name", ["llava_1_5", "llava_next"])
def test_words(name):
  with pytest.raises(UsageError, match="no argument '7bb'; did you mean '7b'"):
    recipes.load(f"configs/{name}.py:7bb")
  with pytest.raises(UsageError, match="asks for pretrain and finetune; use one"):
    recipes.load(f"configs/{name}.py:pretrain,finetune")
  for words in ("debug", "13b", "debug,pretrain"):
    config = recipes.load(f"configs/{name}.py:{words}")
    assert config.train.steps == 50 or "debug" not in words


@pytest.mark.parametrize("words, name, queries, words_read", [
  ("opt-2.7b", "blip2", 105_162_240, 0),
  ("flan-xl", "blip2_t5", 105_162_240, 0),
  ("align", "blip2_qformer", 105_162_240, 80_522_496),
])
def test_blip2_trains_its_bridge_of_the_published_size(words, name, queries, words_read):
  """105.2M parameters read pictures, 185.7M with words (12 layers, both MLPs, the embedding)."""
  config = recipes.load(f"configs/blip2.py:{words}")
  assert config.fusion.name == name and config.connector.latents == 32
  moves = {"connector", "tower"} | ({"caption", "match", "temperature", "image_projection",
                                     "text_projection"} if words_read else set())
  assert moved(config) == moves
  shapes = systems.shapes(config)
  count = lambda node: sum(math.prod(shape) for path, shape in shapes.items()
                           if path.startswith(f"connector/{node}"))
  assert count("") - count("project") == queries + words_read
  own = [path for path in shapes if path.startswith("connector/") and any(
    re.fullmatch(pattern, path.removeprefix("connector/")) for pattern in qformer.STAGED)]
  assert bool(words_read) == ("connector/words" in own) != ("connector/project/bias" in own)
  assert config.tower.depth == 39


@pytest.mark.parametrize("member, name, rows", [
  ("vicuna-7b", "instructblip", 16), ("flan-xxl", "instructblip_t5", 8)])
def test_instructblip_trains_a_q_former_that_reads(member, name, rows):
  config = recipes.load(f"configs/instructblip.py:{member}")
  assert config.fusion.name == name and config.data.rows == rows and config.tower.depth == 39
  assert moved(config) == {"connector", "tower"}  # of the tower the norm behind it
  sizes = {path.removeprefix("connector/"): math.prod(shape)
           for path, shape in systems.shapes(config).items() if path.startswith("connector/")}
  project = sizes.pop("project/kernel") + sizes.pop("project/bias")
  assert sum(sizes.values()) == 105_162_240 + 80_522_496 and project == 769 * config.llm.width
  ratios = [config.data.sources[source].ratio for source in ("vqav2", "llava")]
  np.testing.assert_allclose(ratios[0] / ratios[1], (443_757 / 150_000) ** 0.5, rtol=0.05)
  debug = recipes.load(f"configs/instructblip.py:debug,{member}")
  assert debug.fusion.name == name and list(debug.evals) == ["easy_vqa"]


def test_blip2_of_small_pieces_is_llavas_with_another_connector():
  for stage, moves in (("connector", {"connector"}), ("lora", {"connector", "llm"})):
    ours = recipes.load(f"configs/blip2_smollm2.py:{stage}")
    theirs = recipes.load(f"configs/llava_smollm2.py:{stage}")
    assert moved(ours) == moves and len(find_fusion(ours).rows(ours)) == 4
    for node in ("tower", "llm", "data", "optim", "train", "lora", "evals"):
      assert ours[node].to_json() == theirs[node].to_json()


def test_flamingo_trains_its_bridge():
  config = recipes.load("configs/flamingo.py")
  assert moved(config) == {"bridge", "connector", "new_embed"}
  shapes = systems.shapes(config)
  # Eight of 32 layers: OpenFlamingo-9B's.
  assert shapes["bridge/attention/query/kernel"] == (8, 4096, 8, 64)
  assert shapes["bridge/attention/key/kernel"] == (8, 1024, 8, 64)
  assert shapes["bridge/mlp/up/kernel"] == (8, 4096, 16384)
  assert shapes["connector/latents"] == (64, 1024)
  assert len(find_fusion(config).rows(config)) == 64
  weights = {name: source.weight for name, source in config.data.sources.items()}
  assert weights == {"pages": 1.0, "captions": 0.2}
  debug = recipes.load("configs/flamingo.py:debug")
  assert moved(debug) == {"bridge", "connector", "llm", "new_embed", "tower"}


def test_the_small_flamingo_has_the_pieces_and_steps_of_the_small_llava():
  config = recipes.load("configs/flamingo_smollm2.py")
  stages = [recipes.load(f"configs/llava_smollm2.py:{stage}") for stage in ("connector", "lora")]
  llava = stages[1]
  for node in ("tower", "llm", "data", "weights", "evals"):
    assert config[node].to_dict() == llava[node].to_dict(), node
  assert config.train.steps == sum(stage.train.steps for stage in stages)
  assert moved(config) == {"bridge", "connector", "new_embed"}
  assert systems.shapes(config)["bridge/attention_gate"] == (5, 1)
  debug = recipes.load("configs/flamingo_smollm2.py:debug")
  assert not debug.weights and systems.shapes(debug)["bridge/mlp_gate"] == (1, 1)
