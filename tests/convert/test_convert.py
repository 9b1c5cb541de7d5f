"""`vlm-jax convert`: a run to Hugging Face and back, what generates what, and refusals."""

import json
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import vlm_jax
from tests.convert import tiny_llava
from tests.convert.written import Tensors, llama_gguf
from vlm_jax import runs
from vlm_jax.cli import main as cli
from vlm_jax.configs import base
from vlm_jax.convert import hf_text, llava, safetensors_io, systems, table
from vlm_jax.core.errors import DATA, DISK, USAGE, DataError, UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.tree import flatten, unflatten
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.data.tokenizer import load as load_tokenizer
from vlm_jax.train import initial
from vlm_jax.train import state as states
from vlm_jax.train.loop import train

transformers.utils.logging.disable_progress_bar()
PROMPT, EOS = "what is this?", 2
RECIPE = """from tests.convert import tiny_llava

def get_config(arg=""):
  return tiny_llava.get_config()
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A run of noise, its export, and that export imported again."""
  folder = tmp_path_factory.mktemp("convert")
  config = tiny_llava.get_config(tiny_llava.write_tokenizer(folder))
  config.train.compilation_cache = str(folder / "cache")
  flat = tiny_llava.noise(config)
  tiny_llava.write_run(folder / "run", config, flat)
  (folder / "recipe.py").write_text(RECIPE)
  pixels = np.random.default_rng(0).integers(0, 256, (tiny_llava.SIDE,) * 2 + (3,), np.uint8)
  Image.fromarray(pixels).save(folder / "a.png")
  assert cli.main(["convert", str(folder / "run"), "--to=hf", f"--out={folder / 'hf'}",
                   "--shard-gb=0.00003", "--check"]) == 0
  assert cli.main(["convert", str(folder / "hf"), "--from=hf", f"--out={folder / 'back'}",
                   "--check", f"--config={folder / 'recipe.py'}", "--config.optim.lr=0.0",
                   f"--config.train.compilation_cache={folder / 'cache'}"]) == 0
  return folder, config, flat


@pytest.fixture(scope="module")
def said(made):
  """What the model answers, by our own generation."""
  folder, config, flat = made
  bundle = vlm_jax.Bundle(config, unflatten(flat))
  return bundle.answer(PROMPT, [folder / "a.png"], max_tokens=12)


def test_transformers_generates_the_same_tokens(made, said):
  folder, _, _ = made
  model, info = transformers.AutoModelForImageTextToText.from_pretrained(
    folder / "hf", output_loading_info=True, attn_implementation="eager")
  assert not any(info.values()), info
  assert len(list((folder / "hf").glob("model-*.safetensors"))) > 2
  processor = transformers.AutoProcessor.from_pretrained(folder / "hf")
  turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
  text = processor.apply_chat_template(turn, add_generation_prompt=True)
  inputs = processor(images=Image.open(folder / "a.png"), text=text, return_tensors="pt")
  with torch.no_grad():
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
  theirs = out[inputs["input_ids"].shape[1]:].tolist()
  assert len(set(theirs)) > 2
  assert theirs == list(said.tokens) + [EOS] * said.stopped
  assert inputs["input_ids"].shape[1] == said.prompt_tokens


def test_a_class_token_is_no_slot(made, tmp_path):
  folder, config, _ = made
  config = config.copy_and_resolve_references()
  config.tower.update(class_token=True, pre_norm=True, patch_bias=False, feature_layer=-2)
  systems.write(tmp_path / "clip", config, unflatten(tiny_llava.noise(config)), image_token=5)
  hf_text.write(tmp_path / "clip", config, load_tokenizer(config.data.tokenizer))
  processor = transformers.AutoProcessor.from_pretrained(tmp_path / "clip")
  inputs = processor(images=Image.open(folder / "a.png"), text="<image><user>what",
                     return_tensors="pt")
  assert int((inputs["input_ids"] == 5).sum()) == 4


def test_back_is_the_run(made):
  folder, config, flat = made
  bundle = vlm_jax.load(folder / "back")
  again, params = bundle.config, bundle.params
  assert bundle.step == 0 and again.precision.param == "float32"
  for path, leaf in flatten(params).items():
    np.testing.assert_array_equal(leaf, flat[path], err_msg=path)
  config = config.copy_and_resolve_references()
  config.connector.hidden, config.llm.head_dim = config.llm.width, again.llm.head_dim  # 0 says so
  for node in ("fusion", "tower", "connector", "llm"):
    assert json.loads(again[node].to_json()) == json.loads(config[node].to_json())


def test_commands_take_an_imported_run(made, said, capsys):
  folder, _, _ = made
  capsys.readouterr()
  assert cli.main(["generate", f"--workdir={folder / 'back'}", f"--prompt={PROMPT}",
                   f"--image={folder / 'a.png'}", "--max-tokens=12", "--json"]) == 0
  assert json.loads(capsys.readouterr().out)["tokens"] == list(said.tokens)
  (folder / "q.jsonl").write_text(json.dumps({"id": 1, "prompt": PROMPT, "image": "a.png"}) + "\n")
  assert cli.main(["predict", f"--workdir={folder / 'back'}", f"--data={folder / 'q.jsonl'}",
                   f"--out={folder / 'p.jsonl'}", "--max-tokens=12", "--batch=1"]) == 0
  assert json.loads((folder / "p.jsonl").read_text())["prediction"] == said.text


def test_training_starts_from_an_imported_run(made):
  from tests.train.test_lora import Loader

  folder, _, flat = made
  config = runs.frozen(folder / "back")

  class Tiny(Loader):
    def __next__(self):
      from vlm_jax.core import batch as batches
      from vlm_jax.core.fusion import find_fusion

      module = find_fusion(self.config)
      self.index += 1
      return batches.empty(module.fields(self.config), module.axes(self.config), 2), {}

  train(config, folder / "back", make_loader=Tiny)  # its learning rate is 0
  bundle = vlm_jax.load(folder / "back")
  params = bundle.params
  assert bundle.step == 1
  for path, leaf in flatten(params).items():
    np.testing.assert_array_equal(leaf, flat[path], err_msg=path)


def test_dtype_only_when_asked(made, capsys):
  folder, config, flat = made
  half = ml_dtypes.bfloat16
  assert cli.main(["convert", str(folder / "run"), "--to=hf", f"--out={folder / 'half'}",
                   "--dtype=bfloat16", "--check"]) == 0
  with safetensors_io.Reader(folder / "half") as reader:
    assert {reader[key].dtype for key in reader.shapes} == {np.dtype(half)}
  run = ["convert", str(folder / "half"), "--from=hf", f"--config={folder / 'recipe.py'}"]
  assert cli.main([*run, f"--out={folder / 'b'}"]) == 0
  assert runs.frozen(folder / "b").precision.param == "bfloat16"
  assert cli.main([*run, f"--out={folder / 'f'}", "--dtype=float32"]) == 0
  params = vlm_jax.load(folder / "f").params
  for path, leaf in flatten(params).items():
    np.testing.assert_array_equal(leaf, flat[path].astype(half).astype(np.float32), err_msg=path)
  # One shard of another dtype.
  path = sorted((folder / "half").glob("model*.safetensors"))[-1]
  with safetensors_io.Reader(path) as reader:
    mixed = Tensors({key: reader[key] for key in reader.shapes})
  other = "multi_modal_projector.linear_1.weight"
  mixed[other] = mixed[other].astype(np.float32)
  safetensors_io.write_file(path, {key: safetensors_io.Tensor(a.shape, a.dtype, lambda a=a: a)
                                   for key, a in mixed.items()})
  capsys.readouterr()
  assert cli.main([*run, f"--out={folder / 'm'}"]) == DATA
  said = capsys.readouterr().err
  assert "float32" in said and "bfloat16" in said and "--dtype" in said and said.count("\n") == 1
  assert not (folder / "m").exists()
  assert cli.main([*run, f"--out={folder / 'm'}", "--dtype=bfloat16"]) == 0


@pytest.mark.parametrize("flags,code,sentence", [
  (["--to=hf"], USAGE, "holds something already"),
  (["--to=gguf", "--out=x"], USAGE, "--to is 'gguf'; known: hf, jax, peft"),
  (["--to=peft", "--out=x"], USAGE, "config.lora.rank is 0"),
  (["--to=hf", "--from=hf", "--out=x"], USAGE, "either --from"),
  (["--from=hf", "--out=x"], USAGE, "--from=hf needs --config"),
  (["--to=hf", "--out=/proc/x"], DISK, "cannot be written"),
])
def test_refusals_are_one_sentence(made, capsys, flags, code, sentence):
  folder, _, _ = made
  flags = [flag if not flag.startswith("--out") or "/" in flag
           else f"--out={folder / 'refused'}" for flag in flags]
  if not any(flag.startswith("--out") for flag in flags):
    flags.append(f"--out={folder / 'hf'}")
  assert cli.main(["convert", str(folder / "run"), *flags]) == code
  said = capsys.readouterr().err
  assert sentence in said and said.count("\n") == 1
  assert not (folder / "refused").exists() and not list(folder.glob(".refused*"))


def test_a_full_disk_is_told_first(made, monkeypatch, capsys):
  folder, _, _ = made
  usage = type("Usage", (), {"free": 1000})
  monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
  assert cli.main(["convert", str(folder / "run"), "--to=hf", f"--out={folder / 'full'}"]) == DISK
  assert "GB are to be written" in capsys.readouterr().err
  assert not list(folder.glob("*full*"))


def test_foreign_marks_become_ours(made, tmp_path):
  folder, _, _ = made
  content = json.loads((folder / "hf" / "tokenizer.json").read_text())
  names = {"<bos>": "<s>", "<eos>": "</s>", "<user>": "<x1>", "<assistant>": "<x2>",
           "<image>": "<picture>"}
  for token in content["added_tokens"]:
    token["content"] = names.get(token["content"], token["content"])
  vocab = content["model"]["vocab"]
  content["model"]["vocab"] = {names.get(token, token): row for token, row in vocab.items()}
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(
    {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>"}))
  inner, new = hf_text.read(tmp_path, tiny_llava.ROWS)
  assert new == ["<user> is new", "<assistant> is new", "<image> takes the place of <picture>"]
  assert inner.token_to_id("<eos>") == vocab["<eos>"] and inner.token_to_id("<user>") == 270
  inner, new = hf_text.read(tmp_path, 271)
  assert new == ["<user> is new", "<assistant> takes the place of <picture>",
                 "<image> takes the place of <x2>"]
  assert Tokenizer(inner).assistant == vocab["<image>"]
  assert Tokenizer(inner).decode(Tokenizer(inner).encode("a red circle")) == "a red circle"
  content["added_tokens"] = [token for token in content["added_tokens"]
                             if "x" not in token["content"]]
  (tmp_path / "tokenizer.json").write_text(json.dumps(content))
  with pytest.raises(UsageError, match="no room for the mark <assistant>: all 270 rows"):
    hf_text.read(tmp_path, 270)
  (tmp_path / "tokenizer.json").write_text("{")
  with pytest.raises(DataError, match="not a usable tokenizer.json"):
    hf_text.read(tmp_path, tiny_llava.ROWS)


def test_adapters_are_merged_or_written_alone(made, capsys):
  folder, config, flat = made
  config = config.copy_and_resolve_references()
  config.lora.update(rank=2, alpha=6.0)
  drawn = tiny_llava.noise(config, seed=1)
  both = {path: flat.get(path, leaf) for path, leaf in drawn.items()}
  tiny_llava.write_run(folder / "lora", config, both)
  assert cli.main(["convert", str(folder / "lora"), "--to=hf", f"--out={folder / 'merged'}",
                   "--check"]) == 0
  assert "adapters merged; 34 arrays" in capsys.readouterr().out
  with safetensors_io.Reader(folder / "merged") as reader:
    got = reader["language_model.model.layers.1.self_attn.v_proj.weight"]
  at = lambda path: both[f"llm/layers/attention/value/{path}"][1].reshape(32, -1)
  product = at("lora_a") @ both["llm/layers/attention/value/lora_b"][1].reshape(2, -1)
  np.testing.assert_allclose(got, (at("kernel") + 3.0 * product).T, rtol=1e-5, atol=1e-6)
  assert cli.main(["convert", str(folder / "lora"), "--to=peft", f"--out={folder / 'peft'}"]) == 0
  config.lora.init, config.llm.init = str(folder / "peft"), str(folder / "run")
  _, leaves = states.initializer(find_fusion(config), config)
  found = initial.read(config, leaves)
  assert set(found) == {path for path in both if path.startswith("llm/")}
  for path, leaf in found.items():
    np.testing.assert_array_equal(leaf, both[path], err_msg=path)


def test_a_gguf_file_becomes_a_checkpoint(made, capsys):
  folder, config, flat = made
  inner = json.loads((folder / "tokenizer.json").read_text())
  tokens = sorted(inner["model"]["vocab"], key=inner["model"]["vocab"].get)
  tokens += [f"<x{row}>" for row in range(len(tokens), tiny_llava.ROWS)]
  names = {"<bos>": "<s>", "<eos>": "</s>"}
  mine = {path.removeprefix("llm/"): a for path, a in flat.items() if path.startswith("llm/")}
  llama_gguf(folder / "a.gguf", mine, config.llm, **{
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [names.get(token, token) for token in tokens],
    "tokenizer.ggml.merges": [" ".join(pair) for pair in inner["model"]["merges"]],
    "tokenizer.ggml.token_type": [3 if token.startswith("<") and len(token) > 2 else 1
                                  for token in tokens],
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2})
  assert cli.main(["convert", str(folder / "a.gguf"), "--from=gguf", f"--out={folder / 'llama'}",
                   "--dtype=float32", "--check"]) == 0
  assert "yet to learn" not in capsys.readouterr().out
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    folder / "llama", output_loading_info=True)
  assert not any(info.values()), info
  np.testing.assert_array_equal(
    model.model.layers[1].mlp.up_proj.weight.detach().numpy(),
    flat["llm/layers/mlp/up/kernel"][1].T.astype(np.float16).astype(np.float32))
  theirs = transformers.AutoTokenizer.from_pretrained(folder / "llama")
  ours = load_tokenizer(str(folder / "llama" / "vlm_tokenizer.json"))
  text = "what is this? a red circle 12"
  assert theirs(text)["input_ids"] == ours.encode(text) == Tokenizer(
    load_tokenizer(str(folder / "tokenizer.json")).inner).encode(text)
  assert (ours.bos, ours.eos, theirs.eos_token) == (1, 2, "</s>")


def test_every_recipe_has_the_new_fields():
  config = base.get_config()
  assert config.lora.rank == 0 and not any(
    config[node].init for node in ("tower", "connector", "llm", "lora"))
  assert table.dtype_of("bfloat16") == ml_dtypes.bfloat16
  assert llava.parts(tiny_llava.get_config())[0][0] == "tower/"
