"""`configs/finetune.py`, and the README's commands with a tiny LLaVA that transformers wrote."""

import io
import json
import os
import re
import shlex
import shutil
import sys

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import pytest
import torch
import transformers

import vlm_jax
from tests.data.conftest import ROOT
from vlm_jax import recipes
from vlm_jax.cli import main as cli
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.core.tree import flatten
from vlm_jax.data import tokenizer, toy
from vlm_jax.evals.run import read
from vlm_jax.train import state, trackers
from vlm_jax.train.optimizer import make_optimizer

ROWS, TOKENS, PATCHES = 288, 272, 16  # of the embedding; of the tokenizer; of a picture
# The published names of what our tokenizer calls otherwise; its marks of turns they do not have.
NAMES = {"<pad>": "<unk>", "<bos>": "<s>", "<eos>": "</s>", "<user>": "<x1>", "<assistant>": "<x2>"}
INIT = "init=llava-1.5,data=my.json,images=images"


def write_llava(folder):
  """A LLaVA of two layers, random, as transformers writes it."""
  torch.manual_seed(0)
  vision = transformers.CLIPVisionConfig(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=32,
    patch_size=8)
  text = transformers.LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=ROWS, max_position_embeddings=512)
  words = ["what colour is it? red green blue black", "who said so? nobody did"] * 3
  row = tokenizer.SPECIALS.index("<image>")
  model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
    vision_config=vision, text_config=text, image_token_index=row, image_seq_length=PATCHES))
  with torch.no_grad():
    for name, weight in model.named_parameters():
      weight.normal_(0, 0.1)
      if "norm" in name and name.endswith("weight"):
        weight.add_(1)
  model.save_pretrained(folder)
  content = tokenizer.train(words, TOKENS).inner.to_str()
  for ours, theirs in NAMES.items():
    content = content.replace(f'"{ours}"', f'"{theirs}"')
  (folder / "tokenizer.json").write_text(content)
  (folder / "tokenizer_config.json").write_text(json.dumps(
    {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}))
  transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder with a published checkpoint and somebody's conversations, where one stands."""
  folder, before = tmp_path_factory.mktemp("finetune"), os.getcwd()
  os.chdir(folder)
  write_llava(folder / "llava-1.5")
  toy.write(".")
  yield folder
  os.chdir(before)


def test_the_readme_is_true(place, capsys, monkeypatch):
  text = (ROOT / "README.md").read_text().split("## Fine-tune a published")[1].split("\n## ")[0]
  commands = re.findall(r"^    vlm-jax (.*?)(?: +#.*)?$", text, re.MULTILINE)
  assert [command.split()[0] for command in commands] == [
    "data", "train", "evaluate", "chat", "convert"]
  monkeypatch.setattr(sys, "stdin", io.StringIO("what colour is it?\n"))
  for command in commands:
    assert cli.main(shlex.split(command)) == 0, command
    said = capsys.readouterr()
    if command.startswith("data"):
      assert "llava_json, 35 records" in said.out
    if command.startswith("chat"):
      assert "concat at step" in said.err
  run = place / "runs" / "tuned"
  rows = trackers.read(run / "metrics.jsonl")
  losses = [row["loss/lm/mine"] for row in rows if "loss/lm/mine" in row]
  assert np.isfinite(losses).all()
  before, after = vlm_jax.load("llava-1.5"), vlm_jax.load(run)
  assert after.step == after.config.train.steps == 5
  changed = {path.split("/")[0] for path, leaf in flatten(before.params).items()
             if not np.array_equal(leaf, flatten(after.params)[path])}
  assert changed == {"connector", "llm"}
  assert before.tokenizer.inner.to_str() == after.tokenizer.inner.to_str()
  step, found = read(run / "evals" / "5.json")
  assert step == 5 and found["mine"]["split"] == "validation" and found["mine"]["documents"] == 5
  model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
    place / "tuned-llava", output_loading_info=True)
  assert not any(info.values())
  assert model.config.image_token_index == before.tokenizer.image


def recipe(words=INIT):
  return recipes.load(f"configs/finetune.py:{words}")


def trains(config):
  """Paths of what moves."""
  from vlm_jax.core.fusion import find_fusion

  module = find_fusion(config)
  _, leaves = state.initializer(module, config)
  return set(make_optimizer(config, module.STAGES, leaves).trainable)


def test_the_recipe_of_a_published_checkpoint(place):
  config = recipe()
  assert config.fusion.name == "concat" and config.llm.vocab_size == ROWS
  assert (config.data.tokens, config.data.images) == (2 * PATCHES + 512, 2)
  assert config.data.decode.fit == "center_crop" and config.tower.image_size == 32
  assert config.train.steps == -(-35 // 8) and config.evals.mine.split == "validation"
  assert {path.split("/")[0] for path in trains(config)} == {"connector", "llm"}
  tokens = os.listdir(place / "data" / "tokenizers")
  assert len(tokens) == 1 and recipe() is not config and os.listdir("data/tokenizers") == tokens
  shutil.copytree("llava-1.5", "moved/elsewhere")  # a run goes on when its checkpoint has moved
  moved = recipe(INIT.replace("llava-1.5", str(place / "moved/elsewhere")))
  assert moved.data.tokenizer == config.data.tokenizer and os.listdir("data/tokenizers") == tokens
  adapted = recipe(INIT + ",lora,debug")
  assert adapted.train.steps == 4 and adapted.data.rows == 2
  assert {path.rsplit("/", 1)[-1] for path in trains(adapted) if path.startswith("llm/")} == {
    "lora_a", "lora_b"}
  assert any("mlp" in path for path in trains(adapted))


def test_the_parameters_are_those_published(place):
  begun, there = vlm_jax.load(f"configs/finetune.py:{INIT}"), vlm_jax.load("llava-1.5")
  a, b = flatten(begun.params), flatten(there.params)
  assert a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def test_a_run_goes_on(place):
  """From what a run has become, in its rows and with its tokenizer."""
  if not (place / "first").exists():
    assert cli.main(["convert", "llava-1.5", "--from=hf", "--out=first",
                     "--config=configs/llava_1_5.py:debug"]) == 0
  for init in ("first", "first/checkpoints/0"):
    words = f"init={init},data=my.json,images=images,debug"
    config = recipe(words)
    assert config.data.tokens == 192 and config.data.tokenizer.endswith("first/tokenizer.json")
    assert list(config.data.sources) == ["mine"] and config.fusion.stage == "finetune"
    a, b = (flatten(vlm_jax.load(path).params)
            for path in ("first", f"configs/finetune.py:{words}"))
    assert all(np.array_equal(a[path], b[path]) for path in a | b)


def test_adapters_of_a_run_are_merged_into_where_the_next_begins(place):
  from vlm_jax.convert import adapters
  from vlm_jax.core.adapters import is_adapter
  from vlm_jax.core.fusion import find_fusion
  from vlm_jax.core.tree import unflatten
  from vlm_jax.train import checkpoint_tools, initial

  config = recipe(INIT + ",lora,debug")
  _, leaves = state.initializer(find_fusion(config), config)
  rng = np.random.default_rng(0)
  params = {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in leaves.items()}
  run = place / "adapted"
  run.mkdir()
  checkpoint_tools.write_run(run, config.to_json(), 4, unflatten(params), {})
  fresh = recipe(f"init={run},data=my.json,images=images")
  assert fresh.lora.rank == 0
  found = initial.read(fresh, {path: leaf for path, leaf in leaves.items() if not is_adapter(path)})
  want = flatten(adapters.merge(unflatten(params), config)[0])
  assert found.keys() == want.keys()
  assert all(np.array_equal(found[path], want[path]) for path in want)
  moved = [path for path in want if not np.array_equal(want[path], params[path])]
  assert len(moved) == 7 and all(path.startswith("llm/") for path in moved)


def test_messages_by_their_ending(place):
  rows = [{"messages": [{"role": "user", "content": [
    {"type": "image", "image": f"{number}.jpg"}, {"type": "text", "text": "what colour is it?"}]},
    {"role": "assistant", "content": "red"}]} for number in range(30)]
  (place / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
  config = recipe("init=llava-1.5,data=chat.jsonl,images=images")
  assert config.data.sources.mine.name == "messages" and config.train.steps == 4


@pytest.mark.parametrize("words, kind, sentence", [
  ("", UsageError, "init=... is missing"),
  ("init=llava-1.5", UsageError, "data=... is missing"),
  ("init=llava-1.5,data=my.json,loar", UsageError, "no argument 'loar'; did you mean 'lora'"),
  ("init=nowhere,data=my.json", UsageError, "init=nowhere is neither a run directory nor"),
  ("init=llava-1.5,data=no.json", DataError, "no.json does not exist"),
  ("init=llava-1.5,data=blind.json", UsageError, "data=blind.json has no picture in its first 100"),
  ("init=clip,data=my.json", UsageError, "init=clip is a 'clip', which compares pictures.*LLaVA"),
  ("init=gpt2,data=my.json", UsageError, "model_type is 'gpt2'"),
])
def test_one_sentence_for_what_is_wrong(place, words, kind, sentence):
  (place / "blind.json").write_text(json.dumps([
    {"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]}] * 30))
  if not (place / "clip").exists():
    transformers.CLIPConfig().save_pretrained(place / "clip")
    transformers.GPT2Config().save_pretrained(place / "gpt2")
  with pytest.raises(kind, match=sentence) as raised:
    recipe(words)
  assert "\n" not in str(raised.value)


@pytest.mark.parametrize("system", ["llava_next", "paligemma"])
def test_other_systems(place, system):
  """Everything is read, and two pictures of the largest kind fit into a row."""
  from tests.convert.test_systems import SYSTEMS, their_model, write_tokenizer
  from vlm_jax.core.document import Image
  from vlm_jax.core.fusion import find_fusion
  from vlm_jax.train import initial

  _, (words, roles), strategy = SYSTEMS[system]
  their_model(system).save_pretrained(place / system)
  write_tokenizer(place / system, words, roles)
  config = recipe(f"init={system},data=my.json,images=images")
  assert config.fusion.name == strategy and config.fusion.stage == "all"
  assert config.data.template == {"paligemma": "newline"}.get(system, "marks")
  module = find_fusion(config)
  _, leaves = state.initializer(module, config)
  assert initial.read(config, leaves).keys() == leaves.keys()
  assert {path.split("/")[0] for path in trains(config)} >= {"tower", "connector", "llm"}
  bundle, side = vlm_jax.Bundle(config, {}), config.tower.image_size
  pictures = [Image(np.zeros((down * side, across * side, 3), np.uint8))
              for down, across in config.data.decode.grids or [(1, 1)]]
  words = bundle.slots(bundle.question("w20"))
  slots = max(bundle.slots(bundle.question("w20", [one, one])) for one in pictures)
  assert slots - words == config.data.tokens - 512 > 0
  squares = max(len(bundle.processor(one).squares) for one in pictures)
  assert config.data.images == 2 * squares and (squares > 1) == (system == "llava_next")
