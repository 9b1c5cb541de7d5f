"""The other sides of attention.py: functions of q, k, v that compute the same mask elsewhere.

A side takes the work and returns {"fwd": step, "fwd_bwd": step}; a step runs once, waits and
returns what it computed: out, or out and the gradients of q, k and v (see `numbers`).
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Step = Callable[[], tuple[np.ndarray, ...]]


def jax_steps(run: Callable, work: Any, *given: Any) -> dict[str, Step]:
  """Steps of a JAX function of q, k, v and what is given (nothing of it is known to the compiler);
  gradients are those of the sum of out * weigh."""

  def both(q, k, v, weigh, *given):
    out, pull = jax.vjp(lambda *x: run(*x, *given), q, k, v)
    return (out, *pull(weigh))

  arrays = [work.array(name) for name in ("q", "k", "v", "weigh")]
  step = lambda jitted: lambda: jax.block_until_ready(jitted(*arrays, *given))
  return {"fwd": step(jax.jit(lambda q, k, v, weigh, *given: (run(q, k, v, *given),))),
          "fwd_bwd": step(jax.jit(both))}


def torch_steps(run: Callable, work: Any) -> dict[str, Step]:
  """Steps of a PyTorch function of q, k, v [B,H,T,C] and [B,G,S,C]."""
  import torch

  device = "cuda" if work.platform == "gpu" else "cpu"
  kind = torch.bfloat16 if work.dtype == "bfloat16" else torch.float32
  place = lambda name: torch.tensor(np.asarray(work.arrays[name]).swapaxes(1, 2).copy(),
                                    dtype=kind, device=device)
  arrays, weigh = [place(name) for name in "qkv"], place("weigh")
  wait = torch.cuda.synchronize if device == "cuda" else lambda: None
  leaves = [x.clone().requires_grad_() for x in arrays]

  def forward():
    with torch.no_grad():
      out = run(*arrays)
    wait()
    return (out,)

  def both():
    for leaf in leaves:
      leaf.grad = None
    out = run(*leaves)
    (out * weigh).sum().backward()
    wait()
    return (out.detach(), *(leaf.grad for leaf in leaves))

  return {"fwd": forward, "fwd_bwd": both}


def numbers(side: str, outputs: tuple) -> list[np.ndarray]:
  """Outputs of a step as f32 [B,T,H,C] arrays."""
  if side.startswith("torch"):
    return [x.float().cpu().numpy().swapaxes(1, 2) for x in outputs]
  return [np.asarray(x, np.float32) for x in outputs]


def torch_dense(work: Any) -> dict[str, Step]:
  """scaled_dot_product_attention with the whole mask."""
  import torch
  from torch.nn.functional import scaled_dot_product_attention as sdpa

  mask = torch.tensor(work.dense()).to("cuda" if work.platform == "gpu" else "cpu")[:, None]
  return torch_steps(functools.partial(sdpa, attn_mask=mask, enable_gqa=True), work)


def torch_causal(work: Any) -> dict[str, Step]:
  """scaled_dot_product_attention with is_causal."""
  from torch.nn.functional import scaled_dot_product_attention as sdpa

  return torch_steps(functools.partial(sdpa, is_causal=True, enable_gqa=True), work)


def torch_per_document(work: Any) -> dict[str, Step]:
  """scaled_dot_product_attention once for each document with the mask inside it."""
  import torch
  from torch.nn.functional import scaled_dot_product_attention as sdpa

  device = "cuda" if work.platform == "gpu" else "cpu"
  dense = torch.tensor(work.dense())
  masks = [dense[:, None, start:end, start:end].clone().to(device) for start, end in work.spans]

  def run(q, k, v):
    parts = [sdpa(q[:, :, start:end], k[:, :, start:end], v[:, :, start:end], attn_mask=mask,
                  enable_gqa=True)
             for (start, end), mask in zip(work.spans, masks, strict=True)]
    return torch.cat(parts, dim=2)

  return torch_steps(run, work)


def torch_flex(work: Any) -> dict[str, Step]:
  """Compiled FlexAttention; its blocks are classified beforehand. It has no backward on a CPU."""
  import torch
  from torch.nn.attention.flex_attention import create_block_mask, flex_attention

  device = "cuda" if work.platform == "gpu" else "cpu"
  mask = work.mask
  lo, hi = (torch.tensor(x[0], device=device) for x in (mask.lo, mask.hi))
  none = np.zeros_like(mask.lo)
  query, key = (torch.tensor((none if x is None else x)[0], device=device)
                for x in (mask.q_class, mask.k_class))

  def seen(_batch, _head, i, j):
    same = (query[i] == 0) | (key[j] == 0) | (query[i] == key[j])
    return (lo[i] <= j) & (j < hi[i]) & same

  blocks = create_block_mask(seen, 1, None, len(lo), len(lo), device=device)
  compiled = torch.compile(flex_attention)
  steps = torch_steps(lambda q, k, v: compiled(q, k, v, block_mask=blocks, enable_gqa=True), work)
  return steps if device == "cuda" else {"fwd": steps["fwd"]}


def cudnn_dense(work: Any) -> dict[str, Step]:
  """jax.nn.dot_product_attention by cuDNN with the whole mask."""
  mask = jnp.asarray(work.dense())[:, None]
  return jax_steps(functools.partial(jax.nn.dot_product_attention, mask=mask,
                                     implementation="cudnn"), work)


def cudnn_causal(work: Any) -> dict[str, Step]:
  """jax.nn.dot_product_attention by cuDNN, causal."""
  return jax_steps(functools.partial(jax.nn.dot_product_attention, is_causal=True,
                                     implementation="cudnn"), work)


def tokamax_dense(work: Any) -> dict[str, Step]:
  """tokamax.dot_product_attention with the whole mask."""
  import tokamax

  mask = jnp.asarray(work.dense())[:, None]
  return jax_steps(functools.partial(tokamax.dot_product_attention, mask=mask), work)


def splash(work: Any) -> dict[str, Step]:
  """The splash kernel that JAX ships, with the whole mask given while tracing."""
  from jax.experimental.pallas.ops.tpu import splash_attention as stock

  heads, scale = work.shape[1], work.shape[3] ** -0.5
  mask = stock.MultiHeadMask([stock.NumpyMask(np.asarray(work.dense()[0]))] * heads)
  sizes = stock.BlockSizes(**dict.fromkeys((
    "block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv",
    "block_kv_dkv_compute", "block_q_dq", "block_kv_dq"), 512))
  kernel = stock.make_splash_mha_single_device(mask, block_sizes=sizes)
  share = heads // work.shape[2]
  first = lambda x, repeats=1: jnp.repeat(x[0].swapaxes(0, 1), repeats, axis=0)
  run = lambda q, k, v: kernel(first(q) * scale, first(k, share), first(v, share))
  return jax_steps(lambda *x: run(*x).swapaxes(0, 1)[None], work)


def installed(*names: str) -> bool:
  """Whether all of these packages are there."""
  return all(importlib.util.find_spec(name) for name in names)


def sides(work: Any, kind: str) -> dict[str, dict[str, Step]]:
  """Every other side of a kind of mask ("packed" or "causal") on the work's platform.

  On a GPU, sides that are not installed are left out; on a CPU, PyTorch must be there.
  """
  if work.platform == "tpu":
    return {"splash": splash(work)}
  if work.platform == "cpu":
    wanted = {"packed": {"torch_dense": torch_dense, "torch_per_document": torch_per_document,
                         "torch_flex": torch_flex},
              "causal": {"torch_causal": torch_causal}}[kind]
    return {name: make(work) for name, make in wanted.items()}
  found = {}
  if installed("torch"):
    found |= ({"torch_causal": torch_causal} if kind == "causal" else
              {"torch_dense": torch_dense, "torch_per_document": torch_per_document,
               "torch_flex": torch_flex})
  found["cudnn"] = cudnn_causal if kind == "causal" else cudnn_dense
  if installed("tokamax"):
    found["tokamax"] = tokamax_dense
  return {name: make(work) for name, make in found.items()}
