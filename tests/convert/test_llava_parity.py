"""Held to `LlavaForConditionalGeneration` of transformers: logits, gradients, files.

Three tiny models are drawn from seeds: CLIP and SigLIP towers, sizes that divide nothing, heads
with and without groups, head widths that are not width / heads, tied and untied, hidden states -2
and -1. Theirs runs every document alone; ours runs them packed into two rows.
"""

import dataclasses
import functools
import os
import re

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.numbers import error
from vlm_jax.configs import base
from vlm_jax.convert import llava, processor, safetensors_io, systems, table
from vlm_jax.core import fusion
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Encoded, Pixels, Tokens
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.core.tree import flatten, unflatten
from vlm_jax.data import images
from vlm_jax.data.pack import Packer
from vlm_jax.ops import rope

TOLERANCE = 2e-4  # of gradients
LOGITS = 2e-5  # of logits, whose measured error is at most 5e-6
VOCAB = 61
SHARP = re.compile(r"language_model.*(q_proj|k_proj)|position_emb|fc[12].weight|linear_2.weight")
IMAGE = VOCAB - 1  # their placeholder
transformers.utils.logging.disable_progress_bar()


def their_config(seed: int) -> transformers.LlavaConfig:
  """A tiny LLaVA drawn from `seed`; 0 and 2 have a CLIP tower, 1 a SigLIP one."""
  rng = np.random.default_rng(seed)
  clip = seed != 1
  patch, heads = int(rng.integers(4, 8)), 3
  vision = (transformers.CLIPVisionConfig if clip else transformers.SiglipVisionConfig)(
    hidden_size=heads * int(rng.integers(5, 10)), intermediate_size=int(rng.integers(30, 50)),
    num_hidden_layers=3, num_attention_heads=heads, patch_size=patch,
    image_size=patch * int(rng.integers(2, 4)), layer_norm_eps=float(10 ** rng.uniform(-0.7, 0)),
    hidden_act=("quick_gelu", "gelu_pytorch_tanh", "gelu")[seed],
    **({} if clip else {"vision_use_head": False}))
  groups = (2, 4, 1)[seed]
  text = transformers.LlamaConfig(
    hidden_size=4 * int(rng.integers(7, 11)), intermediate_size=int(rng.integers(50, 70)),
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=groups,
    head_dim=2 * int(rng.integers(4, 8)), vocab_size=VOCAB,
    rms_norm_eps=float(10 ** rng.uniform(-2, -1)), max_position_embeddings=256,
    rope_parameters={"rope_type": "default", "rope_theta": float(10 ** rng.uniform(2, 4))},
    tie_word_embeddings=seed == 1)
  return transformers.LlavaConfig(
    vision_config=vision, text_config=text, image_token_index=IMAGE, tie_word_embeddings=seed == 1,
    vision_feature_layer=(-2, -1, 2)[seed],
    vision_feature_select_strategy="default" if clip else "full", projector_hidden_act="gelu",
    image_seq_length=(vision.image_size // patch) ** 2)


def their_model(seed: int) -> torch.nn.Module:
  """Every weight overwritten: N(0, 0.1^2), norms around 1, larger where little would depend on."""
  torch.manual_seed(seed)
  model = transformers.LlavaForConditionalGeneration._from_config(
    their_config(seed), attn_implementation="eager").eval()
  with torch.no_grad():
    for name, weight in model.named_parameters():
      weight.normal_(0, 1.0 if "embed_tokens" in name else 0.3 if SHARP.search(name) else 0.1)
      if "norm" in name and name.endswith("weight"):
        weight.add_(1)
      if name.endswith("linear_1.bias"):
        weight.sub_(2.5)  # where the kinds of gelu differ most, relative to their values
  return model


def documents(image_size: int) -> list[Encoded]:
  """Text before, between and after images; two images; no image."""
  rng = np.random.default_rng(0)
  pixels = lambda: Pixels(rng.integers(0, 256, (image_size, image_size, 3)).astype(np.uint8))

  def text(length: int, loss: bool) -> Tokens:
    return Tokens(rng.integers(1, IMAGE, length).astype(np.int32), np.full(length, loss))

  parts = (
    (text(3, False), pixels(), text(4, False), text(5, True)),
    (text(6, True),),
    (pixels(), text(2, True), pixels(), text(3, False), text(4, True)),
  )
  return [Encoded(part, "only", str(number)) for number, part in enumerate(parts)]


def our_batch(config):
  """The documents packed into two rows, and where the slots of each are: (row, start, size)."""
  module = fusion.find_fusion(config)
  packer = Packer(module.fields(config), module.axes(config), config.data.rows)
  assert packer.add([module.layout(document, config, np.random.default_rng(0))
                     for document in documents(config.tower.image_size)])
  packed = packer.build()
  where = {}
  for row, layouts in enumerate(packed.rows):
    start = 0
    for layout in layouts:
      where[layout.key] = (row, start, layout.sizes["text"])
      start += layout.sizes["text"]
  assert max(map(len, packed.rows)) > 1  # something is packed
  return from_flat(jax.tree.map(jnp.asarray, packed.arrays)), [where[key] for key in sorted(where)]


def their_inputs(document: Encoded, config) -> dict[str, torch.Tensor]:
  """One document as input_ids with placeholders, labels and normalised pixels."""
  slots = (config.tower.image_size // config.tower.patch) ** 2
  ids = [np.full(slots, IMAGE) if isinstance(p, Pixels) else p.ids for p in document.parts]
  labels = [np.full(slots, -100) if isinstance(p, Pixels) else np.where(p.loss, p.ids, -100)
            for p in document.parts]
  # The first token is predicted from nothing: theirs shifts, so it never counts.
  inputs = {"input_ids": torch.tensor(np.concatenate(ids))[None].long(),
            "labels": torch.tensor(np.concatenate(labels))[None].long()}
  if document.images:
    mean, std = np.asarray(config.tower.mean), np.asarray(config.tower.std)
    pixels = (np.stack(document.images) / 255 - mean) / std
    inputs["pixel_values"] = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
  return inputs


def recipe():
  """Any recipe; only the data side of it is used."""
  config = base.get_config()
  with config.data.sources.unlocked():
    config.data.sources.only = base.source(name="only")
  config.data.update(tokens=48, images=3, rows=2)
  config.attention.update(block_q=16, block_k=16)
  return config


class Reference:
  """Theirs, run once: logits per document, loss sum, gradients as our tree."""

  def __init__(self, seed: int, directory):
    self.model, self.directory = their_model(seed), directory
    self.model.save_pretrained(directory)
    self.config, self.params = systems.read(directory, recipe())
    # Blocks of 16 slots in one model (many blocks a row), the whole matrix in the others.
    self.config.attention.implementation = "xla" if seed == 0 else "dense"
    self.batch, self.where = our_batch(self.config)
    self.logits, losses = [], []
    for document in documents(self.config.tower.image_size):
      inputs = their_inputs(document, self.config)
      out = self.model(**inputs)
      self.logits.append(out.logits[0].detach().numpy())
      losses.append(out.loss * (inputs["labels"][0, 1:] != -100).sum())
    sum(losses).backward()
    self.loss = float(sum(losses).detach())
    self.grads = {name: weight.grad.numpy() for name, weight in self.model.named_parameters()
                  if weight.grad is not None}


@pytest.fixture(scope="module", params=[0, 1, 2])
def reference(request, tmp_path_factory):
  return Reference(request.param, tmp_path_factory.mktemp("theirs") / "model")


def pick(logits, where) -> list[np.ndarray]:
  """The logits of every document, f32[n,V] each."""
  return [np.asarray(logits)[row, start : start + size] for row, start, size in where]


class Tensors(dict):
  """Tensors by key in memory, as `table.load` reads them."""

  @property
  def shapes(self):
    return {key: array.shape for key, array in self.items()}


def test_logits_and_gradients(reference):
  config, module, batch = reference.config, fusion.find_fusion(reference.config), reference.batch
  model = module.Model(config)

  @jax.jit
  def step(params, batch):
    def loss(params):
      output = model.apply({"params": params}, batch)
      return module.losses(output, batch, config)["lm"].sum(), output.logits()
    return jax.value_and_grad(loss, has_aux=True)(params)

  (loss, logits), grads = step(jax.tree.map(jnp.asarray, reference.params), batch)
  picked = pick(logits, reference.where)
  for ours in picked:
    assert np.isfinite(ours).all() and ours.std(axis=0).min() > 1e-3
  worst = max(map(error, picked, reference.logits))
  assert worst < LOGITS
  assert abs(float(loss) - reference.loss) < TOLERANCE * abs(reference.loss)

  ours = {k: t.get() for k, t in table.export(grads, systems.entries(config)).items()}
  theirs = {table.renamer(llava.SPELLINGS)(key): grad for key, grad in reference.grads.items()}
  assert len(set(theirs) & set(ours)) > 30
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


def test_export_loads_there(reference, tmp_path):
  config, params = reference.config, reference.params
  systems.write(tmp_path / "ours", config, params, IMAGE, shard_bytes=50_000)
  model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
    tmp_path / "ours", output_loading_info=True, attn_implementation="eager")
  assert not any(info.values()), info
  assert model.config.vision_config.model_type == reference.model.config.vision_config.model_type
  logits = [model(**their_inputs(document, config)).logits[0].detach().numpy()
            for document in documents(config.tower.image_size)]
  for ours, theirs in zip(logits, reference.logits, strict=True):
    np.testing.assert_array_equal(ours, theirs)
  again, back = systems.read(tmp_path / "ours", recipe())
  again.attention = config.attention
  assert again.to_json() == config.to_json()
  jax.tree.map(np.testing.assert_array_equal, back, params)
  with pytest.raises(UsageError, match="already holds a checkpoint"):
    systems.write(tmp_path / "ours", config, params, IMAGE)


def test_three_spellings_are_one_checkpoint(reference):
  with safetensors_io.Reader(reference.directory) as reader:
    files = {key: reader[key] for key in reader.shapes}  # written by transformers 5
  memory = {k: v.numpy() for k, v in reference.model.state_dict().items()}
  old = {table.renamer(llava.SPELLINGS)(key): array for key, array in files.items()}
  assert all(key.startswith("vision_tower.vision_model.") for key in old if "vision" in key)
  old["vision_tower.vision_model.embeddings.position_ids"] = np.arange(5)[None]
  for spelling in (files, memory, old):
    back = systems.load(Tensors(spelling), reference.config)
    jax.tree.map(np.testing.assert_array_equal, back, reference.params)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
  return Reference(0, tmp_path_factory.mktemp("one") / "model")


@functools.cache
def _forward(config, name):
  """Jitted forward pass; `name` tells patched code from the real one."""
  model = fusion.find_fusion(config).Model(config)
  return jax.jit(lambda params, batch: model.apply({"params": params}, batch).logits())


# What each mistake must move, in tolerances of logits. The two kinds of gelu that differ least are
# 5e-4 apart at their worst argument; measured, that moves a logit by 98 tolerances.
TWINS = {"rope": 100, "layer": 100, "llm_eps": 100, "tower_eps": 100, "quick_gelu": 100,
         "gelu_tanh": 50, "groups": 100, "mask": 100}


@pytest.mark.parametrize("twin", TWINS)
def test_twins_fail_loudly(one, twin, monkeypatch):
  """Each mistake alone moves some logit far beyond the tolerance."""
  config, params = one.config.copy_and_resolve_references(), one.params
  config.attention.implementation = "dense"
  batch, where = our_batch(config)
  if twin == "rope":
    layout = lambda width, theta: rope.sequence(width, theta).interleaved()  # of Meta's files
    monkeypatch.setattr("vlm_jax.llm._decoder.sequence", layout)
  elif twin == "layer":
    config.tower.feature_layer = -1
  elif twin == "llm_eps":
    config.llm.norm_eps = 1e-6
  elif twin == "tower_eps":
    config.tower.norm_eps = 1e-12
  elif twin == "quick_gelu":
    config.tower.activation = "gelu"
  elif twin == "gelu_tanh":
    config.connector.activation = "gelu_tanh"
  elif twin == "groups":
    flat, path = flatten(params), "llm/layers/attention/key/kernel"
    params = unflatten(flat | {path: flat[path][:, :, ::-1]})
  elif twin == "mask":
    mask = batch.masks["text"]
    later = dataclasses.replace(mask, hi=mask.hi + 1)
    batch = dataclasses.replace(batch, masks={"text": later})
  logits = _forward(ml_collections.FrozenConfigDict(config), twin == "rope")(params, batch)
  measured = max(map(error, pick(logits, where), one.logits))
  print(f"{twin}: {measured / LOGITS:.1f} tolerances")
  assert measured > TWINS[twin] * LOGITS


def test_configs_that_are_no_llava(one):
  theirs = one.model.config.to_dict()
  for change, sentence in (
    ({"model_type": "llava_onevision"}, "model_type is 'llava_onevision'"),
    ({"vision_feature_layer": [-2, -3]}, "one layer can be read"),
    ({"vision_feature_layer": 9}, "there are 4 states"),
    ({"vision_feature_select_strategy": "full"}, "select_strategy is 'full'; only 'default'"),
    ({"projector_hidden_act": "tanh"}, "projector_hidden_act is 'tanh'"),
    ({"text_config": {"attention_bias": True}}, "attention_bias is True"),
    ({"text_config": {"model_type": "mistral"}}, "model_type is 'mistral'"),
    ({"text_config": {"rope_scaling": {"type": "yarn", "factor": 2}}}, "rope_type is 'yarn'"),
    ({"vision_config": {"model_type": "dinov2"}}, "model_type is 'dinov2'"),
  ):
    with pytest.raises(UsageError, match=sentence) as error_info:
      llava.read_config({**theirs, **change}, recipe())
    assert "\n" not in str(error_info.value)
  for field, value in (("fusion.image_attention", "bidirectional"), ("tower.post_norm", True),
                       ("tower.patch_bias", True), ("connector.hidden", 7),
                       ("tower.position_size", 99)):
    config = one.config.copy_and_resolve_references()
    node, name = field.split(".")
    config[node][name] = value
    with pytest.raises(UsageError, match=name):
      llava.write_config(config, IMAGE)
  config = one.config.copy_and_resolve_references()
  config.tower.update(name="dinov2", mlp=2 * config.tower.width)
  with pytest.raises(UsageError, match="model_type is 'dinov2'; the towers of LLaVA checkpoints"):
    llava.write_config(config, IMAGE)


def test_sparse_config_of_the_hub_means_the_defaults_there():
  theirs = {
    "model_type": "llava", "image_token_index": 32000,
    "text_config": {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 32064},
    "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024,
                      "intermediate_size": 4096, "image_size": 336, "patch_size": 14,
                      "num_hidden_layers": 24, "num_attention_heads": 16},
  }
  config = llava.read_config(theirs, recipe())
  full = transformers.LlavaConfig(**theirs)
  assert (config.llm.width, config.llm.depth, config.llm.mlp, config.llm.kv_heads) == (
    full.text_config.hidden_size, full.text_config.num_hidden_layers,
    full.text_config.intermediate_size, full.text_config.num_key_value_heads)
  assert config.llm.norm_eps == 1e-5 and config.tower.norm_eps == full.vision_config.layer_norm_eps
  assert config.tower.activation == full.vision_config.hidden_act == "quick_gelu"
  assert config.tower.feature_layer == full.vision_feature_layer
  assert sum(int(np.prod(s)) for s in systems.shapes(config).values()) == 7_063_427_072 - 2 * 1024


def test_the_processor_is_read_and_written(tmp_path):
  config, params = systems.read(_saved(0, tmp_path), recipe())
  config.data.decode.update(fit="pad", border=processor.mean_colour(config.tower.mean))
  systems.write(tmp_path / "ours", config, params, IMAGE)
  made = transformers.LlavaImageProcessorPil.from_pretrained(tmp_path / "ours")
  pixels = np.random.default_rng(0).integers(0, 256, (33, 57, 3)).astype(np.uint8)
  theirs = made(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
  ours = images.square(pixels, config.tower.image_size, images.decoding(config)) / 255
  ours = (ours - np.array(config.tower.mean)) / np.array(config.tower.std)
  np.testing.assert_allclose(ours, theirs.transpose(1, 2, 0), atol=1e-5)
  again, _ = systems.read(tmp_path / "ours", recipe())
  assert again.data.decode.to_json() == config.data.decode.to_json()
  config.data.decode.fit = "letterbox"
  with pytest.raises(UsageError, match="config.data.decode.fit is 'letterbox'"):
    systems.write(tmp_path / "other", config, params, IMAGE)
  written = safetensors_io.read_json(tmp_path / "ours" / processor.FILE)
  written["size"], written["crop_size"] = {"shortest_edge": 99}, 99
  safetensors_io.write_json(tmp_path / "ours" / processor.FILE, written)
  with pytest.raises(UsageError, match="images of 99 pixels, but config.json's tower sees"):
    systems.read(tmp_path / "ours", recipe())


def test_tied_head_must_be_the_embedding(tmp_path):
  config, params = systems.read(_saved(1, tmp_path), recipe())
  tensors = {k: t.get() for k, t in table.export(params, systems.entries(config)).items()}
  tensors["lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"] + 1
  with pytest.raises(DataError, match="differs from the embedding"):
    systems.load(Tensors(tensors), config)


def _saved(seed, tmp_path):
  their_model(seed).save_pretrained(tmp_path / "theirs")
  return tmp_path / "theirs"
