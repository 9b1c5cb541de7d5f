"""What every implementation of attention is tested with: packs, an oracle in float64, runners."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.core.mask import IntervalMask
from vlm_jax.ops.attention import (
  DistanceBias,
  cudnn,
  dense,
  make_plan,
  pallas_tpu,
  tokamax,
  xla,
)


@dataclasses.dataclass(frozen=True)
class Runner:
  """An implementation under test.

  Attributes:
    attend: its function.
    blocks: block sizes of the plan.
    lacks: what it declines, of "bias", "k_bias", "soft_cap", "lse", "classes", "k_index".
  """

  attend: Callable
  blocks: tuple[int, int] = (16, 24)
  lacks: frozenset[str] = frozenset()


RUNNERS = {
  "xla": Runner(xla.attend),
  "dense": Runner(dense.attend),
  # Its smallest blocks are wider than these packs; test_pallas_tpu.py has packs of many blocks.
  "pallas_tpu": Runner(functools.partial(pallas_tpu.attend, interpret=True), (128, 128),
                       frozenset({"bias"})),
  "cudnn": Runner(functools.partial(cudnn.attend, implementation="xla"),
                  lacks=frozenset({"bias", "k_bias", "soft_cap", "lse"})),
}
if importlib.util.find_spec("tokamax"):  # optional, Python 3.12
  RUNNERS["tokamax"] = Runner(
    functools.partial(tokamax.attend, operator="xla"),
    lacks=frozenset({"bias", "k_bias", "lse", "classes", "k_index"}))
HERE = ("xla", "dense")  # those that `attention` can choose on this platform

POLICIES = ("causal", "prefix", "spans", "own_image", "window", "last_image_cross", "last_image",
            "cut", "full", "fan_out")
CLASSES = ("last_image", "cut", "fan_out")


def random_pack(rng: np.random.Generator, rows: int, length: int, policy: str,
                scale: int = 1) -> tuple[IntervalMask, int]:
  """Random packed documents of text and images, padding at each row's end, and the number of keys.

  The policies are those of the mask's table: who sees whom is all that differs. `scale` makes the
  parts of documents longer.
  """
  lo, hi = np.zeros((2, rows, length), np.int32)
  q_class, k_class = np.zeros((2, rows, length), np.int32)
  for row in range(rows):
    start, images = 0, 0
    while start < length - 6 * scale:
      end = min(start + scale * int(rng.integers(5, 40)), length - 3)
      at, last = start, 0
      lo[row, start:end], hi[row, start:end] = start, np.arange(start, end) + 1
      branch = start + int(rng.integers(1, end - start + 1))
      while at < end:
        text, image = (at + scale * int(rng.integers(1, n)) for n in (6, 12))
        text = min(text, end)
        image = max(text, min(image, end))
        q_class[row, at:text] = last or -1
        if image > text:
          images += 1
          last = images
        own = slice(text, image)
        k_class[row, own] = q_class[row, own] = images
        if policy in ("spans", "own_image", "cut", "window"):
          hi[row, own] = image
        if policy == "own_image":
          lo[row, own] = text
        if policy == "window":
          index = np.arange(at, image)
          lo[row, at:image] = np.maximum(start, index - 4 * scale)
          lo[row, own] = np.minimum(lo[row, own], text)
        at = max(image, at + 1)
      if policy == "cut":
        q_class[row, start:end] = np.maximum(np.where(k_class[row, start:end] > 0,
                                                      q_class[row, start:end], 0), 0)
      if policy == "prefix":
        hi[row, start:branch] = branch
      if policy == "full":
        hi[row, start:end] = end
      if policy == "fan_out":
        hi[row, start:branch] = branch
        turn = 1 + (np.arange(end - branch) // (3 * scale))
        q_class[row, start:branch] = k_class[row, start:branch] = 0
        q_class[row, branch:end] = k_class[row, branch:end] = turn
      start = end
  if policy == "last_image_cross":
    return _last_image(rng, lo, hi, rows, length)
  if policy in CLASSES:
    return IntervalMask(lo, hi, q_class, k_class), length
  return IntervalMask(lo, hi), length


def _last_image(rng, lo, hi, rows: int, length: int) -> tuple[IntervalMask, int]:
  """Text that reads the last image before it, keys are the images' slots."""
  size, count = 7, 6
  image = np.sort(rng.integers(-1, count, (rows, length)), axis=1).astype(np.int32)
  image = np.where(hi > lo, image, -1)
  return IntervalMask(np.maximum(image, 0) * size, (image + 1) * size), size * count


def runners(*needed: str) -> list[str]:
  """The names of those that decline nothing of what is needed."""
  return [name for name, runner in RUNNERS.items() if not runner.lacks.intersection(needed)]


def inputs(rng, batch: int, length: int, keys: int, heads: int, groups: int, width: int,
           lacks: frozenset[str] = frozenset()) -> dict:
  """q, k, v and the weights of out and lse in the sum whose gradient is taken; f32 noise.

  For a runner that lacks the lse, its weights are 0.
  """
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  x = {"q": draw(batch, length, heads, width), "k": draw(batch, keys, groups, width),
       "v": draw(batch, keys, groups, width), "bias": None, "k_bias": None,
       "weigh_out": draw(batch, length, heads, width), "weigh_lse": draw(batch, length, heads)}
  if "lse" in lacks:
    x["weigh_lse"][:] = 0
  return x


def random_bias(rng, kind: str, batch: int, heads: int, length: int, keys: int):
  """A bias of a kind: "none", "rows" (one a row), "shared" or "distance"."""
  if kind == "none":
    return None
  if kind == "distance":
    at = lambda n: np.sort(rng.integers(0, 3 * n, (batch, n)), axis=1).astype(np.int32)
    table = rng.normal(size=(heads, 12)).astype(np.float32)
    return DistanceBias(table, at(length), at(keys), max_distance=60)
  return rng.normal(size=(batch if kind == "rows" else 1, heads, length, keys)).astype(np.float32)


@functools.cache
def program(name: str, soft_cap: float | None, platform: str) -> Callable:
  """The jitted pass of a runner both ways; shapes seen before are not compiled again.

  `platform` is what is pretended while tracing, and so part of what tells programs apart.
  """
  runner = RUNNERS[name]

  def both(moved, mask, weigh_out, weigh_lse):
    keys = moved["k"].shape[1]
    plan = make_plan(mask, keys, block_q=runner.blocks[0], block_k=runner.blocks[1])

    def total(moved):
      out, lse = runner.attend(mask=mask, plan=plan, scale=moved["q"].shape[-1] ** -0.5,
                               soft_cap=soft_cap, **moved)
      weighed = (out.astype(jnp.float32) * weigh_out).sum()
      if lse is not None:
        weighed += (jnp.where(jnp.isneginf(lse), 0.0, lse) * weigh_lse).sum()
      return weighed, (out, lse)

    grads, (out, lse) = jax.grad(total, has_aux=True, allow_int=True)(moved)
    return out, lse, grads

  return jax.jit(both)


def run(name: str, x: dict, mask: IntervalMask, soft_cap=None):
  """out, lse and gradients {q, k, v, bias, k_bias} of the weighed sum; None for what is absent."""
  moved = {part: x[part] for part in ("q", "k", "v", "bias", "k_bias")}
  moved, mask = jax.tree.map(jnp.asarray, (moved, mask))
  step = program(name, soft_cap, xla.platform())
  out, lse, grads = step(moved, mask, x["weigh_out"], x["weigh_lse"])
  if isinstance(x["bias"], DistanceBias):
    grads["bias"] = grads["bias"].table
  return out, lse, grads


def oracle(x: dict, mask: IntervalMask, soft_cap=None, broken: str = ""):
  """What `run` should return, in float64 from the definition; `broken` names what it gets wrong."""
  x = {name: value if value is None or name == "bias" else np.asarray(value, np.float64)
       for name, value in x.items()}
  q, k, v = x["q"], x["k"], x["v"]
  (batch, _, heads, width), (keys, groups) = q.shape, k.shape[1:3]
  repeats, scale = heads // groups, q.shape[-1] ** -0.5
  if broken == "groups_swapped":
    k, v = k[:, :, ::-1], v[:, :, ::-1]
  wide_k, wide_v = (np.repeat(side, repeats, 2) for side in (k, v))
  dots = np.einsum("bthc,bshc->bhts", q, wide_k) * scale
  bend = np.tanh(dots / soft_cap) if soft_cap and broken != "cap_ignored" else None
  logits = dots if bend is None else soft_cap * bend
  whole, spread = _whole_bias(x["bias"], batch, heads)
  if whole is not None:
    logits = logits + (whole[:, ::-1] if broken == "bias_heads_swapped" else whole)
  if x["k_bias"] is not None and broken != "k_bias_ignored":
    logits = logits + x["k_bias"][:, None, None]
  if broken == "off_by_one":
    mask = dataclasses.replace(mask, hi=np.maximum(mask.hi - 1, 0))
  if broken == "class_ignored":
    mask = dataclasses.replace(mask, q_class=None, k_class=None)
  seen = np.asarray(mask.dense(keys))[:, None]
  logits = np.where(seen, logits, -np.inf)
  some = seen.any(-1, keepdims=True)
  top = np.where(some, logits.max(-1, keepdims=True), 0.0)
  shares = np.exp(logits - top)
  total = shares.sum(-1, keepdims=True)
  shares = shares / np.where(total > 0, total, 1.0)
  with np.errstate(divide="ignore"):
    lse = (np.log(total) + top)[..., 0]
  out = np.einsum("bhts,bshc->bthc", shares, wide_v)

  weigh_lse = np.zeros_like(x["weigh_lse"]) if broken == "lse_ignored" else x["weigh_lse"]
  inner = np.einsum("bthc,bshc->bhts", x["weigh_out"], wide_v)
  slope = inner - (inner * shares).sum(-1, keepdims=True) + weigh_lse.swapaxes(1, 2)[..., None]
  slope = shares * slope
  bent = scale * (slope if bend is None else slope * (1 - bend * bend))
  fold = lambda y: y.reshape(batch, keys, groups, repeats, width).sum(3)
  grads = {
    "q": np.einsum("bhts,bshc->bthc", bent, wide_k),
    "k": fold(np.einsum("bhts,bthc->bshc", bent, q)),
    "v": fold(np.einsum("bhts,bthc->bshc", shares, x["weigh_out"])),
    "bias": None if whole is None else spread(slope),
    "k_bias": None if x["k_bias"] is None else slope.sum((1, 2)),
  }
  return out, lse.swapaxes(1, 2), grads


def _whole_bias(bias, batch: int, heads: int):
  """The bias as float64 [B,H,T,S], and what turns its gradient into that of its numbers."""
  if bias is None:
    return None, None
  if not isinstance(bias, DistanceBias):
    whole = np.broadcast_to(np.asarray(bias, np.float64), (batch, *bias.shape[1:]))
    return whole, lambda grad: grad if bias.shape[0] > 1 else grad.sum(0, keepdims=True)
  buckets = np.asarray(bias.buckets(bias.q_position, bias.k_position))
  table = np.asarray(bias.table, np.float64)
  whole = np.moveaxis(table[:, buckets], 0, 1)

  def spread(grad):
    total = np.zeros_like(table)
    for head in range(heads):
      np.add.at(total[head], buckets, grad[:, head])
    return total

  return whole, spread


def error(got, want) -> float:
  """The largest difference over the largest number; both are finite and not constant."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  none = np.isneginf(want)
  assert (np.isneginf(got) == none).all()
  got, want = np.where(none, 0.0, got), np.where(none, 0.0, want)
  assert np.isfinite(got).all()
  assert want.std() > 1e-3
  return float(np.abs(got - want).max() / np.abs(want).max())
