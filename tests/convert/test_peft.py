"""Adapters against PEFT: the same files, the same logits."""

import json
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import peft
import pytest
import torch
import transformers

from tests.convert import test_systems, tiny_llava
from tests.numbers import error
from vlm_jax.configs import base
from vlm_jax.convert import adapters, parity, systems
from vlm_jax.core.adapters import is_adapter
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.core.tree import flatten, unflatten

TOLERANCE = 2e-4  # max|a - b| / max|b| of the logits
IMAGE = 5
transformers.utils.logging.disable_progress_bar()


def adapted(targets=(".*/attention/(query|out)", "connector", "llm/.*/mlp")):
  config = tiny_llava.get_config()
  config.lora.update(rank=3, alpha=7.0, targets=targets)
  return config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A LLaVA with adapters, its base in Hugging Face's format, its adapters in PEFT's."""
  folder = tmp_path_factory.mktemp("peft")
  config = adapted()
  flat = tiny_llava.noise(config)
  base = config.copy_and_resolve_references()
  base.lora.rank = 0
  weights = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
  systems.write(folder / "base", base, unflatten(weights), IMAGE)
  adapters.write(folder / "ours", config, unflatten(flat))
  return folder, config, flat


def their_logits(model, config):
  picture, words = parity._document(config, IMAGE).parts
  pixels, ids = picture.values, words.ids
  slots = (config.tower.image_size // config.tower.patch) ** 2
  tokens = np.concatenate([np.full(slots, IMAGE), ids])[None].astype(np.int64)
  values = (pixels / 255 - np.asarray(config.tower.mean)) / np.asarray(config.tower.std)
  with torch.no_grad():
    out = model(input_ids=torch.from_numpy(tokens), pixel_values=torch.from_numpy(
      values.transpose(2, 0, 1)[None].astype(np.float32)))
  return out.logits[0].numpy()


def draw(model):
  """Noise for the adapters, whose B are zeros in PEFT."""
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if "lora_" in name:
        weight.normal_(0, 0.3)


def load_base(folder):
  return transformers.LlavaForConditionalGeneration.from_pretrained(
    folder / "base", attn_implementation="eager").eval()


def test_logits_in_peft_are_ours(made):
  folder, config, flat = made
  ours = parity._ours(config, unflatten(flat), parity._document(config, IMAGE))
  base = load_base(folder)
  plain = their_logits(base, config)
  model = peft.PeftModel.from_pretrained(base, folder / "ours").eval()
  theirs = their_logits(model, config)
  assert np.isfinite(theirs).all() and theirs.std() > 1e-2
  print(f"logits in PEFT: {error(ours, theirs):.1e}")
  assert error(ours, theirs) < TOLERANCE
  assert error(ours, plain) > 100 * TOLERANCE  # the twin: without adapters
  merged = their_logits(model.merge_and_unload(), config)
  mine, without = adapters.merge(unflatten(flat), config)
  assert error(parity._ours(without, mine, parity._document(config, IMAGE)), merged) < TOLERANCE


def test_adapters_of_peft_are_read(made, tmp_path):
  folder, config, flat = made
  config = adapted(("llm/layers/attention/(query|value)",))
  torch.manual_seed(0)
  model = peft.get_peft_model(load_base(folder), peft.LoraConfig(
    r=3, lora_alpha=7.0, target_modules=r".*language_model.*\.(q_proj|v_proj)"))
  draw(model)
  model.save_pretrained(tmp_path)
  found = adapters.read(tmp_path, config)
  assert set(found) == {path for path in systems.shapes(config) if is_adapter(path)}
  params = {path: leaf for path, leaf in flat.items() if not is_adapter(path)} | found
  ours = parity._ours(config, unflatten(params), parity._document(config, IMAGE))
  assert error(ours, their_logits(model.eval(), config)) < TOLERANCE


def test_ours_written_and_read_is_the_same(made):
  folder, config, flat = made
  found = adapters.read(folder / "ours", config)
  assert set(found) == set(filter(is_adapter, flat))
  for path, leaf in found.items():
    np.testing.assert_array_equal(leaf, flat[path], err_msg=path)


@pytest.mark.parametrize("change,fields,kind,sentence", [
  ({"r": 4}, {}, UsageError, "config.lora.rank is 3 but .* says 4; set config.lora.rank=4"),
  ({"lora_alpha": 8}, {}, UsageError, "set config.lora.alpha=8"),
  ({"use_dora": True}, {}, UsageError, "use_dora is True; only False"),
  ({"use_rslora": True}, {}, UsageError, "use_rslora is True"),
  ({"peft_type": "IA3"}, {}, UsageError, "peft_type is 'IA3'; only 'LORA'"),
  ({"modules_to_save": ["x"]}, {}, UsageError, "modules_to_save"),
  ({}, {"targets": ("llm/.*/mlp",)}, DataError, "unexpected: .*config.lora.targets are other"),
  ({}, {"targets": (".*/attention", "connector", "llm/.*/mlp")}, DataError,
   "missing: .*config.lora.targets are other layers"),
  ({}, {"targets": (".*",)}, UsageError, "tower/patch is not a linear layer in PEFT's model"),
])
def test_what_cannot_be_read_is_one_sentence(made, tmp_path, change, fields, kind, sentence):
  folder, config, _ = made
  config = config.copy_and_resolve_references()
  config.lora.update(fields)
  for file in (folder / "ours").iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  theirs = json.loads((tmp_path / adapters.CONFIG).read_text())
  (tmp_path / adapters.CONFIG).write_text(json.dumps(theirs | change))
  with pytest.raises(kind, match=sentence) as error:
    adapters.read(tmp_path, config)
  assert "\n" not in str(error.value)


def test_writing_refuses_what_is_there_and_what_is_not(made):
  folder, config, flat = made
  with pytest.raises(UsageError, match="already holds a checkpoint"):
    adapters.write(folder / "ours", config, unflatten(flat))
  plain = config.copy_and_resolve_references()
  plain.lora.rank = 0
  with pytest.raises(UsageError, match="config.lora.rank is 0"):
    adapters.write(folder / "none", plain, unflatten(flat))
  other = config.copy_and_resolve_references()
  other.connector.name = "linear"
  with pytest.raises(UsageError, match="config.connector.name is 'linear'"):
    adapters.write(folder / "none", other, unflatten(flat))
  assert not (folder / "none").exists()


SYSTEMS = {  # what is adapted in each
  "llava_next": ("llm/.*", "tower/.*/attention", "connector"),
  "paligemma": ("llm/.*/(query|mlp)", "tower/layers/.*", "connector"),
  "clip": ("llm/layers/.*", "tower/layers/attention", ".*_projection"),
  "siglip": ("llm/layers/mlp", "tower/layers/attention", "text_projection"),
  "siglip2": ("llm/layers/mlp", "tower/layers/attention", "text_projection"),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_merges_in_peft_to_what_it_merges_to_here(system, tmp_path):
  model = test_systems.SYSTEMS[system][0]()
  model.save_pretrained(tmp_path / "base")
  recipe = base.get_config()
  recipe.data.sources.only = base.source(name="only")
  config, params = systems.read(tmp_path / "base", recipe)
  config.lora.update(rank=2, alpha=5.0, targets=SYSTEMS[system])
  rng, flat = np.random.default_rng(0), flatten(params)
  noise = {path: rng.normal(0, 0.3, shape).astype(np.float32)
           for path, shape in systems.shapes(config).items() if is_adapter(path)}
  assert len(noise) > 6
  adapters.write(tmp_path / "ours", config, unflatten(flat | noise))
  theirs = peft.PeftModel.from_pretrained(model, tmp_path / "ours").merge_and_unload()
  theirs.save_pretrained(tmp_path / "merged")
  expected = flatten(systems.read(tmp_path / "merged", recipe)[1])
  ours = flatten(adapters.merge(unflatten(flat | noise), config)[0])
  moved = [path for path in flat if error(flat[path], expected[path]) > 1e-2]
  assert set(moved) == {path.rpartition("/")[0] + "/kernel" for path in noise}
  assert max(error(ours[path], expected[path]) for path in ours) < 1e-5
  back = adapters.read(tmp_path / "ours", config)
  assert all(np.array_equal(back[path], leaf) for path, leaf in noise.items())


def test_adapters_of_a_language_model_alone_are_read(made, tmp_path):
  """Those of a LlamaForCausalLM go into the llm of a LLaVA."""
  _, config, flat = made
  config = adapted(("llm/layers/attention/(query|value)",))
  llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=config.llm.vocab_size, hidden_size=config.llm.width,
    intermediate_size=config.llm.mlp, num_hidden_layers=config.llm.depth,
    num_attention_heads=config.llm.heads, num_key_value_heads=config.llm.kv_heads,
    head_dim=config.llm.head_dim or None))
  model = peft.get_peft_model(llama, peft.LoraConfig(
    r=3, lora_alpha=7.0, target_modules=["q_proj", "v_proj"]))
  torch.manual_seed(0)
  draw(model)
  model.save_pretrained(tmp_path)
  found = adapters.read(tmp_path, config)
  assert set(found) == {path for path in systems.shapes(config) if is_adapter(path)}
  a = dict(model.named_parameters())[
    "base_model.model.model.layers.1.self_attn.v_proj.lora_A.default.weight"].detach().numpy()
  np.testing.assert_array_equal(found["llm/layers/attention/value/lora_a"][1].reshape(-1, 3), a.T)
