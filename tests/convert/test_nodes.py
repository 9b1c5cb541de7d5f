"""Modules found by model_type, and checkpoints of one module alone."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import numpy as np
import pytest
import torch
import transformers

from vlm_jax.configs import base
from vlm_jax.convert import nodes, safetensors_io
from vlm_jax.core.errors import DataError, UsageError

transformers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("floor", ["llm", "towers"])
def test_published_modules_have_what_the_seam_needs(floor):
  found = nodes.modules(floor)
  assert set(found) >= {"llm": {"llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text",
                                "opt", "t5"},
                        "towers": {"clip_vision_model", "siglip_vision_model"}}[floor]
  config = base.get_config()
  node = {"llm": config.llm, "towers": config.tower}[floor]
  for kind, module in found.items():
    assert module.KEYS
    fields = nodes.read({"model_type": kind}, floor)
    node.update(fields)  # every field is one of configs/base.py, of its type
    theirs = nodes.write(node, floor)
    # One module by two names; the converter of the whole system knows which it is.
    other = {"siglip2_text_model": "siglip_text_model",
             "instructblip_vision_model": "blip_2_vision_model"}
    assert theirs["model_type"] == other.get(kind, kind)
    assert nodes.read(theirs, floor) == fields


def test_what_nobody_published_is_refused():
  with pytest.raises(UsageError, match="model_type is 'gema', .*did you mean 'gemma'"):
    nodes.read({"model_type": "gema"}, "llm")
  with pytest.raises(UsageError, match="model_type is '', which is no module of vlm_jax/towers"):
    nodes.read({}, "towers")
  config = base.get_config()
  config.llm.name = "encoder_decoder"
  with pytest.raises(UsageError, match="'encoder_decoder' .*these can be written: gemma, llama"):
    nodes.write(config.llm, "llm")


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
  """A tiny CLIPVisionModel, and where it was saved."""
  torch.manual_seed(0)
  model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
    hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3, patch_size=5,
    image_size=10))
  with torch.no_grad():
    for weight in model.parameters():
      weight.normal_(0, 0.1)
  directory = tmp_path_factory.mktemp("tower") / "theirs"
  model.save_pretrained(directory)
  return model, directory


def test_a_tower_alone_there_and_back(tower, tmp_path):
  model, directory = tower
  fields, params = nodes.read_node(directory, "towers")
  config = base.get_config()
  config.tower.update(fields)
  nodes.write_node(tmp_path / "ours", "towers", config.tower, params)
  same, info = transformers.CLIPVisionModel.from_pretrained(
    tmp_path / "ours", output_loading_info=True)
  assert not any(info.values()), info
  for key, value in model.state_dict().items():
    assert torch.equal(value, same.state_dict()[key]), key
  again, back = nodes.read_node(tmp_path / "ours", "towers")
  assert again == fields
  jax.tree.map(np.testing.assert_array_equal, back, params)
  with pytest.raises(UsageError, match="already holds a checkpoint"):
    nodes.write_node(tmp_path / "ours", "towers", config.tower, params)


def test_a_text_tower_alone_there_and_back(tmp_path):
  model = transformers.CLIPTextModel(transformers.CLIPTextConfig(
    vocab_size=31, hidden_size=12, intermediate_size=20, num_hidden_layers=2,
    num_attention_heads=3, max_position_embeddings=7, bos_token_id=0, eos_token_id=30))
  model.save_pretrained(tmp_path / "theirs")
  fields, params = nodes.read_node(tmp_path / "theirs", "llm")
  config = base.get_config()
  config.llm.update(fields)
  nodes.write_node(tmp_path / "ours", "llm", config.llm, params)
  same, info = transformers.CLIPTextModel.from_pretrained(
    tmp_path / "ours", output_loading_info=True)
  assert not any(info.values()), info
  for key, value in model.state_dict().items():
    assert torch.equal(value, same.state_dict()[key]), key


def test_towers_of_transformers_4_have_a_prefix(tower, tmp_path):
  _, directory = tower
  with safetensors_io.Reader(directory) as reader:
    old = {f"vision_model.{key.removeprefix('vision_model.')}": reader[key]
           for key in reader.shapes}
  old["vision_model.embeddings.position_ids"] = np.arange(5)[None]
  safetensors_io.write_json(tmp_path / "config.json",
                            safetensors_io.read_json(directory / "config.json"))
  tensors = {key: safetensors_io.Tensor(array.shape, array.dtype, lambda array=array: array)
             for key, array in old.items()}
  safetensors_io.write(tmp_path, tensors)
  jax.tree.map(np.testing.assert_array_equal, nodes.read_node(tmp_path, "towers"),
               nodes.read_node(directory, "towers"))


def test_a_checkpoint_of_another_model_is_refused(tower, tmp_path):
  _, directory = tower
  with pytest.raises(UsageError, match="model_type is 'clip_vision_model', which is no module of"):
    nodes.read_node(directory, "llm")
  theirs = safetensors_io.read_json(directory / "config.json")
  safetensors_io.write_json(tmp_path / "config.json", theirs | {"num_hidden_layers": 3})
  (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
  with pytest.raises(DataError, match="16 keys are missing"):
    nodes.read_node(tmp_path, "towers")
