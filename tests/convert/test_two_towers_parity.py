"""Held to CLIPModel, SiglipModel and Siglip2Model: embeddings, logits, losses, gradients, files.

Four tiny models are drawn from seeds. Texts are longer than what they say: behind the end of a CLIP
text stand ends of text once more, or zeros, or ids that would be found in its place.
"""

import functools
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import torch
import transformers

from tests.numbers import error
from vlm_jax.configs import base
from vlm_jax.convert import safetensors_io, systems, two_towers
from vlm_jax.core import fusion
from vlm_jax.core.batch import Batch, Media, Texts
from vlm_jax.core.errors import UsageError
from vlm_jax.core.tree import flatten

TOLERANCE = 2e-4  # of gradients
CLOSE = 2e-5  # of embeddings, logits and loss
VOCAB, LENGTH, PAIRS = 61, 9, 6
EOS = 40
KINDS = ("clip", "clip_old", "siglip", "siglip2")
transformers.utils.logging.disable_progress_bar()


def their_config(kind: str):
  rng = np.random.default_rng(KINDS.index(kind))
  heads, patch = 3, int(rng.integers(4, 8))
  sizes = lambda: dict(
    hidden_size=heads * int(rng.integers(5, 10)), intermediate_size=int(rng.integers(30, 50)),
    num_hidden_layers=2, num_attention_heads=heads, layer_norm_eps=float(10 ** rng.uniform(-1, 0)))
  vision, text = sizes(), sizes()
  text |= dict(vocab_size=VOCAB, max_position_embeddings=LENGTH)
  if kind == "siglip2":
    vision |= dict(patch_size=patch, num_patches=9)
  else:
    vision |= dict(patch_size=patch, image_size=patch * 3)
  if kind.startswith("clip"):
    acts = dict(hidden_act="quick_gelu" if kind == "clip" else "gelu")
    text |= dict(eos_token_id=EOS if kind == "clip" else 2, bos_token_id=0, pad_token_id=1)
    return transformers.CLIPConfig(text_config=text | acts, vision_config=vision | acts,
                                   projection_dim=10)
  text |= dict(projection_size=vision["hidden_size"])
  made = transformers.SiglipConfig if kind == "siglip" else transformers.Siglip2Config
  return made(text_config=text, vision_config=vision)


def their_model(kind: str) -> torch.nn.Module:
  """Every weight overwritten: N(0, 0.1^2), norms around 1, larger where little would depend on."""
  torch.manual_seed(KINDS.index(kind))
  named = dict(clip="CLIPModel", clip_old="CLIPModel", siglip="SiglipModel",
               siglip2="Siglip2Model")[kind]
  model = getattr(transformers, named)._from_config(
    their_config(kind), attn_implementation="eager").eval()
  sharp = ("q_proj.weight", "k_proj.weight", "position_embedding.weight", "fc1.weight", "probe",
           "in_proj_weight", "projection.weight", "class_embedding")
  with torch.no_grad():
    for name, weight in model.named_parameters():
      weight.normal_(0, 1.0 if "token_embedding" in name else 0.3 if name.endswith(sharp) else 0.1)
      if "norm" in name and name.endswith("weight"):
        weight.add_(1)
    model.logit_scale.fill_(1.5)
    if hasattr(model, "logit_bias"):
      model.logit_bias.fill_(-1.5)
  return model


def examples(kind: str, side: int) -> tuple[np.ndarray, np.ndarray]:
  """Pixels u8[2,3,side,side,3] and ids i32[2,3,LENGTH] of pairs."""
  rng = np.random.default_rng(5)
  pixels = rng.integers(0, 256, (PAIRS, side, side, 3)).astype(np.uint8)
  ids = rng.integers(3, EOS, (PAIRS, LENGTH)).astype(np.int32)
  for number, row in enumerate(ids):
    end = 3 + number % 5
    if kind == "clip":  # a larger id stands before the end, more ends behind it
      row[1], row[end:] = EOS + 5, EOS
    elif kind == "clip_old":
      row[end], row[end + 1 :] = VOCAB - 1, 0
    else:
      row[end:] = 1
  grouped = lambda x: x.reshape(2, 3, *x.shape[1:])
  return grouped(pixels), grouped(ids)


def our_batch(pixels: np.ndarray, ids: np.ndarray) -> Batch:
  ones = np.ones(ids.shape[:2], np.int32)
  digests = np.stack([np.arange(PAIRS).reshape(2, 3)] * 2, axis=-1).astype(np.int32)
  return Batch({}, {"images": Media(pixels, ones)}, {},
               {"captions": Texts(ids, ones, 0 * ones, digests)})


def their_inputs(kind: str, model, pixels: np.ndarray, ids: np.ndarray) -> dict:
  pixels, ids = (x.reshape(PAIRS, *x.shape[2:]) for x in (pixels, ids))
  config = transformers.CLIPImageProcessor() if kind.startswith("clip") else None
  mean, std = (config.image_mean, config.image_std) if config else ((0.5,) * 3, (0.5,) * 3)
  x = (pixels / 255 - np.asarray(mean)) / np.asarray(std)
  inputs = {"input_ids": torch.tensor(ids).long(), "return_loss": True}
  if kind != "siglip2":
    return inputs | {"pixel_values": torch.tensor(x.transpose(0, 3, 1, 2)).float()}
  size = model.config.vision_config.patch_size
  x = x.reshape(PAIRS, 3, size, 3, size, 3).transpose(0, 1, 3, 2, 4, 5).reshape(PAIRS, 9, -1)
  return inputs | {"pixel_values": torch.tensor(x).float(),
                   "pixel_attention_mask": torch.ones(PAIRS, 9, dtype=torch.long),
                   "spatial_shapes": torch.tensor([[3, 3]] * PAIRS)}


def recipe():
  config = base.get_config()
  config.data.sources.only = base.source(name="only")
  config.attention.implementation = "dense"
  return config


class Tensors(dict):
  """Arrays by key as a source of `table.load`."""

  @property
  def shapes(self):
    return {key: value.shape for key, value in self.items()}


class Reference:
  """Theirs, run once: embeddings, logits, loss, and gradients as our tree."""

  def __init__(self, kind: str, directory):
    self.model, self.directory = their_model(kind), directory
    self.model.save_pretrained(directory)
    self.config, self.params = systems.read(directory, recipe())
    self.pixels, self.ids = examples(kind, self.config.tower.image_size)
    out = self.model(**their_inputs(kind, self.model, self.pixels, self.ids))
    out.loss.backward()
    numpy = lambda x: x.detach().numpy()
    self.outputs = {"image": numpy(out.image_embeds), "text": numpy(out.text_embeds),
                    "logits": numpy(out.logits_per_image), "loss": numpy(out.loss)}
    grads = Tensors({name: numpy(weight.grad) for name, weight in self.model.named_parameters()})
    self.grads = systems.load(grads, self.config)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  return functools.cache(lambda kind: Reference(kind, tmp_path_factory.mktemp(kind)))


@functools.cache
def compiled(config: ml_collections.FrozenConfigDict, gradients: bool):
  module = fusion.find_fusion(config)

  def run(params, batch):
    output = module.Model(config).apply({"params": params}, batch)
    loss = module.losses(output, batch, config)["contrast"].sum() / PAIRS
    flat = lambda x: x.reshape(PAIRS, -1)
    image, text = flat(output.image), flat(output.text)
    bias = 0 if output.bias is None else output.bias
    return loss, {"image": image, "text": text, "loss": loss,
                  "logits": output.scale * image @ text.T + bias}

  return jax.jit(jax.value_and_grad(run, has_aux=True) if gradients else run)


def ours(config, params, pixels, ids, gradients=False):
  run = compiled(ml_collections.FrozenConfigDict(config), gradients)
  return jax.tree.map(np.asarray, run(jax.tree.map(jnp.asarray, params), our_batch(pixels, ids)))


@pytest.mark.parametrize("kind", KINDS)
def test_parity(kind, reference):
  one = reference(kind)
  assert one.config.llm.pool == dict(clip="eos", clip_old="largest").get(kind, "last")
  (_, outputs), grads = ours(one.config, one.params, one.pixels, one.ids, gradients=True)
  for name, expected in one.outputs.items():
    assert np.isfinite(expected).all() and (name == "loss" or expected.std() > 1e-2)
    assert error(outputs[name], expected) < CLOSE, name
  got, expected = flatten(grads), flatten(one.grads)
  assert got.keys() == expected.keys()
  largest = max(np.abs(leaf).max() for leaf in expected.values())
  worst = {}
  for path, leaf in expected.items():
    if path.endswith("key/bias"):  # softmax does not see what all keys share: only rounding is left
      assert np.abs(got[path]).max() < 1e-6 * largest and np.abs(leaf).max() < 1e-6 * largest
    else:
      worst[path] = error(got[path], leaf)
  print(kind, {name: error(outputs[name], one.outputs[name]) for name in outputs},
        max(worst.items(), key=lambda item: item[1]))
  assert max(worst.values()) < TOLERANCE, max(worst.items(), key=lambda item: item[1])


TWINS = {
  ("clip", "largest"): ("llm.pool", "largest"),
  ("clip_old", "eos"): ("llm.pool", "eos"),
  ("clip", "sees ahead"): ("llm.attends", "full"),
  ("clip", "activation"): ("llm.activation", "gelu"),
  ("clip", "no first norm"): ("tower.norm_eps", 1e-12),
  ("siglip", "causal"): ("llm.attends", "causal"),
  ("siglip", "mean of patches"): ("tower.pool", "gap"),
  ("siglip2", "text eps"): ("llm.norm_eps", 1e-12),
}


@pytest.mark.parametrize("kind, twin", TWINS)
def test_twins_fail_loudly(kind, twin, reference):
  one = reference(kind)
  config = one.config.copy_and_resolve_references()
  path, value = TWINS[kind, twin]
  node, name = path.split(".")
  config[node][name] = value
  if value == "eos":
    config.llm.eos = VOCAB - 2  # nowhere in the texts
  params = dict(one.params)
  if value == "gap":
    params["tower"] = {name: leaf for name, leaf in params["tower"].items() if name != "pool"}
  _, outputs = ours(config, params, one.pixels, one.ids)
  moved = max(error(outputs[name], one.outputs[name]) for name in ("image", "text"))
  print(kind, twin, f"{moved / CLOSE:.0f} tolerances")
  assert moved > 100 * CLOSE


@pytest.mark.parametrize("kind", KINDS)
def test_files_there_and_back(kind, reference, tmp_path):
  one = reference(kind)
  systems.write(tmp_path / "out", one.config, one.params, image_token=0)
  with (safetensors_io.Reader(one.directory) as theirs,
        safetensors_io.Reader(tmp_path / "out") as written):
    names = {name for name in theirs.shapes if not name.endswith("position_ids")}
    assert names == set(written.shapes)
    for name in names:
      assert theirs[name].tobytes() == written[name].tobytes(), name
  config, params = systems.read(tmp_path / "out", recipe())
  assert config.to_json() == one.config.to_json()
  again, first = flatten(params), flatten(one.params)
  assert all(np.array_equal(again[path], first[path]) for path in first)
  loaded = type(one.model).from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
  out = loaded(**their_inputs(kind, loaded, one.pixels, one.ids))
  np.testing.assert_array_equal(out.logits_per_image.detach().numpy(), one.outputs["logits"])


def test_configs_that_are_of_no_such_system(reference):
  theirs = reference("siglip").model.config.to_dict()
  changed = lambda node, **fields: {**theirs, node: {**theirs[node], **fields}}
  for config, sentence in (
    ({**theirs, "model_type": "clap"}, "model_type is 'clap'; did you mean 'clip'"),
    (changed("vision_config", vision_use_head=False), "vision_use_head is False"),
    (changed("text_config", projection_size=7), "projected to 7"),
    (changed("text_config", hidden_act="tanh"), "hidden_act is 'tanh'"),
  ):
    with pytest.raises(UsageError, match=sentence):
      two_towers.read_config(config, recipe())
  for kind, field, value, sentence in (
    ("clip", "llm.eos", 2, "config.llm.eos is 2"),
    ("clip", "fusion.name", "siglip", "fusion.name is 'siglip'"),
    ("clip", "tower.pool", "gap", "tower.pool is 'gap'"),
    ("siglip", "llm.pool", "eos", "neither CLIP's"),
    ("siglip", "llm.name", "llama", "text tower|cannot|llama"),
  ):
    config = reference(kind).config.copy_and_resolve_references()
    node, name = field.split(".")
    config[node][name] = value
    with pytest.raises(UsageError, match=sentence):
      two_towers.write_config(config, 0)


def test_sparse_configs_of_the_hub_mean_the_defaults_there():
  for kind, made in (("clip", transformers.CLIPConfig), ("siglip", transformers.SiglipConfig)):
    theirs = made(text_config={}, vision_config={})
    read = two_towers.read_config({"model_type": kind}, recipe())
    same = two_towers.read_config(theirs.to_dict(), recipe())
    assert read.to_json() == same.to_json()
    count = lambda config: sum(int(np.prod(s)) for s in systems.shapes(config).values())
    assert count(read) == dict(clip=151_277_313, siglip=203_155_970)[kind]
