"""Contrastive losses against those of open_clip, and against sums written out."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vlm_jax.ops.contrastive import Pairs, sigmoid_losses, softmax_losses

TOLERANCE = 2e-6  # measured: 3e-7
N, E = 11, 5
SCALE, BIAS = 7.0, -3.0


def published():
  """open_clip's losses; their file alone, since the package imports every model and tokenizer."""
  folder, = importlib.util.find_spec("open_clip").submodule_search_locations
  spec = importlib.util.spec_from_file_location("open_clip_loss", Path(folder) / "loss.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module




def make(seed=0, there=None, names=None) -> Pairs:
  rng = np.random.default_rng(seed)
  unit = lambda x: jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32)
  names = np.arange(N) if names is None else np.asarray(names)
  return Pairs(unit(rng.normal(size=(N, E))), unit(rng.normal(size=(N, E))),
               jnp.ones(N, bool) if there is None else jnp.asarray(there),
               jnp.stack([jnp.zeros(N, jnp.int32), jnp.asarray(names, jnp.int32)], axis=1))


def ours(kind, pairs, scale=SCALE, bias=BIAS):
  """Value and gradients of image, text, scale (and bias)."""
  def total(image, text, scale, bias):
    moved = pairs._replace(image=image, text=text)
    losses = softmax_losses(moved, scale) if kind == "softmax" else sigmoid_losses(
      moved, scale, bias)
    return losses.sum() / pairs.there.sum()

  value, grads = jax.value_and_grad(total, (0, 1, 2, 3))(
    pairs.image, pairs.text, jnp.float32(scale), jnp.float32(bias))
  return [value, *grads[: 3 if kind == "softmax" else 4]]


def theirs(kind, pairs, scale=SCALE, bias=BIAS):
  image, text = (torch.tensor(np.array(x), requires_grad=True) for x in pairs[:2])
  scale, bias = (torch.tensor(x, requires_grad=True) for x in (scale, bias))
  if kind == "softmax":
    loss = published().ClipLoss()(image, text, scale)
    found = (image, text, scale)
  else:
    loss = published().SigLipLoss()(image, text, scale, bias)
    found = (image, text, scale, bias)
  loss.backward()
  return [loss.detach().numpy(), *(x.grad.numpy() for x in found)]


def error(got, expected):
  return max(float(np.abs(a - b).max() / np.abs(b).max())
             for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_published_losses(kind):
  pairs = make()
  expected = theirs(kind, pairs)
  assert error(ours(kind, pairs), expected) < TOLERANCE
  # Twins: a text of another picture; the sign that the paper prints.
  assert error(ours(kind, pairs._replace(text=pairs.text[::-1])), expected) > 100 * TOLERANCE
  assert error(ours(kind, pairs, -SCALE), expected) > 100 * TOLERANCE
  assert error(ours("sigmoid", pairs, bias=-BIAS), theirs("sigmoid", pairs)) > 100 * TOLERANCE


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_absent_pairs_take_no_part(kind):
  there = np.arange(N) % 3 != 1
  pairs = make(there=there)
  kept = Pairs(*(x[there] for x in pairs))
  whole, alone = ours(kind, pairs), ours(kind, kept)
  np.testing.assert_allclose(whole[0], alone[0], rtol=1e-6)
  for got, expected in zip(whole[1:3], alone[1:3], strict=True):
    np.testing.assert_allclose(got[there], expected, rtol=1e-5, atol=1e-7)
    assert not np.any(got[~there])
  nobody = make(there=np.zeros(N, bool))
  assert not np.any(softmax_losses(nobody, jnp.float32(SCALE)))
  assert not np.any(sigmoid_losses(nobody, jnp.float32(SCALE), jnp.float32(BIAS)))


def test_equal_texts_are_no_negatives():
  names = [0, 1, 2, 0, 4, 5, 1, 7, 8, 0, 10]
  pairs = make(names=names)
  cosines = np.asarray(pairs.image @ pairs.text.T, np.float64)
  equal = np.equal.outer(names, names) & ~np.eye(N, dtype=bool)
  logits = np.where(equal, -np.inf, SCALE * cosines)
  own = np.diag(logits)
  expected = (np.log(np.exp(logits).sum(1)) + np.log(np.exp(logits).sum(0))) / 2 - own
  np.testing.assert_allclose(softmax_losses(pairs, jnp.float32(SCALE)), expected, rtol=1e-5)
  logits = SCALE * cosines + BIAS
  losses = np.log1p(np.exp(np.where(np.eye(N), -logits, logits)))
  np.testing.assert_allclose(sigmoid_losses(pairs, jnp.float32(SCALE), jnp.float32(BIAS)),
                             np.where(equal, 0, losses).sum(1), rtol=1e-5)
  assert np.abs(softmax_losses(make(), jnp.float32(SCALE)) - expected).max() > 1e-2


def test_bias_has_the_gradient_of_counting():
  """dL/db = sum of sigmoid(logit) / N - 1: every pair pulls it up, every logit down."""
  pairs = make()
  logits = SCALE * np.asarray(pairs.image @ pairs.text.T) + BIAS
  expected = (1 / (1 + np.exp(-logits))).sum() / N - 1
  np.testing.assert_allclose(ours("sigmoid", pairs)[4], expected, rtol=1e-5)


def test_several_vectors_a_picture_and_smoothed_labels_are_torchs():
  """The nearest of a picture's vectors counts; s is spread over all candidates, own included."""
  pairs, rng = make(3), np.random.default_rng(4)
  several = rng.normal(size=(N, 3, E))
  several = jnp.asarray(several / np.linalg.norm(several, axis=-1, keepdims=True), jnp.float32)

  def total(image, smoothing):
    return softmax_losses(pairs._replace(image=image), SCALE, smoothing).mean()

  image = torch.tensor(np.array(several), requires_grad=True)
  text = torch.tensor(np.array(pairs.text))
  logits = SCALE * torch.einsum("nke,me->nkm", image, text).max(1).values
  own = torch.arange(N)
  loss = sum(torch.nn.functional.cross_entropy(one, own, label_smoothing=0.1)
             for one in (logits, logits.T)) / 2
  loss.backward()
  value, grad = jax.value_and_grad(total)(several, 0.1)
  np.testing.assert_allclose(value, loss.item(), rtol=TOLERANCE)
  largest = float(image.grad.abs().max())
  np.testing.assert_allclose(grad, image.grad.numpy(), atol=TOLERANCE * largest)
  assert abs(float(total(several, 0.0)) / loss.item() - 1) > 100 * TOLERANCE
