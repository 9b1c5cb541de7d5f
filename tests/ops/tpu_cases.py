"""What both TPU kernels are tested with: random packs of many blocks, and the common oracle."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.ops import attention_base
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
  named = {name: x[name] for name in "qkv"}
  named |= {"bias": None, "k_bias": x["k_bias"] if biased else None,
            "weigh_out": x["out_weight"], "weigh_lse": x["lse_weight"]}
  out, lse, grads = attention_base.oracle(named, mask, soft_cap,
                                          "" if lse_gradient else "lse_ignored")
  return {name: grad for name, grad in grads.items() if grad is not None} | {"out": out, "lse": lse}


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
  return {name: attention_base.error(got[name], want[name]) for name in names}
