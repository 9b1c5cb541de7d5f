"""What both TPU kernels are tested with: random packs, and an oracle in float64 with its gradients.

The oracle is written from the definition: logits cap * tanh(scale q k^T / cap) + k_bias, softmax
over the visible keys, and the log-sum-exp, whose gradient joins that of the output.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.core.mask import IntervalMask
from vlm_jax.ops.attention import make_plan

TOLERANCE = 2e-6


def documents(rng: np.random.Generator, rows: int, length: int, policy: str) -> IntervalMask:
  """Packed documents of 20 to 120 tokens: an image, then text. Padding at the end of each row."""
  lo, hi, q_class, k_class = np.zeros((4, rows, length), np.int32)
  for row in range(rows):
    start = 0
    while start < length - 30:
      end = min(start + int(rng.integers(20, 120)), length - 7)
      image = start + int(rng.integers(1, end - start))
      index = np.arange(start, end)
      lo[row, start:end] = start
      hi[row, start:end] = end if policy == "full" else index + 1
      if policy in ("prefix", "fan_out", "cut"):
        hi[row, start:image] = image
      if policy == "window":
        lo[row, start:end] = np.maximum(start, index - 9)
      if policy == "fan_out":  # turns of 8 tokens share the image, not each other
        q_class[row, image:end] = k_class[row, image:end] = 1 + (index[image - start:] - image) // 8
      if policy == "cut":  # images see themselves and text; every other text token sees only text
        q_class[row, start:image] = k_class[row, start:image] = 1 + start
        q_class[row, image:end:2] = -1
      start = end
  classes = policy in ("fan_out", "cut")
  return IntervalMask(lo, hi, q_class if classes else None, k_class if classes else None)


def cross(rng: np.random.Generator, rows: int, length: int, keys: int) -> IntervalMask:
  """Each query sees a few keys; keys are shuffled, some of them nobody may see."""
  lo = rng.integers(0, keys - 40, (rows, length)).astype(np.int32)
  hi = lo + rng.integers(0, 40, lo.shape).astype(np.int32)
  order = np.stack([rng.permutation(keys) for _ in range(rows)]).astype(np.int32)
  order[:, ::7] = -1
  return IntervalMask(lo, hi).take(k=order)


def inputs(rng: np.random.Generator, q_shape, k_shape) -> dict[str, np.ndarray]:
  """Arguments q, k, v, k_bias, and the weights that sum out and lse to the loss."""
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return dict(q=draw(*q_shape), k=draw(*k_shape), v=draw(*k_shape), k_bias=draw(*k_shape[:2]),
              out_weight=draw(*q_shape), lse_weight=draw(*q_shape[:3]))


def oracle(x, mask, *, soft_cap=None, biased=False, lse_gradient=True) -> dict[str, np.ndarray]:
  """out, lse and the gradients of sum(out * out_weight) + sum(lse * lse_weight), in float64."""
  x = {name: np.asarray(value, np.float64) for name, value in x.items()}
  repeats = x["q"].shape[2] // x["k"].shape[2]
  keys, values = (np.repeat(x[name], repeats, 2) for name in ("k", "v"))
  scale = x["q"].shape[-1] ** -0.5
  raw = np.einsum("bthc,bshc->bhts", x["q"], keys) * scale
  slope = 1.0
  if soft_cap is not None:
    slope = 1 - np.tanh(raw / soft_cap) ** 2
    raw = soft_cap * np.tanh(raw / soft_cap)
  logits = raw + (x["k_bias"][:, None, None] if biased else 0.0)
  seen = np.asarray(mask.dense(keys.shape[1]))[:, None]
  some = seen.any(-1, keepdims=True)
  logits = np.where(seen, logits, -np.inf)
  top = np.where(some, logits.max(-1, keepdims=True), 0.0)
  total = np.exp(logits - top).sum(-1, keepdims=True)
  weights = np.exp(logits - top) / np.where(some, total, 1.0)
  lse = np.where(some, top + np.log(np.where(some, total, 1.0)), -np.inf)[..., 0]
  inner = np.einsum("bthc,bshc->bhts", x["out_weight"], values)
  delta = (inner * weights).sum(-1, keepdims=True)
  if lse_gradient:
    delta = delta - x["lse_weight"].swapaxes(1, 2)[..., None]
  above = weights * (inner - delta)
  fold = lambda grad: grad.reshape(*x["k"].shape[:3], repeats, -1).sum(3)
  return dict(
    out=np.einsum("bhts,bshc->bthc", weights, values),
    lse=lse.swapaxes(1, 2),
    q=np.einsum("bhts,bshc->bthc", above * slope, keys) * scale,
    k=fold(np.einsum("bhts,bthc->bshc", above * slope, x["q"])) * scale,
    v=fold(np.einsum("bhts,bthc->bshc", weights, x["out_weight"])),
    k_bias=above.sum((1, 2)),
  )


def program(attend, blocks, soft_cap=None, biased=False):
  """A compiled function of (inputs, mask) that returns what `oracle` returns."""

  @jax.jit
  def run(x, mask):
    plan = make_plan(mask, x["k"].shape[1], block_q=blocks[0], block_k=blocks[1])

    def total(arguments):
      arguments = dict(arguments)
      k_bias = arguments.pop("k_bias")
      more = dict(k_bias=k_bias) if biased else {}
      out, lse = attend(**arguments, mask=mask, plan=plan, scale=x["q"].shape[-1] ** -0.5,
                        soft_cap=soft_cap, **more)
      loss = (out * x["out_weight"]).sum()
      return loss + (lse * x["lse_weight"]).sum(where=lse > -jnp.inf), (out, lse)

    arguments = {name: x[name] for name in ("q", "k", "v", "k_bias")}
    grads, (out, lse) = jax.grad(total, has_aux=True)(arguments)
    return dict(grads, out=out, lse=lse)

  return lambda x, mask: run(x, jax.tree.map(jnp.asarray, mask))


def errors(got, want, names) -> dict[str, float]:
  """The largest difference over the largest value, of each named array."""
  found = {}
  for name in names:
    a, b = np.asarray(got[name], np.float64), np.asarray(want[name], np.float64)
    assert a.shape == b.shape, name
    if name == "lse":
      assert (np.isneginf(a) == np.isneginf(b)).all(), "lse is -inf where nothing is seen"
      a, b = np.where(np.isneginf(a), 0, a), np.where(np.isneginf(b), 0, b)
    assert np.isfinite(a).all(), name
    assert b.std() > 1e-3, name
    found[name] = float(np.abs(a - b).max() / np.abs(b).max())
  return found
