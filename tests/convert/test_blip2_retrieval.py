"""Held to Blip2ForImageTextRetrieval: similarities, matches, gradients, files.

Measured: cosines 7e-7, matches 9e-7, gradients 3e-6.
"""

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from ml_collections import ConfigDict

from tests.convert import test_blip2_parity as second
from tests.numbers import error
from vlm_jax.convert import systems, table
from vlm_jax.core.batch import Batch, Media, Texts
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.tree import flatten
from vlm_jax.ops.contrastive import cosines

TOLERANCE, CLOSE, LOUD = 2e-4, 2e-5, 100
PAIRS, LENGTH = 4, 6


class Reference:
  """Theirs, run once: cosines and matches of a padded batch, and gradients of both together."""

  def __init__(self, directory: Path):
    theirs = second.their_config("opt")
    theirs.image_token_index = None
    theirs.image_text_hidden_size = 10
    theirs.qformer_config.use_qformer_text_input = True
    theirs.qformer_config.max_position_embeddings = LENGTH + 2
    torch.manual_seed(0)
    self.model = transformers.Blip2ForImageTextRetrieval._from_config(
      theirs, attn_implementation="eager").eval()
    second.draw(self.model, 3)
    self.model.save_pretrained(directory)
    self.config, self.params = systems.read(directory, second.recipe())
    rng = np.random.default_rng(0)
    self.tokens = rng.integers(1, second.VOCAB, (PAIRS, LENGTH)).astype(np.int32)
    self.tokens *= np.arange(LENGTH) < np.array([6, 3, 5, 4])[:, None]
    side = second.SIDE
    self.values = rng.integers(0, 256, (PAIRS, side, side, 3)).astype(np.uint8)
    mean, std = (np.asarray(field) for field in (self.config.tower.mean, self.config.tower.std))
    pixels = ((self.values / 255 - mean) / std).transpose(0, 3, 1, 2)
    self.cotangents = rng.normal(size=(PAIRS, PAIRS)), rng.normal(size=(PAIRS, 2))
    inputs = dict(pixel_values=torch.tensor(pixels, dtype=torch.float32),
                  input_ids=torch.tensor(self.tokens).long(),
                  attention_mask=torch.tensor(self.tokens > 0).long())
    found = [self.model(**inputs, use_image_text_matching_head=head).logits_per_image
             for head in (False, True)]
    sum((one * torch.tensor(part)).sum()
        for one, part in zip(found, self.cotangents, strict=True)).backward()
    self.found = [one.detach().numpy() for one in found]
    self.grads = {name: weight.grad.numpy() for name, weight in self.model.named_parameters()
                  if weight.grad is not None}

  def run(self, tokens=None):
    """Ours of two rows of two pairs: ([cosines, matches], gradients)."""
    tokens = self.tokens if tokens is None else tokens
    return self.step(jax.tree.map(jnp.asarray, self.params), tokens, self.values, self.cotangents)

  @functools.cached_property
  def step(self):
    """The jitted function, compiled once."""
    return step_of(self.config)


def step_of(config):
  """(params, tokens, values, cotangents) -> (gradients, [cosines, matches])."""
  model = find_fusion(config).Model(only(config))

  def loss(params, tokens, values, cotangents):
    rows = lambda x: x.reshape(2, PAIRS // 2, *x.shape[1:])
    ones = jnp.ones((2, PAIRS // 2), jnp.int32)
    batch = Batch({}, {"images": Media(rows(values), ones)}, {}, {"captions": Texts(
      tokens=rows(tokens), segment_ids=ones, source_ids=0 * ones,
      digests=jnp.stack([rows(jnp.arange(PAIRS))] * 2, axis=-1))})
    out = model.apply({"params": params}, batch)
    flat = lambda x: x.reshape(PAIRS, *x.shape[2:])
    found = [cosines(flat(out.image), flat(out.text)),
             flat(model.apply({"params": params}, batch, method="matching"))]
    return sum((one * part).sum() for one, part in zip(found, cotangents, strict=True)), found

  return jax.jit(jax.grad(loss, has_aux=True))


def only(config):
  """The config without the pass of drawn pairs, which nothing there has."""
  config = config.copy_and_resolve_references()
  config.fusion.objectives = ConfigDict({"itc": 1.0})
  return config


@pytest.fixture(scope="module")
def reference():
  return Reference(Path(tempfile.mkdtemp()) / "model")


def test_similarities_matches_and_gradients(reference):
  grads, found = reference.run()
  errors = [error(*pair) for pair in zip(found, reference.found, strict=True)]
  assert all(np.isfinite(one).all() and one.std(0).min() > 1e-3 for one in reference.found)
  # Their similarities are cosines: the temperature is not in them.
  assert np.abs(reference.found[0]).max() <= 1
  ours = {key: tensor.get() for key, tensor in table.export(
    grads, systems.entries(reference.config)).items()}
  assert set(ours) == set(reference.grads)
  worst = {}
  for key, grad in ours.items():
    theirs = reference.grads[key]
    if key.endswith("key.bias"):  # softmax does not see what all keys share
      assert max(np.abs(grad).max(), np.abs(theirs).max()) < 1e-5, key
      continue
    assert np.isfinite(grad).all() and np.abs(theirs).max() > 1e-4, key
    worst[key] = error(grad, theirs)
  print(f"cosines {errors[0]:.1e}, matches {errors[1]:.1e}, gradients "
        f"{max(worst.values()):.1e} ({max(worst, key=worst.get)})")
  assert max(errors) < CLOSE and max(worst.values()) < TOLERANCE
  # Twin: a word more at the end of a text, where padding was.
  tokens = reference.tokens.copy()
  tokens[1, 3] = 7
  _, other = reference.run(tokens)
  assert all(error(*pair) > LOUD * CLOSE for pair in zip(other, reference.found, strict=True))


def test_export_loads_there_and_here(reference, tmp_path):
  config, params = reference.config, reference.params
  assert params["temperature"] == np.float32(0.07)
  systems.write(tmp_path / "ours", config, params, 0, shard_bytes=20_000)
  model, info = transformers.Blip2ForImageTextRetrieval.from_pretrained(
    tmp_path / "ours", output_loading_info=True)
  assert not any(info.values()), info
  for key, value in model.state_dict().items():
    assert torch.equal(value, reference.model.state_dict()[key]), key
  again, back = systems.read(tmp_path / "ours", second.recipe())
  assert again.to_json() == config.to_json() and flatten(back).keys() == flatten(params).keys()
  jax.tree.map(np.testing.assert_array_equal, back, params)
