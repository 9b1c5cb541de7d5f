"""Held to `IdeficsForVisionText2Text` of transformers: logits, gradients, tokens, files.

Tiny models of random weights: scalar gates without a resampler, and gates of channels with one,
every second layer, queries and keys normalised. Theirs runs the documents as a batch padded on the
right, ours packed into two rows.
"""

import dataclasses
import functools
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from ml_collections import FrozenConfigDict

from tests.convert.packed import Packed
from tests.numbers import error
from vlm_jax.configs import base
from vlm_jax.convert import idefics, systems, table
from vlm_jax.core.document import Encoded, Pixels, Tokens
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.generate.decode import generate
from vlm_jax.generate.prompts import layouts, stack

TOLERANCE = 2e-4  # of gradients; measured: at most 7e-6
LOGITS = 2e-5  # measured: at most 1e-6
VOCAB, NEW, SIDE, MAX_NEW = 58, 3, 8, 6
IMAGE = VOCAB + NEW - 1  # the last of the new tokens
transformers.utils.logging.disable_progress_bar()


def their_config(seed: int) -> transformers.IdeficsConfig:
  """0: no resampler, scalar gates, a gated layer before every layer; 1: all of it."""
  return transformers.IdeficsConfig(
    vocab_size=VOCAB, additional_vocab_size=NEW, hidden_size=(24, 32)[seed], intermediate_size=44,
    num_hidden_layers=(2, 4)[seed], num_attention_heads=4, cross_layer_interval=seed + 1,
    alpha_type=("float", "vector")[seed], qk_layer_norms=bool(seed), use_resampler=bool(seed),
    rms_norm_eps=(0.02, 0.05)[seed], rope_parameters={"rope_type": "default", "rope_theta": 300.0},
    freeze_text_layers=False, freeze_vision_layers=False, pad_token_id=0, bos_token_id=None,
    eos_token_id=None,
    vision_config=dict(embed_dim=(20, 18)[seed], image_size=SIDE, patch_size=4, num_hidden_layers=2,
                       intermediate_size=31, num_attention_heads=2, layer_norm_eps=0.03,
                       hidden_act=("gelu", "quick_gelu")[seed]),
    perceiver_config=dict(use_resampler=bool(seed), resampler_n_latents=3, resampler_depth=2,
                          resampler_n_heads=2, resampler_head_dim=5,
                          qk_layer_norms_perceiver=bool(seed)))


def documents() -> list[Encoded]:
  """Text, image, text, image, text; a picture in front; no picture. New tokens are around."""
  rng = np.random.default_rng(0)
  picture = lambda: Pixels(rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8))

  def text(count: int) -> Tokens:
    ids = rng.integers(4, VOCAB, count).astype(np.int32)
    ids[-1] = VOCAB + count % 2
    return Tokens(ids, np.ones(count, bool))

  parts = [(text(3), picture(), text(4), picture(), text(3)), (picture(), text(5)), (text(6),)]
  return [Encoded(one, "only", str(number)) for number, one in enumerate(parts)]


def their_inputs(encoded: list[Encoded]) -> dict[str, torch.Tensor]:
  """A padded batch, and which image each token reads: the last so far, its own included."""
  rows, images = [], max(len(one.images) for one in encoded)
  for one in encoded:
    ids = [np.array([IMAGE]) if isinstance(p, Pixels) else p.ids for p in one.parts]
    rows.append(np.concatenate(ids))
  width = max(map(len, rows))
  pad = lambda ids: np.pad(ids, (0, width - len(ids)))
  seen = np.zeros((len(rows), width, max(images, 1)), np.int64)
  values = np.zeros((len(rows), max(images, 1), 3, SIDE, SIDE), np.float32)
  for row, (ids, one) in enumerate(zip(rows, encoded, strict=True)):
    for slot, last in enumerate(np.cumsum(ids == IMAGE)):
      seen[row, slot, last - 1] = last > 0
    for number, image in enumerate(one.images):
      normal = (image / 255 - np.array(MEAN)) / np.array(STD)
      values[row, number] = normal.transpose(2, 0, 1)
  return {"input_ids": torch.tensor(np.stack([pad(ids) for ids in rows])).long(),
          "attention_mask": torch.tensor(np.stack([pad(np.ones(len(ids))) for ids in rows])).long(),
          "image_attention_mask": torch.tensor(seen), "pixel_values": torch.tensor(values)}


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def recipe():
  config = base.get_config()
  with config.data.sources.unlocked():
    config.data.sources.only = base.source(name="only")
  config.data.update(tokens=24, images=2, rows=2)
  return config


class Reference(Packed):
  """Theirs, run once: config and parameters as read from their files, logits, gradients, loss."""

  def __init__(self, seed: int, directory):
    torch.manual_seed(seed)
    self.directory = directory
    self.model = transformers.IdeficsForVisionText2Text._from_config(
      their_config(seed), attn_implementation="eager").eval()
    self.model.requires_grad_(True)
    with torch.no_grad():
      for name, weight in self.model.named_parameters():
        weight.normal_(0, 0.2)
        if "norm" in name and name.endswith("weight"):
          weight.add_(1)
    self.model.save_pretrained(directory)
    self.config, self.params = systems.read(directory, recipe())
    self.documents = documents()
    inputs = their_inputs(self.documents)
    logits = self.model(**inputs, use_cache=False).logits
    targets = inputs["input_ids"][:, 1:]
    predicted = (inputs["attention_mask"][:, 1:] == 1) & (targets != IMAGE)
    loss = torch.nn.functional.cross_entropy(
      logits[:, :-1][predicted], targets[predicted], reduction="sum")
    loss.backward()
    self.loss = float(loss.detach())
    self.logits = [logits[row, : int(mask.sum())].detach().numpy()
                   for row, mask in enumerate(inputs["attention_mask"])]
    self.grads = {name: weight.grad.numpy() for name, weight in self.model.named_parameters()
                  if weight.grad is not None}


@functools.cache
def reference_of(seed: int) -> Reference:
  """The reference of a seed, made once."""
  return Reference(seed, Path(tempfile.mkdtemp()) / "model")


@pytest.fixture(params=[0, 1], ids=["scalar", "vector, resampler"])
def reference(request):
  return reference_of(request.param)


def test_logits_and_gradients(reference):
  config, module = reference.config, find_fusion(reference.config)
  batch, where = reference.batch()
  model = module.Model(config)

  @jax.jit
  def step(params, batch):
    def loss(params):
      output = model.apply({"params": params}, batch)
      return module.losses(output, batch, config)["lm"].sum(), output.logits()
    return jax.value_and_grad(loss, has_aux=True)(params)

  (loss, logits), grads = step(jax.tree.map(jnp.asarray, reference.params), batch)
  for theirs in reference.logits:
    assert np.isfinite(theirs).all() and theirs.std(axis=0).min() > 1e-3
  worst = reference.error(logits, where)
  assert worst < LOGITS
  assert abs(float(loss) - reference.loss) < LOGITS * abs(reference.loss)
  ours = {k: t.get() for k, t in table.export(grads, systems.entries(config)).items()}
  assert set(reference.grads) == set(ours) and len(ours) > 60
  errors = {}
  for key, grad in ours.items():
    if key.endswith(("k_proj.bias", "k_layer_norm.bias")):  # it shifts all logits of a query alike
      continue
    assert np.isfinite(grad).all() and np.abs(reference.grads[key]).max() > 1e-5, key
    errors[key] = error(grad, reference.grads[key])
  print(f"logits {worst:.1e}, gradients {max(errors.values()):.1e}")
  assert max(errors.values()) < TOLERANCE, max(errors, key=errors.get)


def test_generated_tokens_are_theirs(reference):
  config = reference.config
  ours = generate(config, reference.params, stack(
    layouts(reference.documents[:2], config), config, rows=2, bucket=1), max_tokens=MAX_NEW)
  said = []
  for one in reference.documents[:2]:
    inputs = their_inputs([one])
    out = reference.model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW)
    said.append(out[0, inputs["input_ids"].shape[1] :].numpy())
  np.testing.assert_array_equal(np.asarray(ours.tokens)[:, 0], np.stack(said))
  assert len(np.unique(said)) > 1


def test_export_loads_there_and_here(reference, tmp_path):
  config, params = reference.config, reference.params
  systems.write(tmp_path / "ours", config, params, IMAGE, shard_bytes=50_000)
  model, info = transformers.IdeficsForVisionText2Text.from_pretrained(
    tmp_path / "ours", output_loading_info=True, attn_implementation="eager")
  assert not any(info.values()), info
  inputs = their_inputs(reference.documents)
  for row, theirs in enumerate(reference.logits):
    ours = model(**inputs).logits[row, : len(theirs)].detach().numpy()
    np.testing.assert_array_equal(ours, theirs)
  again, back = systems.read(tmp_path / "ours", recipe())
  assert again.to_json() == config.to_json()
  jax.tree.map(np.testing.assert_array_equal, back, params)
  pixels = json.loads((tmp_path / "ours/preprocessor_config.json").read_text())
  assert pixels["image_size"] == SIDE and pixels["image_processor_type"] == "IdeficsImageProcessor"


@functools.cache
def _forward(config):
  """The jitted forward pass."""
  model = find_fusion(config).Model(config)
  return jax.jit(lambda params, batch: model.apply({"params": params}, batch).logits())


TWINS = ("placement", "all images", "mask", "resampler", "class token", "gate", "norm", "new rows")


@pytest.mark.parametrize("twin", TWINS)
def test_twins_fail_loudly(twin):
  """Each mistake alone moves some logit far beyond the tolerance."""
  reference = reference_of(1)
  config, params = reference.config.copy_and_resolve_references(), reference.params
  config.attention.implementation = "dense"
  batch, where = reference.batch()
  if twin == "placement":
    config.bridge.first = 1  # OpenFlamingo's
  elif twin == "all images":
    every = config.copy_and_resolve_references()
    every.fusion.image_attention = "all"
    batch, where = reference.batch(every)
  elif twin == "mask":  # the first slot behind an image does not see it yet
    media = batch.masks["media"]
    late = jax.tree.map(lambda field: jnp.roll(field, 1, axis=1), media)
    batch = dataclasses.replace(batch, masks=batch.masks | {"media": late})
  elif twin == "resampler":
    config.connector.activation = "gelu"
  elif twin == "class token":
    config.tower.read_class = False
  elif twin == "gate":  # taken for tanh of itself
    bridge = dict(params["bridge"])
    params = params | {"bridge": bridge | {"mlp_gate": np.tanh(bridge["mlp_gate"])}}
  elif twin == "norm":
    config.bridge.norm_eps = 0.5
  elif twin == "new rows":
    rows = params["new_embed"]["embedding"]
    params = params | {"new_embed": {"embedding": rows[::-1]}}
  measured = reference.error(_forward(FrozenConfigDict(config))(params, batch), where)
  print(f"{twin}: {measured / LOGITS:.1f} tolerances")
  assert measured > 100 * LOGITS


def test_what_theirs_cannot_say_is_refused():
  config = reference_of(1).config
  for field, value in (("bridge.first", 1), ("bridge.norm", "layer"), ("fusion.say_new", False),
                       ("fusion.image_attention", "all"), ("tower.post_norm", True),
                       ("connector.activation", "gelu")):
    other = config.copy_and_resolve_references()
    node, name = field.split(".")
    other[node][name] = value
    with pytest.raises(UsageError, match=f"config.{field} is .*IDEFICS checkpoint can only say"):
      idefics.write_config(other, IMAGE)
  with pytest.raises(UsageError, match=f"'<image>' is token 5, .* {IMAGE}"):
    idefics.write_config(config, 5)
  theirs = idefics.write_config(config, IMAGE)
  for field, value, words in (("alpha_type", "double", "known: float, vector"),
                              ("cross_layer_interval", 3, "does not divide"),
                              ("additional_vocab_size", 0, "a token for pictures is needed"),
                              ("tie_word_embeddings", True, "only False can be imported")):
    with pytest.raises(UsageError, match=words):
      idefics.read_config({**theirs, field: value}, recipe())
