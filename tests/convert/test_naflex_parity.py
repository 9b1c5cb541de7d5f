"""SigLIP 2 with grids that differ in one batch, held to Siglip2Model, and its pixels and patches.

Both sides start from files: theirs through Siglip2ImageProcessor, ours through the loader's decoder
and the layout.
"""

import io
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from ml_collections import FrozenConfigDict
from PIL import Image as PIL

from tests.convert.test_processor import FILES
from tests.convert.test_two_towers_parity import Tensors, error, recipe, their_model
from vlm_jax.convert import processor, systems
from vlm_jax.core import fusion
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Document, Image, Text
from vlm_jax.core.errors import UsageError
from vlm_jax.core.tree import flatten
from vlm_jax.data import images, template
from vlm_jax.data.draw import image_decoder
from vlm_jax.data.pack import Packer

TOLERANCE, CLOSE = 2e-4, 2e-5  # of gradients; of embeddings and loss. Measured: see the last test
MOST = 16  # patches of an image; the positions are those of a grid of 3 x 3
SHAPES = ("333 x 500", "64 x 64", "4000 x 300", "150 x 100", "1 x 3", "2 x 1")


class Words:
  """Ids of a text without a tokenizer."""

  chat, reader, first, chunk = None, None, -1, -1

  def page(self, text):
    return [3 + ord(letter) % 50 for letter in text] + [1] * (9 - len(text)), 0, 0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Their model, what their processor makes of the files, and our config, parameters and batch."""
  folder = tmp_path_factory.mktemp("naflex")
  model = their_model("siglip2")
  patch = model.config.vision_config.patch_size
  model.save_pretrained(folder)
  pixels = transformers.Siglip2ImageProcessorPil(patch_size=patch, max_num_patches=MOST)
  pixels.save_pretrained(folder)
  shown = [PIL.open(io.BytesIO(FILES[name])) for name in SHAPES]
  theirs = pixels(shown, return_tensors="pt")
  config, params = systems.read(folder, recipe())
  config.data.images = len(SHAPES)
  module, decode = fusion.find_fusion(config), image_decoder(config)
  packer = Packer(module.fields(config), module.axes(config), 1)
  layouts = [module.layout(template.encode(Document(
    (Image(FILES[name]), Text(name[:9], loss=True)), "only", name), Words(), decode), config, None)
    for name in SHAPES]
  for layout in layouts:
    packer.add([layout])
  batch = from_flat(packer.build().arrays)
  theirs["input_ids"] = torch.tensor(np.array(batch.documents["captions"].tokens[0])).long()
  return folder, model, theirs, config, params, batch


def ours(config, params, batch):
  """(loss, outputs) and gradients."""
  module = fusion.find_fusion(config)
  model = module.Model(FrozenConfigDict(config))

  def run(params):
    out = model.apply({"params": params}, batch)
    loss = sum(value.sum() for value in module.losses(out, batch, config).values())
    return loss / len(SHAPES), {"image": out.image[0], "text": out.text[0]}

  run = jax.jit(jax.value_and_grad(run, has_aux=True))
  return run(jax.tree.map(jnp.asarray, params))


def test_values_and_gradients(made):
  folder, model, theirs, config, params, batch = made
  grids = np.asarray(batch.media["images"].grid[0])
  assert grids.tolist() == theirs["spatial_shapes"].tolist() and len(set(map(tuple, grids))) > 4
  assert config.tower.position_size == 3 * config.tower.patch and config.tower.image_size == (
    4 * config.tower.patch)
  out = model(**theirs, return_loss=True)
  out.loss.backward()
  (loss, outputs), grads = ours(config, params, batch)
  worst = {"loss": error(np.asarray(loss), out.loss.detach().numpy())}
  for name in ("image", "text"):
    expected = getattr(out, f"{name}_embeds").detach().numpy()
    assert np.isfinite(expected).all() and expected.std(0).max() > 1e-2
    worst[name] = error(np.asarray(outputs[name]), expected)
  assert max(worst.values()) < CLOSE, worst
  expected = flatten(systems.load(Tensors({
    name: weight.grad.numpy() for name, weight in model.named_parameters()}), config))
  largest, got = max(np.abs(leaf).max() for leaf in expected.values()), flatten(grads)
  assert got.keys() == expected.keys()
  gradient = 0.0
  for path, leaf in expected.items():
    if path.endswith("key/bias"):  # softmax does not see what all keys share
      assert np.abs(got[path]).max() < 1e-6 * largest
    else:
      gradient = max(gradient, error(np.asarray(got[path]), leaf))
  print("naflex", worst, "gradients", gradient)
  assert gradient < TOLERANCE


TWINS = {
  "rows for columns": lambda grid: grid[..., ::-1],
  "padding is seen": lambda grid: np.broadcast_to([4, 4], grid.shape),
  "a patch less": lambda grid: grid - np.array([0, 1]) * (grid > 1),
}


@pytest.mark.parametrize("twin", TWINS)
def test_twins_fail_loudly(twin, made):
  import dataclasses
  _, model, theirs, config, params, batch = made
  media = batch.media["images"]
  grid = np.ascontiguousarray(TWINS[twin](np.asarray(media.grid))).astype(np.int32)
  broken = dataclasses.replace(batch, media={"images": dataclasses.replace(media, grid=grid)})
  (_, outputs), _ = ours(config, params, broken)
  with torch.no_grad():
    expected = model(**theirs).image_embeds.numpy()
  assert error(np.asarray(outputs["image"]), expected) > 100 * CLOSE


@pytest.mark.parametrize("backend", ["Pil", ""])
def test_patches_of_thirty_pictures_are_theirs(backend):
  """The grid and every value, of every file that is upright and of one mode."""
  made = getattr(transformers, "Siglip2ImageProcessor" + backend)(patch_size=8, max_num_patches=36)
  config = recipe()
  tower, decode = processor.read({
    "image_processor_type": "Siglip2ImageProcessor" + ("" if backend else "Fast"), "patch_size": 8,
    "max_num_patches": 36})
  config.tower.update(tower, patch=8)
  config.data.decode.update(decode)
  assert config.tower.image_size == 48 and decode["fit"] == "naflex"
  for label, data in FILES.items():
    picture = images.picture(data, 48, images.decoding(config))
    upright = PIL.fromarray(images.decode(data))  # alpha and EXIF are test_processor's
    theirs = made(upright, return_tensors="np")
    assert picture.grid == tuple(theirs["spatial_shapes"][0]), label
    patches = picture.values.reshape(6, 8, 6, 8, 3).swapaxes(1, 2).reshape(36, -1)
    count = picture.grid[0] * picture.grid[1]
    assert theirs["pixel_attention_mask"][0].sum() == count and not patches[count:].any()
    values = np.asarray(theirs["pixel_values"])[0][:count]
    off = np.abs((patches[:count] / 255 - 0.5) / 0.5 - values)
    assert off.max() * 127.5 < 1e-3, label
  written = processor.write(config)
  assert processor.read(written) == (tower, decode)


def test_grids_of_their_own_are_refused_by_name(made):
  _, _, _, config, params, batch = made
  picture = images.picture(FILES["64 x 64"], 16, images.Decoding(fit="naflex", patch=4))
  for name in ("concat", "llava_next"):
    other = recipe()
    other.fusion.name = name
    with pytest.raises(UsageError, match="fit 'naflex' gives images grids"):
      fusion.find_fusion(other).order(other, picture)
  with pytest.raises(UsageError, match="fit is 'naflex'; it needs config.tower.patch"):
    images.Decoding(fit="naflex")
  for field, value, sentence in (("name", "dinov2", "grids config.tower.name 'dinov2' does not"),
                                 ("pool", "gap", "pool is 'gap'"),
                                 ("position_resize", "bicubic", "need 'bilinear_antialias'")):
    other = config.copy_and_resolve_references()
    other.tower[field] = value
    with pytest.raises(UsageError, match=sentence):
      jax.eval_shape(lambda other=other: fusion.find_fusion(other).Model(
        FrozenConfigDict(other)).init(jax.random.key(0), batch))
  with pytest.raises(UsageError, match="max_num_patches is 250; only a square"):
    processor.read({"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 250})
