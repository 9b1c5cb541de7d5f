"""LAVIS writes the tensors of BLIP-2 under its own names (.pth); they are those of Hugging Face."""

import re

import numpy as np
import pytest
import torch
import transformers
from ml_collections import ConfigDict

from tests.convert import test_blip2_parity as second
from vlm_jax.convert import systems
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.tree import flatten
from vlm_jax.train import initial
from vlm_jax.train import state as states

THEIRS = (
  (r"^vision_model\.post_layernorm", "ln_vision"), (r"^vision_model\.", "visual_encoder."),
  (r"embeddings\.class_embedding", "cls_token"), (r"embeddings\.position_embedding$", "pos_embed"),
  (r"embeddings\.patch_embedding", "patch_embed.proj"), (r"encoder\.layers\.", "blocks."),
  (r"self_attn\.projection", "attn.proj"), (r"self_attn\.qkv", "attn.qkv"),
  (r"layer_norm(\d)", r"norm\1"), (r"^qformer\.layernorm", "Qformer.bert.embeddings.LayerNorm"),
  (r"^embeddings\.", "Qformer.bert.embeddings."), (r"^qformer\.", "Qformer.bert."),
  (r"attention\.attention", "attention.self"), (r"_projection\.", "_proj."),
)
SAYS = "Qformer.cls.predictions."


def spelled(tensors: dict, llm: str) -> dict:
  """A state dict under LAVIS' names; the biases of the tower's keys are nothing there."""
  found = {}
  for key, value in tensors.items():
    if key.startswith("language_model."):
      key = key.replace("language_model", f"{llm}_model", 1)
    else:
      for pattern, name in THEIRS:
        key = re.sub(pattern, name, key, count=1)
      key = key.replace("language_proj", f"{llm}_proj")
    if key.endswith("attn.qkv.bias"):
      query, _, value_bias = value.chunk(3)
      found[key.replace("qkv.bias", "q_bias")] = query.clone()
      found[key.replace("qkv.bias", "v_bias")] = value_bias.clone()
    else:
      found[key] = value
  return found


def save(path, tensors):
  torch.save({"model": tensors, "optimizer": {"state": {0: {"step": 3}}, "param_groups": [
    {"lr": 1e-4, "betas": (0.9, 0.98)}]}, "config": {"run": {"task": "x"}}, "epoch": 3}, path)
  return path


class Published:
  """A BLIP-2 there, its parameters here, its state dict as LAVIS writes it."""

  def __init__(self, model, folder, llm):
    second.draw(model, 1)
    with torch.no_grad():
      for name, weight in model.named_parameters():
        if name.endswith("qkv.bias"):
          weight.view(3, -1)[1] = 0
    model.save_pretrained(folder / llm)
    self.config, params = systems.read(folder / llm, second.recipe())
    self.params, self.tensors = flatten(params), spelled(model.state_dict(), llm)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  folder = tmp_path_factory.mktemp("lavis")
  theirs = second.their_config("opt")
  speaks = transformers.Blip2ForConditionalGeneration(theirs)
  theirs = second.their_config("opt")
  theirs.image_text_hidden_size, theirs.image_token_index = 10, None
  theirs.qformer_config.use_qformer_text_input = True
  compares = transformers.Blip2ForImageTextRetrieval(theirs)
  one, two = Published(compares, folder, "none"), Published(speaks, folder, "opt")
  rng = np.random.default_rng(0)
  draw = lambda *shape: torch.tensor(rng.normal(size=shape), dtype=torch.float32)
  width = theirs.qformer_config.hidden_size
  words = one.tensors["Qformer.bert.embeddings.word_embeddings.weight"]
  one.tensors |= {
    "temp": torch.tensor(0.05), f"{SAYS}bias": draw(len(words)),
    f"{SAYS}decoder.bias": draw(len(words)), f"{SAYS}decoder.weight": words,
    f"{SAYS}transform.dense.weight": draw(width, width), f"{SAYS}transform.dense.bias": draw(width),
    f"{SAYS}transform.LayerNorm.weight": draw(width),
    f"{SAYS}transform.LayerNorm.bias": draw(width),
    "Qformer.bert.embeddings.position_ids": torch.arange(8)[None]}
  return one, two


def read(config, path, **nodes):
  config = config.copy_and_resolve_references()
  config.fusion.init = str(path)
  for node, init in nodes.items():
    config[node].init = str(init)
  _, leaves = states.initializer(find_fusion(config), config)
  return initial.read(config, leaves)


def same(found, expected):
  for path, array in found.items():
    np.testing.assert_array_equal(array, expected[path], err_msg=path)


def test_both_stages_are_those_of_hugging_face(published, tmp_path):
  one, two = published
  path = save(tmp_path / "one.pth", one.tensors)
  config = one.config.copy_and_resolve_references()
  config.fusion.objectives = ConfigDict({"itc": 1.0, "itm": 1.0, "itg": 1.0})
  found = read(config, path)
  extra = {key for key in found if key.startswith("caption/")}
  assert len(extra) == 5 and found["temperature"] == np.float32(0.05)
  kernel = one.tensors[f"{SAYS}transform.dense.weight"].numpy()
  np.testing.assert_array_equal(found["caption/linear/kernel"], kernel.T)
  np.testing.assert_array_equal(found["caption/bias"], one.tensors[f"{SAYS}bias"].numpy())
  known = {key: array for key, array in found.items() if key not in extra | {"temperature"}}
  assert known.keys() | {"temperature"} == one.params.keys()
  same(known, one.params)
  # The tower's queries and values have a bias, its keys have none.
  biases = [found[f"tower/layers/attention/{name}/bias"] for name in ("query", "key", "value")]
  assert [bool(np.any(bias)) for bias in biases] == [True, False, True]
  assert not np.array_equal(biases[0], biases[2])
  found = read(two.config, save(tmp_path / "two.pth", two.tensors))
  assert found.keys() == two.params.keys()
  same(found, two.params)


def test_the_second_stage_starts_from_the_first(published, tmp_path):
  one, two = published
  first = {key: value for key, value in one.tensors.items() if not key.startswith("visual_encoder")}
  path, hf = save(tmp_path / "one.pth", first), tmp_path / "opt"
  systems.write(hf, two.config, initial.unflatten(two.params), second.IMAGE)
  with pytest.raises(UsageError, match=r"has no tower, .* config\.tower\.init"):
    read(two.config, path, llm=hf)
  eva = {key.removeprefix("visual_encoder."): value for key, value in one.tensors.items()
         if key.startswith("visual_encoder.")}
  more = {key.replace("blocks.0.", "blocks.2."): value for key, value in eva.items()}
  with pytest.raises(UsageError, match=r"has no llm, .* config\.llm\.init"):
    read(two.config, path, tower=hf)
  torch.save(eva | more, tmp_path / "eva.pth")
  found = read(two.config, path, llm=hf, tower=tmp_path / "eva.pth")
  lacking = {"connector/project/kernel", "connector/project/bias"}
  assert found.keys() == two.params.keys() - lacking
  same({key: array for key, array in found.items() if not key.startswith("llm/")}, one.params)
  same({key: array for key, array in found.items() if key.startswith("llm/")}, two.params)


def test_what_is_not_theirs_is_refused(published, tmp_path):
  one, two = published
  cases = (
    (one, {f"{SAYS}decoder.weight": 1 + one.tensors[f"{SAYS}decoder.weight"]}, "differs from the"),
    (one, {"Qformer.bert.encoder.layer.0.extra": torch.ones(3)}, "1 keys are unexpected"),
    (two, {"visual_encoder.blocks.2.norm1.weight": torch.ones(24)}, "1 keys are unexpected"),
    (two, {"opt_proj.weight": torch.ones(3, 3)}, "shapes are wrong"))
  for number, (model, change, sentence) in enumerate(cases):
    path = save(tmp_path / f"{number}.pth", model.tensors | change)
    with pytest.raises(DataError, match=f"config.fusion.init={path}.*{sentence}"):
      read(model.config, path)
  path = save(tmp_path / "two.pth", two.tensors)
  with pytest.raises(DataError, match="keys are missing"):
    read(one.config, path)
  other = two.config.copy_and_resolve_references()
  other.fusion.name = "concat"
  with pytest.raises(UsageError, match="those of LAVIS are known"):
    read(other, path)
  torch.save({"x": torch.ones(2)}, path)
  with pytest.raises(DataError, match="LAVIS did not write them"):
    read(two.config, path)
