"""The recipe of published pieces at the size of a test: files of their kinds, written here."""

import json

import jax
import numpy as np
import pytest
import torch
from PIL import Image

import vlm_jax
from tests.convert import written
from tests.convert.test_packages import vocabulary
from tests.fusion import testing
from vlm_jax import recipes, runs
from vlm_jax.cli import main as cli
from vlm_jax.cli.config import override
from vlm_jax.convert import gguf, gguf_llama, packages, table
from vlm_jax.core.adapters import is_adapter
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Encoded, Pixels, Tokens
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.tree import unflatten
from vlm_jax.llm import llama
from vlm_jax.towers import efficientnet_lite0
from vlm_jax.train import checkpoint_tools
from vlm_jax.train import state as states
from vlm_jax.train.loop import train

RECIPE = "configs/llava_smollm2.py"


def test_the_whole_recipe_is_the_published_pieces():
  config = recipes.load(RECIPE)
  override(config, [("data.root", "elsewhere")])
  assert config.llm.init.startswith("elsewhere/weights/")
  files = {f"elsewhere/weights/{entry.file.split('/')[-1]}" for entry in config.weights.values()}
  assert files == {config.llm.init, config.tower.init}
  assert config.data.tokenizer == str(packages.tokenizer_of(config.llm.init))
  _, leaves = states.initializer(find_fusion(config), config)
  size = lambda node: sum(int(np.prod(leaf.shape)) for path, leaf in leaves.items()
                          if path.startswith(f"{node}/"))
  assert size("llm") == 134_515_008
  assert {key: config.llm[key] for key in llama.SIZES["smollm2-135m"]} == (
    llama.SIZES["smollm2-135m"])


class Loader:
  """Two captions, one of them two questions where the recipe asks; the same in every step."""

  def __init__(self, config, start=None):
    del start
    rng = np.random.default_rng(0)
    side = config.tower.image_size
    picture = Pixels(rng.integers(0, 256, (side, side, 3)).astype(np.uint8))
    said = lambda branch: Tokens(np.arange(5, 11, dtype=np.int32) + branch,
                                 np.arange(6) > 3, branch)
    asked = "easy_vqa" in config.data.sources
    documents = [Encoded((picture, said(1), said(2)), "easy_vqa", "a") if asked
                 else Encoded((picture, said(0)), "shapes", "a"),
                 Encoded((picture, said(0)), "names", "b")]
    self.flat = testing.pack(testing.lay_out(documents, config), config)[0]

  def __next__(self):
    return self.flat, {}

  def state(self):
    return {}


def tiny(words, folder, **fields):
  """The debug recipe, smaller still, that starts from the files of `folder`."""
  config = recipes.load(f"{RECIPE}:{words}debug")
  config.data.update(tokenizer=f"{folder}/tiny.tokenizer.json", rows=1, tokens=48, images=2)
  config.llm.update(init=f"{folder}/tiny.gguf",
                    vocab_size=len(vocabulary()["tokenizer.ggml.tokens"]))
  config.tower.update(init=f"{folder}/tiny.pth", image_size=32)
  config.connector.update(factor=1, **fields)
  config.train.update(steps=2, log_every=1, trackers=(), compilation_cache=f"{folder}/cache")
  return config


@pytest.mark.parametrize("words", ["debug", "connector,debug", "lora,debug"])
def test_the_debug_recipe_is_a_model(words):
  config = recipes.load(f"{RECIPE}:{words}")
  assert len(find_fusion(config).rows(config)) == 1
  assert not config.weights and not config.llm.init and not config.tower.init


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """Both stages, from files of the published kinds, and the parameters in those files."""
  folder = tmp_path_factory.mktemp("smollm2")
  config = tiny("", folder)
  _, leaves = states.initializer(find_fusion(config), config)
  rng = np.random.default_rng(0)
  draw = lambda path, leaf: (
    np.abs(rng.normal(1, 0.1, leaf.shape)) if path.endswith(("scale", "variance"))
    else rng.normal(0, 0.1, leaf.shape)).astype(np.float16).astype(np.float32)
  flat = {path: draw(path, leaf) for path, leaf in leaves.items()
          if not path.startswith("connector/")}
  of = lambda node: {path.partition("/")[2]: leaf for path, leaf in flat.items()
                     if path.startswith(f"{node}/")}
  written.llama_gguf(folder / "tiny.gguf", of("llm"), config.llm, **vocabulary(), **{
    "llama.rope.freq_base": 1e5})
  rows = table.entries([("", "", efficientnet_lite0.KEYS)],
                       {path: leaf.shape for path, leaf in of("tower").items()})
  torch.save({key: torch.from_numpy(np.array(tensor.get()))
              for key, tensor in table.export(unflatten(of("tower")), rows).items()},
             folder / "tiny.pth")
  with gguf.Reader(folder / "tiny.gguf") as reader:
    tokenizer, _ = gguf_llama.our_tokenizer(reader, config.data.template)
  tokenizer.save(str(folder / "tiny.tokenizer.json"))
  train(config, folder / "connector", make_loader=Loader)
  train(tiny("lora,", folder, init=str(folder / "connector")), folder / "lora", make_loader=Loader)
  return folder, flat


def params_of(run):
  arrays = checkpoint_tools.sound(*checkpoint_tools.locate(str(run)), ("params",)).arrays
  return {path.removeprefix("params/"): np.asarray(array) for path, array in arrays.items()}


def text_logits(run):
  """Of a row of text alone, with the run's parameters."""
  bundle = vlm_jax.load(str(run))
  config, params = bundle.config, bundle.params
  config = config.copy_and_resolve_references()
  module = find_fusion(config)
  length = 12
  flat = {path: np.zeros((1, length if field.axis == "text" else 1, *field.shape), field.dtype)
          for path, field in module.fields(config).items() if not path.startswith("media")}
  flat["streams/text/tokens"][:] = np.arange(5, 5 + length)
  flat["streams/text/positions"][:] = np.arange(length)
  flat["streams/text/segment_ids"][:] = 1
  flat["streams/text/fill"][:] = -1
  flat["masks/text/hi"][:] = np.arange(1, length + 1)
  model = module.Model(config)
  run = jax.jit(lambda params, flat: model.apply({"params": params}, from_flat(flat)).logits())
  return np.asarray(run(params, flat))


def test_what_is_frozen_keeps_its_bits_and_stages_follow(trained):
  folder, flat = trained
  first, second = params_of(folder / "connector"), params_of(folder / "lora")
  for path, array in flat.items():
    np.testing.assert_array_equal(first[path], array, err_msg=path)
    np.testing.assert_array_equal(second[path], array, err_msg=path)
  assert {path for path in second if path not in first} == set(filter(is_adapter, second))
  for path in set(second) - set(flat):
    assert np.any(second[path]) and (path not in first or np.any(first[path] != second[path])), path


def test_text_alone_is_that_of_the_decoder_until_it_has_adapters(trained):
  """Logits equal to the bit before and after the connector learned; adapters change them."""
  folder, flat = trained
  bare = folder / "bare"
  first = params_of(folder / "connector")
  other = {path: array + path.startswith("connector/") for path, array in first.items()}
  config = runs.frozen(folder / "connector")
  checkpoint_tools.write_run(bare, config.to_json(), 0, unflatten(other), {})
  logits = text_logits(folder / "connector")
  assert np.isfinite(logits).all() and logits.std() > 0.01
  np.testing.assert_array_equal(text_logits(bare), logits)
  assert np.abs(text_logits(folder / "lora") - logits).max() > 1e-6
  assert all(np.array_equal(first[path], array) for path, array in flat.items())


def test_the_run_speaks_and_what_cannot_be_exported_says_so(trained, tmp_path, capsys):
  folder, _ = trained
  Image.fromarray(np.full((40, 30, 3), 200, np.uint8)).save(tmp_path / "x.png")
  capsys.readouterr()
  assert cli.main(["generate", f"--workdir={folder}/lora", f"--image={tmp_path}/x.png",
                   "--prompt=lion?", "--json", "--max-tokens=2"]) == 0
  assert isinstance(json.loads(capsys.readouterr().out.splitlines()[-1])["text"], str)
  assert cli.main(["convert", f"{folder}/lora", "--to=hf", f"--out={tmp_path}/hf"]) == 2
  error = capsys.readouterr().err
  assert "'efficientnet_lite0' of vlm_jax/towers has no model_type" in error
  assert "these can be written: " in error and error.count("\n") == 1
  assert not (tmp_path / "hf").exists()
