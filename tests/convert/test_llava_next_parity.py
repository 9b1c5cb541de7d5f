"""Held to `LlavaNextForConditionalGeneration` of transformers: logits, gradients, tokens, files.

Wide, tall and square images, one and two a document and none; theirs runs each alone, ours packed
into two rows.
"""

import dataclasses
import json
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests.convert.packed import Packed
from tests.numbers import error
from vlm_jax.configs import base
from vlm_jax.convert import llava, safetensors_io, systems, table
from vlm_jax.core.document import Encoded, Pixels, Tokens
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.data import images
from vlm_jax.fusion import llava_next
from vlm_jax.generate.decode import generate
from vlm_jax.generate.prompts import layouts, stack

TOLERANCE = 2e-4  # of gradients; measured: at most 4e-6
LOGITS = 2e-5  # measured: at most 3e-6
VOCAB, SIDE, PATCH, NEW = 61, 8, 2, 6
IMAGE = VOCAB - 1  # their placeholder
PINPOINTS = [[8, 16], [16, 8], [16, 16], [24, 8]]
SHARP = ("proj.weight", "position_embedding.weight", "fc1.weight", "fc2.weight", "linear_1.weight",
         "linear_2.weight")
# Heights and widths of the images of every document.
SHAPES = (((20, 50),), ((40, 11), (23, 21)), (), ((9, 9),))
transformers.utils.logging.disable_progress_bar()


def their_model() -> torch.nn.Module:
  torch.manual_seed(0)
  vision = transformers.CLIPVisionConfig(
    hidden_size=21, intermediate_size=37, num_hidden_layers=2, num_attention_heads=3,
    patch_size=PATCH, image_size=SIDE, layer_norm_eps=0.1)
  text = transformers.LlamaConfig(
    hidden_size=28, intermediate_size=53, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=10, vocab_size=VOCAB, rms_norm_eps=0.02, pad_token_id=0,
    bos_token_id=None, eos_token_id=None)
  model = transformers.LlavaNextForConditionalGeneration._from_config(transformers.LlavaNextConfig(
    vision_config=vision, text_config=text, image_token_index=IMAGE,
    image_grid_pinpoints=PINPOINTS), attn_implementation="eager").eval()
  with torch.no_grad():
    for name, weight in model.named_parameters():
      weight.normal_(0, 0.3 if name.endswith(SHARP) else 1.0 if "embed_tok" in name else 0.1)
      if "norm" in name and name.endswith("weight"):
        weight.add_(1)
    model.model.image_newline.normal_(0, 1)
  return model


def documents(config) -> list[Encoded]:
  """Text before, between and behind images, an answer at the end."""
  rng, how, found = np.random.default_rng(0), images.decoding(config), []
  ids = lambda count: rng.integers(1, IMAGE, count).astype(np.int32)
  for number, shapes in enumerate(SHAPES):
    parts = []
    for shape in shapes:
      pixels = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
      parts += [Tokens(ids(2), np.zeros(2, bool)), images.picture(pixels, SIDE, how)]
    answer = Tokens(ids(7), np.arange(7) > 2)
    found.append(Encoded((*parts, answer), "only", str(number)))
  return found


def their_inputs(encoded: Encoded, config) -> dict[str, torch.Tensor]:
  """One document: placeholders, normalised squares filled up to the most of an image, sizes."""
  ids = [np.full(len(llava_next.order(config, p)), IMAGE) if isinstance(p, Pixels) else p.ids
         for p in encoded.parts]
  inputs = {"input_ids": torch.tensor(np.concatenate(ids))[None].long()}
  pictures = [part for part in encoded.parts if isinstance(part, Pixels)]
  if pictures:
    most = max(len(picture.squares) for picture in pictures)
    values = np.zeros((len(pictures), most, 3, SIDE, SIDE), np.float32)
    for number, picture in enumerate(pictures):
      pixels = (np.stack(picture.squares) / 255 - config.tower.mean) / config.tower.std
      values[number, : len(pixels)] = pixels.transpose(0, 3, 1, 2)
    inputs |= {"pixel_values": torch.tensor(values),
               "image_sizes": torch.tensor([picture.tiles.size for picture in pictures])}
  return inputs


def recipe():
  config = base.get_config()
  with config.data.sources.unlocked():
    config.data.sources.only = base.source(name="only")
  config.data.update(tokens=200, images=10, rows=2)
  return config


class Reference(Packed):
  """Theirs, run once: config and parameters as read from their files, logits, gradients, loss."""

  def __init__(self, directory):
    self.directory, self.model = directory, their_model()
    self.model.save_pretrained(directory)
    self.config, self.params = systems.read(directory, recipe())
    self.documents, self.logits, losses = documents(self.config), [], []
    for one in self.documents:
      inputs = their_inputs(one, self.config)
      logits = self.model(**inputs).logits[0]
      loss = np.concatenate([np.zeros(len(llava_next.order(self.config, p)), bool)
                             if isinstance(p, Pixels) else p.loss for p in one.parts])
      losses.append(torch.nn.functional.cross_entropy(
        logits[:-1][loss[1:]], inputs["input_ids"][0, 1:][loss[1:]], reduction="sum"))
      self.logits.append(logits.detach().numpy())
    sum(losses).backward()
    self.loss = float(sum(losses).detach())
    self.grads = {name: weight.grad.numpy() for name, weight in self.model.named_parameters()
                  if weight.grad is not None}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  return Reference(tmp_path_factory.mktemp("theirs") / "model")


@pytest.fixture(scope="module")
def step(reference):
  """Jitted (params, batch) to ((loss, logits), gradients)."""
  config, module = reference.config, find_fusion(reference.config)

  @jax.jit
  def run(params, batch):
    def loss(params):
      output = module.Model(config).apply({"params": params}, batch)
      return module.losses(output, batch, config)["lm"].sum(), output.logits()
    return jax.value_and_grad(loss, has_aux=True)(params)

  return lambda params, batch: run(jax.tree.map(jnp.asarray, params), batch)


def test_images_are_of_all_shapes(reference):
  tiles = [part.tiles for one in reference.documents for part in one.parts
           if isinstance(part, Pixels)]
  assert [one.grid for one in tiles] == [(1, 2), (3, 1), (2, 2), (2, 2)]
  config = reference.config
  counts = [layout.sizes["text"] for layout in layouts(reference.documents, config)]
  assert counts == [theirs.shape[0] for theirs in reference.logits]


def test_logits_and_gradients(reference, step):
  batch, where = reference.batch()
  (loss, logits), grads = step(reference.params, batch)
  for theirs in reference.logits:
    assert np.isfinite(theirs).all() and theirs.std(axis=0).min() > 1e-3
  worst = reference.error(logits, where)
  assert worst < LOGITS
  assert abs(float(loss) - reference.loss) < LOGITS * abs(reference.loss)
  ours = {k: t.get() for k, t in table.export(grads, systems.entries(reference.config)).items()}
  theirs = {table.renamer(llava.SPELLINGS)(key): grad for key, grad in reference.grads.items()}
  assert "image_newline" in ours and len(set(theirs) & set(ours)) > 40
  errors = {}
  for key, grad in ours.items():
    if key not in theirs:  # layers behind the hidden state that is read
      assert not np.any(grad), key
    elif key.endswith("k_proj.bias"):  # it shifts all logits of a query alike: no effect at all
      scale = np.abs(theirs[key.replace("k_proj", "q_proj")]).max()
      assert max(np.abs(grad).max(), np.abs(theirs[key]).max()) < TOLERANCE * scale, key
    else:
      assert np.isfinite(grad).all() and np.abs(theirs[key]).max() > 1e-4, key
      errors[key] = error(grad, theirs[key])
  print(f"logits {worst:.1e}, gradients {max(errors.values()):.1e}")
  assert max(errors.values()) < TOLERANCE, max(errors, key=errors.get)


@pytest.mark.parametrize("twin", ["border", "newline", "tile order", "next square", "turned"])
def test_twins_fail_loudly(reference, step, twin, monkeypatch):
  """Each mistake alone moves some logit far beyond the tolerance; slots stay as many."""
  params = reference.params
  if twin == "border":  # the rows of the other side
    real = llava_next.unpad
    monkeypatch.setattr(llava_next, "unpad", lambda large, size: np.roll(real(large, size), 1, 0))
  elif twin == "newline":
    params = {**params, "newline": params["newline"] + 0.1}
  elif twin == "tile order":  # columns of tiles first
    real = llava_next.stitch
    monkeypatch.setattr(llava_next, "stitch", lambda tiles, grid: np.sort(
      real(tiles, grid).ravel()).reshape(real(tiles, grid).shape))
  batch, where = reference.batch()
  values = batch.media["images"].values
  change = {"turned": lambda: jnp.swapaxes(values, 2, 3),
            "next square": lambda: jnp.roll(values, 1, 1)}.get(twin, lambda: values)
  media = dataclasses.replace(batch.media["images"], values=change())
  batch = dataclasses.replace(batch, media={"images": media})
  measured = reference.error(step(params, batch)[0][1], where)
  print(f"{twin}: {measured / LOGITS:.1f} tolerances")
  assert measured > 100 * LOGITS


def test_generated_tokens_are_theirs(reference):
  config = reference.config
  prompts = [reference.documents[number] for number in (0, 1)]
  ours = generate(config, reference.params, stack(
    layouts(prompts, config), config, rows=2, bucket=1), max_tokens=NEW, stop=())
  for row, one in enumerate(prompts):
    inputs = their_inputs(one, config)
    out = reference.model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
    np.testing.assert_array_equal(np.asarray(ours.tokens)[row, 0],
                                  out[0, inputs["input_ids"].shape[1] :].numpy())


def test_export_loads_there_and_here(reference, tmp_path):
  config, params = reference.config, reference.params
  systems.write(tmp_path / "ours", config, params, IMAGE, shard_bytes=50_000)
  model, info = transformers.LlavaNextForConditionalGeneration.from_pretrained(
    tmp_path / "ours", output_loading_info=True, attn_implementation="eager")
  assert not any(info.values()), info
  for one, theirs in zip(reference.documents, reference.logits, strict=True):
    np.testing.assert_array_equal(model(**their_inputs(one, config)).logits[0].detach(), theirs)
  again, back = systems.read(tmp_path / "ours", recipe())
  assert again.to_json() == config.to_json()
  jax.tree.map(np.testing.assert_array_equal, back, params)
  with safetensors_io.Reader(reference.directory) as reader:
    old = {table.renamer(llava.SPELLINGS)(key): reader[key] for key in reader.shapes}
  for tensors in (old, {k: v.numpy() for k, v in reference.model.state_dict().items()}):
    source = type("Tensors", (dict,), {"shapes": {k: v.shape for k, v in tensors.items()}})(tensors)
    jax.tree.map(np.testing.assert_array_equal, systems.load(source, config), params)


def test_the_written_processor_makes_our_pixels(reference, tmp_path):
  config = reference.config
  systems.write(tmp_path / "ours", config, reference.params, IMAGE)
  written = json.loads((tmp_path / "ours/preprocessor_config.json").read_text())
  assert written.pop("image_processor_type") == "LlavaNextImageProcessor"
  processor = transformers.LlavaNextImageProcessorPil(**written)
  rng = np.random.default_rng(1)
  for shape in ((20, 50), (40, 11), (23, 21)):
    pixels = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
    theirs = processor(pixels, return_tensors="np")
    ours = images.picture(pixels, SIDE, images.decoding(config))
    values = (np.stack(ours.squares) / 255 - config.tower.mean) / config.tower.std
    np.testing.assert_allclose(values.transpose(0, 3, 1, 2), theirs["pixel_values"][0], atol=1e-5)
    assert tuple(theirs["image_sizes"][0]) == ours.tiles.size


def test_configs_that_cannot_be(reference):
  theirs = reference.model.config.to_dict()
  with pytest.raises(UsageError, match=r"image_grid_pinpoints has \[9, 16\], which cannot be cut"):
    llava.read_config({**theirs, "image_grid_pinpoints": [[9, 16]]}, recipe())
  with pytest.raises(UsageError, match="model_type is 'llava_nxt'; did you mean 'llava_next'"):
    llava.read_config({**theirs, "model_type": "llava_nxt"}, recipe())
  published = {key: value for key, value in theirs.items() if key != "image_grid_pinpoints"}
  published["vision_config"] = {**theirs["vision_config"], "image_size": 336, "patch_size": 14}
  assert llava.read_config(published, recipe()).data.decode.grids == (
    (1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
