"""Texts of imported checkpoints through the commands: ids, scores, prompts and files are theirs."""

import io
import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import pytest
import torch
import transformers
from PIL import Image as PIL

import vlm_jax
from tests.data import test_chat
from tests.data import tokenizers_of_others as others
from vlm_jax.cli import main as cli
from vlm_jax.configs import base
from vlm_jax.convert import hf_text, systems
from vlm_jax.core.document import Document, Image, Text
from vlm_jax.core.errors import USAGE, DiskError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.data import pipeline, template
from vlm_jax.evals import embed

LENGTH, PATCH, SIDE = 16, 5, 15
SIZES = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3)
VISION = SIZES | dict(patch_size=PATCH, image_size=SIDE)
RECIPE = """from vlm_jax.configs import base

def get_config(arg=""):
  config = base.get_config()
  config.attention.update(block_q=16, block_k=16)
  config.data.update(rows=1, tokens=200, images=10)
  config.data.sources.only = base.source(name="pydoc")
  return config
"""
CAPTIONS = ("a photo of a circle", "A Photo, of the BLUE Square!!", "yes, no.", "the lazy fox " * 9)
TWO_TOWERS = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}


def noise(model):
  torch.manual_seed(0)
  with torch.no_grad():
    for weight in model.parameters():
      weight.normal_(0, 0.3)
  return model.eval()


def convert(*flags):
  return cli.main(["convert", *map(str, flags)])


def two_towers(kind, folder):
  """A checkpoint with its tokenizer and processor, as transformers writes it."""
  vocab = getattr(others, kind)(folder, LENGTH)
  text = SIZES | dict(vocab_size=vocab, max_position_embeddings=LENGTH)
  vision = VISION | (dict(num_patches=9) if kind == "siglip2" else {})
  if kind == "clip":
    text |= dict(eos_token_id=vocab - 1, bos_token_id=vocab - 2, pad_token_id=vocab - 1)
  else:
    text |= dict(projection_size=24)
  made = getattr(transformers, TWO_TOWERS[kind] + "Config")(text_config=text, vision_config=vision)
  model = noise(getattr(transformers, TWO_TOWERS[kind] + "Model")._from_config(made))
  model.save_pretrained(folder)
  return model


@pytest.mark.parametrize("kind", TWO_TOWERS)
def test_captions_of_two_towers(kind, tmp_path):
  folder, run, out = tmp_path / "theirs", tmp_path / "run", tmp_path / "out"
  model = two_towers(kind, folder)
  (tmp_path / "recipe.py").write_text(RECIPE)
  assert convert(folder, "--from=hf", f"--out={run}", f"--config={tmp_path / 'recipe.py'}") == 0
  bundle = vlm_jax.load(str(run))
  config, params = bundle.config, bundle.params
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  ids = theirs(list(CAPTIONS), padding="max_length", max_length=LENGTH, truncation=True,
               return_tensors="pt")["input_ids"]
  words = pipeline.load_tokenizer(config)
  encoded = [template.encode(Document((Text(text, loss=True),), "", text), words, None)
             for text in CAPTIONS]
  assert [part.parts[0].ids.tolist() for part in encoded] == ids.tolist()
  with torch.no_grad():
    expected = model.get_text_features(input_ids=ids)
    expected = getattr(expected, "pooler_output", expected)
  expected = torch.nn.functional.normalize(expected, dim=-1).numpy()
  ours = embed.texts(config, params, encoded, rows=4)
  assert np.abs(ours - expected).max() < 2e-5 * np.abs(expected).max()
  assert np.abs(np.roll(ours, 1, 0) - expected).max() > 2e-3  # they are different texts
  assert convert(run, "--to=hf", f"--out={out}", "--check") == 0
  again = transformers.AutoTokenizer.from_pretrained(out)
  assert type(again) is type(theirs)
  assert again(list(CAPTIONS), padding="max_length", max_length=LENGTH, truncation=True)[
    "input_ids"] == ids.tolist()


def llava(folder, source):
  """A LLaVA-1.5 with a tokenizer and a chat template, as transformers writes it."""
  make, roles, image = test_chat.LLAMA
  others.save(make(), folder, **roles)
  tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
  config = transformers.LlavaConfig(
    vision_config=transformers.CLIPVisionConfig(**VISION),
    text_config=transformers.LlamaConfig(vocab_size=530, num_key_value_heads=3, **SIZES),
    image_token_id=tokenizer.convert_tokens_to_ids(image), vision_feature_layer=-2)
  model = noise(transformers.LlavaForConditionalGeneration._from_config(config))
  model.save_pretrained(folder)
  images = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE)
  transformers.LlavaProcessor(
    images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
    chat_template=source, num_additional_image_tokens=1).save_pretrained(folder)
  return model


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
  folder = tmp_path_factory.mktemp("llava")
  model = llava(folder / "theirs", test_chat.VICUNA)
  (folder / "recipe.py").write_text(RECIPE)
  assert convert(folder / "theirs", "--from=hf", f"--out={folder / 'run'}",
                 f"--config={folder / 'recipe.py'}", "--check") == 0
  pixels = np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8)
  PIL.fromarray(pixels).save(folder / "a.png")
  return folder, model


def test_a_conversation_has_their_input_ids(imported):
  folder, model = imported
  config = vlm_jax.load(str(folder / "run")).config
  assert config.data.template == "checkpoint"
  processor = transformers.AutoProcessor.from_pretrained(folder / "theirs")
  words, decode = pipeline.load_tokenizer(config), pipeline.image_decoder(config)
  said = lambda role, text, *more: {"role": role, "content": [*more, {
    "type": "text", "text": text}]}
  for width, height in ((1, 1), (31, 20), (15, 15), (200, 90)):
    file = io.BytesIO()
    picture = PIL.fromarray(np.full((height, width, 3), width, np.uint8))
    picture.save(file, "png")
    shown = {"type": "image", "image": picture}
    theirs = processor.apply_chat_template(
      [said("user", "what is it?", shown, shown), said("assistant", "yes"), said("user", "no")],
      tokenize=True, return_dict=True, add_generation_prompt=True)
    parts = (Image(file.getvalue()), Image(file.getvalue()), Text("what is it?", "user"),
             Text("yes", "assistant"), Text("no", "user"), Text("", "assistant"))
    encoded = template.encode_prompt(Document(parts, "", "key"), words, decode)
    arrays = find_fusion(config).layout(encoded, config, None).arrays
    ids = np.where(arrays["streams/text/fill"] >= 0, words.image, arrays["streams/text/tokens"])
    assert ids.tolist() == theirs["input_ids"][0]


def test_it_answers_as_theirs(imported):
  folder, model = imported
  bundle = vlm_jax.load(str(folder / "run"))
  mine = bundle.answer("what is it?", [folder / "a.png"], max_tokens=8)
  processor = transformers.AutoProcessor.from_pretrained(folder / "theirs")
  turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
  inputs = processor(images=PIL.open(folder / "a.png"), return_tensors="pt",
                     text=processor.apply_chat_template(turn, add_generation_prompt=True))
  with torch.no_grad():
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False,
                         eos_token_id=processor.tokenizer.eos_token_id)[0]
  assert inputs["input_ids"].shape[1] == mine.prompt_tokens
  theirs = out[inputs["input_ids"].shape[1]:].tolist()
  assert theirs[: len(mine.tokens)] == list(mine.tokens) and len(set(theirs)) > 2


def test_its_files_are_written_again(imported):
  folder, _ = imported
  assert convert(folder / "run", "--to=hf", f"--out={folder / 'out'}", "--check") == 0
  for name in ("tokenizer.json", "chat_template.jinja"):
    assert (folder / "out" / name).read_bytes() == (folder / "theirs" / name).read_bytes(), name
  settings = json.loads((folder / "out" / "tokenizer_config.json").read_text())
  before = json.loads((folder / "theirs" / "tokenizer_config.json").read_text())
  assert before.items() <= settings.items()
  back = transformers.AutoProcessor.from_pretrained(folder / "out")
  assert back.chat_template == test_chat.VICUNA
  before = transformers.AutoProcessor.from_pretrained(folder / "theirs")
  picture = PIL.open(folder / "a.png")
  ids, again = (one(images=picture, text="<image> what")["input_ids"] for one in (before, back))
  assert ids == again
  config = vlm_jax.load(str(folder / "run")).config
  assert (config.data.decode.fit, config.data.decode.kernel) == ("center_crop", "bicubic")
  made = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE)
  ours = pipeline.image_decoder(config)(Image((folder / "a.png").read_bytes())).values
  ours = (ours / 255 - np.array(config.tower.mean)) / np.array(config.tower.std)
  theirs = np.asarray(made(picture, return_tensors="np")["pixel_values"])[0].transpose(1, 2, 0)
  assert np.abs(ours - theirs).max() < 1e-5


def test_a_tokenizer_that_cannot_be_kept(imported, tmp_path, monkeypatch):
  """A full disk leaves nothing, and another process that was faster has written the same."""
  theirs = imported[0] / "theirs"
  config = systems.read_config(theirs, base.get_config())

  def full(path, content):
    raise OSError(28, "full")

  with monkeypatch.context() as patch:
    patch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiskError, match=r"cannot be written \(full\)"):
      systems.adopt_tokenizer(theirs, config, tmp_path / "a")
  assert os.listdir(tmp_path / "a") == []
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(DiskError, match="config.data.tokenizer .*file/tokenizer cannot be written"):
    systems.adopt_tokenizer(theirs, config, tmp_path / "file")
  keep = hf_text.keep

  def slow(directory, made):
    keep(directory, made)
    shutil.copytree(made, tmp_path / "b" / hf_text.FOLDER)

  monkeypatch.setattr(hf_text, "keep", slow)
  systems.adopt_tokenizer(theirs, config, tmp_path / "b")
  assert os.listdir(tmp_path / "b") == [hf_text.FOLDER]


def test_refusals(imported, capsys):
  folder, _ = imported
  for template_, sentence, code in (
    ("{% for", "config.data.template: the chat template cannot be used", USAGE),
    ("newlin", "did you mean 'newline'", USAGE)):
    capsys.readouterr()
    assert convert(folder / "theirs", "--from=hf", f"--out={folder / 'bad'}",
                   f"--config={folder / 'recipe.py'}", f"--config.data.template={template_}"
                   ) == code
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and not (folder / "bad").exists()
