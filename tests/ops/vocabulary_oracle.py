"""Losses over the vocabulary with every logit in float64, and their gradients by hand."""

import numpy as np


def token_losses(hidden, head, targets, wanted, above, above_z, *, soft_cap=None, smoothing=0.0):
  """Cross-entropy and z-loss of every slot, and what sum(above * loss) + sum(above_z * z) has as
  gradients of hidden and head; all float64."""
  hidden, head, above, above_z = (np.asarray(x, np.float64) for x in (hidden, head, above, above_z))
  targets, wanted = np.asarray(targets), np.asarray(wanted, np.float64)
  hidden = np.where(wanted[..., None] > 0, hidden, 0)
  raw = np.einsum("btd,dv->btv", hidden, head)
  logits = raw if soft_cap is None else soft_cap * np.tanh(raw / soft_cap)
  top = logits.max(-1, keepdims=True)
  log_z = (top + np.log(np.exp(logits - top).sum(-1, keepdims=True)))
  log_p = logits - log_z
  vocabulary = head.shape[1]
  share = (1 - smoothing) * np.eye(vocabulary)[targets] + smoothing / vocabulary
  loss, z = -(share * log_p).sum(-1) * wanted, log_z[..., 0] ** 2 * wanted
  p = np.exp(log_p)
  grad = (above * wanted)[..., None] * (p - share)
  grad += (above_z * wanted)[..., None] * 2 * log_z * p
  if soft_cap is not None:
    grad *= 1 / np.cosh(raw / soft_cap) ** 2
  return (loss, z, np.einsum("btv,dv->btd", grad, head), np.einsum("btd,btv->dv", hidden, grad))


def cotangents(weights, seed):
  """Random cotangents of both losses, every slot its own."""
  rng = np.random.default_rng(seed)
  return rng.normal(size=(2, *np.shape(weights))).astype(np.float32)


def error(got, want) -> float:
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert np.isfinite(got).all() and want.std() > 1e-3
  return float(np.abs(got - want).max() / np.abs(want).max())


def errors(got, want) -> float:
  return max(error(a, b) for a, b in zip(got, want, strict=True))
