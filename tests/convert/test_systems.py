"""`vlm-jax convert` of every published system: theirs, a run that is used, theirs again.

The tiny models are those that parity is measured with; their tokenizer has as many words as their
embedding rows, under the names and roles of the published one.
"""

import functools
import json
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image

import vlm_jax
from tests.convert import (
  test_idefics_parity,
  test_instructblip_parity,
  test_llava_next_parity,
  test_llava_parity,
  test_paligemma_parity,
  test_two_towers_parity,
)
from vlm_jax import runs
from vlm_jax.cli import main as cli
from vlm_jax.configs import base
from vlm_jax.convert import safetensors_io, systems, table
from vlm_jax.core.errors import USAGE, UsageError

VOCAB = 61
# Words of a published tokenizer by id, where a system has its own, and the roles that it tells.
ENDS = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "<x1>", 4: "<x2>", 60: "<image>"}
LLAVA = (ENDS, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"})
CLIP = ({39: "<|startoftext|>", 40: "<|endoftext|>"},
        {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
         "pad_token": "<|endoftext|>"})
SIGLIP = ({0: "<pad>", 1: "<eos>", 2: "<bos>"},
          {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"})
GEMMA = ({**SIGLIP[0], 3: "\n", 60: "<image>"}, SIGLIP[1])
CLOSED = {"clip": ([39], [40]), "siglip": ([], [1]), "siglip2": ([], [1])}  # ends of a caption


def paligemma():
  torch.manual_seed(0)
  model = transformers.PaliGemmaForConditionalGeneration._from_config(
    test_paligemma_parity.their_config(0))
  with torch.no_grad():
    for weight in model.parameters():
      weight.normal_(0, 0.3)
  return model


def instructblip():
  torch.manual_seed(0)
  model = transformers.InstructBlipForConditionalGeneration._from_config(
    test_instructblip_parity.their_config("t5"))
  with torch.no_grad():
    for weight in model.parameters():
      weight.normal_(0, 0.3)
  return model


def idefics():
  torch.manual_seed(0)
  model = transformers.IdeficsForVisionText2Text._from_config(test_idefics_parity.their_config(1))
  with torch.no_grad():
    for weight in model.parameters():
      weight.normal_(0, 0.3)
  return model


# Their model, its tokenizer, what our config then is.
SYSTEMS = {
  "idefics": (idefics, LLAVA, "flamingo"),
  "instructblip": (instructblip, LLAVA, "instructblip_t5"),
  "llava": (lambda: test_llava_parity.their_model(0), LLAVA, "concat"),
  "llava_next": (test_llava_next_parity.their_model, LLAVA, "llava_next"),
  "paligemma": (paligemma, GEMMA, "prefix_lm"),
  "clip": (lambda: test_two_towers_parity.their_model("clip"), CLIP, "clip"),
  "siglip": (lambda: test_two_towers_parity.their_model("siglip"), SIGLIP, "siglip"),
  "siglip2": (lambda: test_two_towers_parity.their_model("siglip2"), SIGLIP, "siglip"),
}
SPEAKING = ("concat", "flamingo", "instructblip_t5", "llava_next", "prefix_lm")
RECIPE = """from vlm_jax.configs import base

def get_config(arg=""):
  config = base.get_config()
  config.attention.update(block_q=16, block_k=16)
  config.data.update(rows=2, tokens=200, images=10)
  config.data.sources.only = base.source(name="coco", path={path!r})
  config.train.compilation_cache = {cache!r}
  config.train.trackers = ()
  return config
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A recipe, and a split of eight pictures with a word each."""
  folder = tmp_path_factory.mktemp("data")
  rng = np.random.default_rng(0)
  images, captions = [], []
  for number in range(8):
    pixels = rng.integers(0, 256, (12, 20, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{number}.png")
    images.append({"id": number, "file_name": f"{number}.png"})
    captions.append({"id": number, "image_id": number, "caption": f"w1{number} w2{number}"})
  (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": captions}))
  (folder / "recipe.py").write_text(RECIPE.format(
    path=str(folder / "coco.json"), cache=str(folder / "cache")))
  return folder


def write_tokenizer(folder, words, roles):
  """A tokenizer.json of words parted by spaces, and the tokenizer_config.json beside it."""
  vocab = {words.get(row, f"w{row}"): row for row in range(VOCAB)}
  inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w7"))
  inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "removed")
  inner.add_special_tokens([word for word in words.values() if word.startswith("<")])
  ends = {id(CLIP[0]): "<|startoftext|> $A <|endoftext|>", id(SIGLIP[0]): "$A <eos>"}.get(id(words))
  if ends:
    inner.post_processor = tokenizers.processors.TemplateProcessing(single=ends, special_tokens=[
      (word, row) for row, word in words.items() if word in ends.split()])
  inner.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps(roles))


def write_reader(folder, size):
  """The tokenizer of a Q-Former: as many words, and marks at both ends of a text."""
  vocab = {{0: "[PAD]", 1: "[CLS]", 2: "[SEP]"}.get(row, f"w{row + 10}"): row
           for row in range(size)}
  inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w17"))
  inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "removed")
  inner.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
  inner.post_processor = tokenizers.processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
  folder.mkdir()
  inner.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))


def convert(*flags):
  assert cli.main(["convert", *map(str, flags)]) == 0


@functools.cache
def their_model(system):
  return SYSTEMS[system][0]()


def tensors(directory):
  """Bytes by key, in the spelling that is written, without the norm that a LLaVA never reads."""
  rename = table.renamer(test_llava_parity.llava.SPELLINGS)
  with safetensors_io.Reader(directory) as reader:
    return {rename(key): reader[key].tobytes() for key in reader.shapes}


@pytest.mark.parametrize("system", SYSTEMS)
def test_there_and_back(system, data, tmp_path, capsys):
  _, (words, roles), strategy = SYSTEMS[system]
  model, theirs, run = their_model(system), tmp_path / "theirs", tmp_path / "run"
  model.save_pretrained(theirs)
  write_tokenizer(theirs, words, roles)
  if system == "instructblip":
    write_reader(theirs / "qformer_tokenizer", test_instructblip_parity.READS)
  convert(theirs, "--from=hf", f"--out={run}", f"--config={data / 'recipe.py'}", "--check")
  bundle = vlm_jax.load(run)
  config, step = bundle.config, bundle.step
  assert config.fusion.name == strategy and step == 0
  capsys.readouterr()
  slots = 0
  if strategy not in SPEAKING:
    assert cli.main(["evaluate", f"--workdir={run}", "--json", "--new", "names", "kind=zero_shot",
                     "source=only", "form=single", "split=train",
                     "controls=('shuffled',)"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["evals"]["names"]
    assert found["classes"] == found["pictures"] == 8
  elif system != "llava":  # which generates in test_convert.py
    assert cli.main(["generate", f"--workdir={run}", "--prompt=w20 w30", "--max-tokens=5",
                     f"--image={data / '0.png'}", "--json"]) == 0
    slots = json.loads(capsys.readouterr().out)["image_tokens"]
  convert(run, "--to=hf", f"--out={tmp_path / 'ours'}", "--check")
  said = capsys.readouterr().out
  assert "arrays read back" in said and ("logits within" in said) == (strategy in SPEAKING)
  loaded, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
  assert not any(info.values()), info
  mine, before = tensors(tmp_path / "ours"), tensors(theirs)
  unread = {key for key in before if "post_layernorm" in key and
            system.startswith(("llava", "idefics"))}
  assert mine.keys() == before.keys() and len(before) > 30
  assert not [key for key in before if key not in unread and mine[key] != before[key]]
  tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "ours")
  row = {word: row for row, word in words.items()}
  opened, closed = CLOSED.get(system, ([], []))
  assert tokenizer("w20 w30")["input_ids"] == [*opened, 20, 30, *closed]
  if strategy not in SPEAKING:  # its files are theirs, bytes equal
    assert tokenizer.eos_token == roles["eos_token"]
    assert (run / "tokenizer" / "tokenizer.json").read_bytes() == (
      theirs / "tokenizer.json").read_bytes() == (
      tmp_path / "ours" / "tokenizer.json").read_bytes()
  else:
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<bos>", "<eos>")
  if slots and system != "idefics":  # whose pictures have no slots there either
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "ours")
    text = "w20" if system == "instructblip" else "<image> w20"  # which puts it there itself
    inputs = processor(images=Image.open(data / "0.png"), text=text, return_tensors="np")
    assert int((inputs["input_ids"] == row["<image>"]).sum()) == slots > 1
    if system == "instructblip":
      assert inputs["qformer_input_ids"].tolist() == [[1, 10, 2]]
      assert bundle.tokenizer.reader.encode("w20") == [1, 10, 2]


def test_one_dtype_for_all(data, tmp_path):
  for system in ("clip", "paligemma"):
    theirs, run = tmp_path / system, tmp_path / f"{system} run"
    their_model(system).save_pretrained(theirs)
    write_tokenizer(theirs, *SYSTEMS[system][1])
    convert(theirs, "--from=hf", f"--out={run}", f"--config={data / 'recipe.py'}",
            "--dtype=bfloat16")
    assert runs.frozen(run).precision.param == "bfloat16"
    out = tmp_path / f"{system} out"
    convert(run, "--to=hf", f"--out={out}", "--dtype=float32", "--check")
    assert safetensors_io.read_json(out / "config.json")["dtype"] == "float32"
    with safetensors_io.Reader(out) as reader:
      assert {reader[key].dtype.name for key in reader.shapes} == {"float32"}


def test_what_has_no_converter_is_named(data, tmp_path, capsys):
  transformers.GPT2Config(n_layer=1).save_pretrained(tmp_path / "gpt2")
  assert cli.main(["convert", str(tmp_path / "gpt2"), "--from=hf", f"--out={tmp_path / 'run'}",
                   f"--config={data / 'recipe.py'}"]) == USAGE
  said = capsys.readouterr().err
  assert "model_type is 'gpt2'" in said and said.count("\n") == 1
  kinds = ("clip", "idefics", "instructblip", "llava", "llava_next", "paligemma", "siglip2")
  assert all(kind in said for kind in kinds)
  assert not (tmp_path / "run").exists()
  config = base.get_config()
  config.fusion.name = "simvlm"
  known = "blip2, .*clip, coca, concat, flamingo, instructblip.*, llava_next, prefix"
  with pytest.raises(UsageError, match=f"fusion.name is 'simvlm'.*{known}"):
    systems.converter(config)
