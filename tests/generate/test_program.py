"""`vlm-jax convert --to=jax`: programs that say the same in a process that has JAX alone."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax import export

import vlm_jax
from tests.data.broken_source import png
from tests.fusion import contrast
from tests.generate import helpers
from vlm_jax.cli import main as cli
from vlm_jax.core.document import Encoded, Image, Pixels, Tokens
from vlm_jax.core.errors import USAGE, UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.tree import unflatten
from vlm_jax.data import pipeline, template, tokenizer
from vlm_jax.evals import embed
from vlm_jax.generate import program
from vlm_jax.generate.answer import ask
from vlm_jax.train import checkpoint_tools, state

QUESTION, NEW, TOLERANCE = "what is it?", 5, 2e-5
SPEAKING = ("prefix_lm", "simvlm")
COMPARING = ("clip", "blip2_qformer")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  path = tmp_path_factory.mktemp("words") / "tokenizer.json"
  tokenizer.train(["what is it? a picture of a thing, and of no other thing"] * 3, 270
                  ).save(str(path))
  return path


def speaker(fusion, words):
  config = helpers.tiny(fusion)
  config.llm.vocab_size = 270
  config.data.tokenizer = str(words)
  return config, helpers.noise(config)


def embedder(fusion, words):
  config = contrast.get_config(fusion)
  config.data.tokenizer = str(words)
  config.llm.update(vocab_size=270, eos=2)
  config.connector.vocab_size = 270
  _, leaves = state.initializer(find_fusion(config), config)
  rng = np.random.default_rng(0)
  return config, unflatten({
    path: rng.normal(0, 0.3, leaf.shape).astype(np.float32) for path, leaf in leaves.items()})


def encoded(config, folder):
  picture = Image((folder / "a.png").read_bytes())
  return template.encode_prompt(ask(config, QUESTION, [picture]), pipeline.load_tokenizer(config),
                                pipeline.image_decoder(config))


@pytest.fixture(scope="module")
def made(words, tmp_path_factory):
  """Every model, its directory, and what came out of it elsewhere."""
  folder = tmp_path_factory.mktemp("programs")
  (folder / "a.png").write_bytes(png(1, 40))
  models = {name: speaker(name, words) for name in SPEAKING} | {
    name: embedder(name, words) for name in COMPARING}
  for name, (config, params) in models.items():
    run = folder / f"{name} run"
    run.mkdir()
    checkpoint_tools.write_run(run, config.to_json(), 7, params, {})
    flags = ["--prompt-tokens=12", f"--new-tokens={NEW}"] if name in SPEAKING else []
    assert cli.main(["convert", str(run), "--to=jax", f"--out={folder / name}", *flags]) == 0
    if name in SPEAKING:
      given = {"pixels": encoded(config, folder).images[0][None, None],
               "words": np.array(tokenizer.load(str(words)).encode(QUESTION))}
    else:
      side = config.tower.image_size
      given = {"pixels": np.random.default_rng(2).integers(0, 256, (3, side, side, 3), np.uint8),
               "tokens": np.random.default_rng(3).integers(1, 200, (2, 7)).astype(np.int32)}
      given["tokens"][:, -1] = config.llm.eos
    np.savez(folder / name / "inputs.npz", **given)
  done = subprocess.run(
    [sys.executable, Path(__file__).with_name("alone.py"), *(folder / name for name in models)],
    capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr[-3000:]
  return folder, models


def error(ours, theirs):
  assert np.isfinite(theirs).all() and np.ptp(theirs) > 0
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("name", SPEAKING)
def test_a_program_says_what_generate_says(name, made):
  folder, models = made
  config, params = models[name]
  said = vlm_jax.Bundle(config, params).answer(QUESTION, [folder / "a.png"], max_tokens=NEW)
  outputs = np.load(folder / name / "outputs.npz")
  assert outputs["result"].tolist() == list(said.tokens) and len(said.tokens) > 2
  prompt = encoded(config, folder)
  ids = np.array(list(said.tokens), np.int32)
  told = Tokens(ids, np.ones(len(ids), bool), prompt.parts[-1].branch, prompt.parts[-1].turn)
  whole = dataclasses.replace(prompt, parts=(*prompt.parts, told))
  ((logits, _),) = helpers.forward(config, params, [whole])
  count = len(outputs["logits"])
  expected = logits[len(logits) - len(said.tokens) - 1 :][:count]
  off = error(outputs["logits"], expected)
  moved = error(outputs["twin"], expected[0])
  print(f"{name}: logits of {count} tokens {off:.1e}, a parameter changed {moved:.1e}")
  assert off < TOLERANCE and moved > 100 * TOLERANCE


@pytest.mark.parametrize("name", COMPARING)
def test_a_program_embeds_what_evaluation_embeds(name, made):
  folder, models = made
  config, params = models[name]
  given = np.load(folder / name / "inputs.npz")
  pictures = [Encoded((Pixels(pixels),), "pairs", "") for pixels in given["pixels"]]
  texts = [Encoded((Tokens(ids, np.zeros(len(ids), bool)),), "pairs", "")
           for ids in given["tokens"]]

  def embedded(params):
    cosines = embed.images(config, params, pictures, 3) @ embed.texts(config, params, texts, 2).T
    return cosines.max(axis=1) if cosines.ndim > 2 else cosines  # of the queries of BLIP-2

  outputs = np.load(folder / name / "outputs.npz")
  off = error(outputs["result"], embedded(params))
  projection = params["text_projection"]
  twin = dict(params, text_projection=projection | {"kernel": projection["kernel"][::-1]})
  print(f"{name}: cosines {off:.1e}")
  assert off < TOLERANCE < error(outputs["result"], embedded(twin)) / 100


def test_programs_are_for_every_platform(made):
  folder, _ = made
  for path in folder.glob("*/*.jax"):
    assert export.deserialize(bytearray(path.read_bytes())).platforms == ("cpu", "tpu", "cuda")
  assert len(list(folder.glob("*/*.jax"))) == 8
  assert {path.name for path in (folder / "clip").iterdir()} > {
    "params.safetensors", "config.json", "tokenizer.json", "README.md"}


@pytest.mark.parametrize("name", ["concat", "prefix_lm", "simvlm", "llava_next"])
@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_shorter_prompts_are_the_longest_cut(name, pictures, words):
  config = helpers.tiny("concat" if name == "llava_next" else name)
  config.fusion.update(name=name, image_attention="causal")
  config.llm.vocab_size, config.data.tokenizer = 270, str(words)
  tokens = pipeline.load_tokenizer(config)
  decode_image = lambda _: helpers.picture(0)
  prompt = template.encode_prompt(ask(config, QUESTION, [Image(b"")] * pictures), tokens,
                                  decode_image)
  form = program.form(config, prompt, 14)
  ids = np.concatenate([part.ids for part in program.split(prompt)[1]])
  assert len(ids) < 14 and find_fusion(config).STREAM == form.stream
  if pictures and name != "simvlm":  # whose encoder has room for the longest prompt, not for more
    opening = Tokens(np.array([11, 12, 13], np.int32), np.zeros(3, bool))
    opened = dataclasses.replace(prompt, parts=(opening, *prompt.parts))
    flat = program.form(config, opened, 14).prompts.flat
    assert flat[f"streams/{form.stream}/tokens"][0, :3].tolist() == [11, 12, 13]
  one = dict(vars(form), growing=frozenset())
  with pytest.raises(UsageError, match="cannot derive"):
    program.check(config, prompt, program.Form(**one))


def test_refusals(made, capsys):
  folder, _ = made
  assert cli.main(["convert", str(folder / "clip run"), "--to=jax", f"--out={folder / 'x'}",
                   "--new-tokens=0"]) == USAGE
  said = capsys.readouterr().err
  assert "--new-tokens" in said and said.count("\n") == 1
  assert not (folder / "x").exists() and not list(folder.glob(".x*"))
