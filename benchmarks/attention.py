"""Attention over packed documents of text and images, forward and backward, against other kernels.

    python benchmarks/attention.py [--platform cpu|gpu|tpu] [--small] [--devices N] [PART ...]

Parts are packed, long, causal, growth, layers and (on a CPU) vocabulary; all of them take a
quarter of an hour on two cores, most of it for the vocabulary. What is measured is shown at once.

One row of S slots, H=8 query heads in G=2 groups of C=64; f32 on a CPU, bf16 elsewhere. Documents
are text (20 to 150 tokens) and images (196 slots) in turn and end in text; seed 0. Our heads lie on
N devices, as tensor parallelism lays them; on a CPU two unless said otherwise, a core each, because
XLA shares only large products among cores. Three masks:

  packed   up to 3 images a document; an image sees itself and the text before it, not other images
           (the vision-to-vision cut); about 4% of all pairs are visible
  long     up to 10 images a document, which see everything before them and themselves; about 15%
  causal   one document of text

The other sides are PyTorch's scaled_dot_product_attention with the whole mask, once for each
document, or causal, and compiled FlexAttention (forward only on a CPU); on a GPU also cuDNN and
tokamax, each where it is installed; on a TPU the splash kernel of JAX. Plans, block masks and dense
masks are made before the clock starts. Outputs and gradients must agree before anything is timed.

The last line is JSON:
  vs_sdpa_dense_8192_fwd_bwd         seconds of the other side / ours, S = 8192, mask packed
  vs_sdpa_per_document_8192_fwd_bwd
  vs_flex_8192_fwd
  vs_sdpa_dense_15pct_fwd_bwd        mask long
  vs_sdpa_causal_fwd_bwd             mask causal
  slope_time, slope_memory           growth of a forward and backward pass from S = 2048 to 32768:
                                     slope of log seconds and log bytes over log S
  plan_share_24_layers               seconds to make the plan / of 24 layers forward, S = 8192
  xent_memory, xent_speed            see vocabulary.py
  visible                            share of visible pairs, every mask
  tflops                             of every side, FLOPs of visible pairs only (4HC forward, 14HC
                                     both ways)
  errors                             largest relative difference from ours, every side
  timings                            for each mask: seconds, best, matmul, others, contended
  growth, layers, vocabulary         the same of these parts; growth has the bytes at each S
  device, devices                    kind and number of our devices
  implementation                     of ours, every mask: on a GPU it may be one of the other sides
  contended, machine                 see protocol.py; a ratio of a contended measurement is null
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os

import attention_peers as peers
import jax
import jax.numpy as jnp
import numpy as np
import protocol
import vocabulary
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.mesh import AXES, spec
from vlm_jax.ops.attention import Request, attention, block_sizes, choose, make_plan, platform

HEADS, GROUPS, WIDTH = 8, 2, 64
MASKS = ("packed", "long", "causal")
PARTS = (*MASKS, "growth", "layers", "vocabulary")
IMAGE, LAYERS = 196, 24
LENGTHS = (2048, 4096, 8192, 16384, 32768)
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}  # of the largest number


@dataclasses.dataclass(frozen=True)
class Work:
  """One row. Attributes: mesh, of our devices; platform; mask [1,S]; spans, the documents'
  [start, end); dtype; arrays {q, k, v, weigh} f32[1,S,H or G,C]."""

  mesh: Mesh
  platform: str
  mask: IntervalMask
  spans: list[tuple[int, int]]
  dtype: str
  arrays: dict[str, np.ndarray]

  @property
  def shape(self) -> tuple[int, int, int, int]:
    return self.mask.num_queries, HEADS, GROUPS, WIDTH

  def array(self, name: str) -> jax.Array:
    values = jnp.asarray(self.arrays[name], self.dtype)
    heads = spec((None, None, "heads", None), values.shape, self.mesh)
    return jax.device_put(values, NamedSharding(self.mesh, heads))

  def dense(self) -> np.ndarray:
    return self.mask.dense(self.mask.num_queries)


def documents(length: int, most: int, cut: bool) -> tuple[IntervalMask, list[tuple[int, int]]]:
  """A row of documents of up to `most` images, and where each starts and ends."""
  rng = np.random.default_rng(0)
  lo, hi, query, key = np.zeros((4, 1, length), np.int32)
  spans, at, images = [], 0, 0
  while at < length:
    start = at
    parts = [part for _ in range(rng.integers(1, most + 1))
             for part in (int(rng.integers(20, 150)), -IMAGE)]
    for part in (*parts, int(rng.integers(20, 200))):
      own = slice(at, min(at + abs(part), length))
      at = own.stop
      lo[0, own], hi[0, own] = start, np.arange(own.start, own.stop) + 1
      if part < 0:
        images += 1
        hi[0, own] = own.stop
        query[0, own] = key[0, own] = images
    spans.append((start, at))
  return IntervalMask(lo, hi, *((query, key) if cut else ())), spans


def make_work(name: str, length: int, mesh: Mesh) -> Work:
  """The row of a mask's name."""
  if name == "causal":
    index = np.arange(length, dtype=np.int32)[None]
    mask, spans = IntervalMask(np.zeros_like(index), index + 1), [(0, length)]
  else:
    mask, spans = documents(length, *((3, True) if name == "packed" else (10, False)))
  rng = np.random.default_rng(1)
  draw = lambda heads: rng.standard_normal((1, length, heads, WIDTH), np.float32)
  arrays = {"q": draw(HEADS), "k": draw(GROUPS), "v": draw(GROUPS), "weigh": draw(HEADS)}
  where = platform()
  return Work(mesh, where, mask, spans, "float32" if where == "cpu" else "bfloat16", arrays)


def planned(work: Work):
  """The mask on device and its plan."""
  length = work.mask.num_queries
  block_q, block_k = block_sizes(length, length, work.platform,
                                 sharing=HEADS // GROUPS, width=WIDTH, dtype=work.dtype)
  mask = jax.device_put(work.mask, NamedSharding(work.mesh, PartitionSpec()))
  plan = jax.jit(lambda mask: make_plan(mask, length, block_q=block_q, block_k=block_k))
  return mask, plan


def ours(work: Work) -> dict[str, peers.Step]:
  """Steps of our side, with the implementation that is chosen for the platform."""
  mask, plan = planned(work)
  made = plan(mask)
  return peers.jax_steps(lambda q, k, v, mask, plan: attention(q, k, v, mask, plan=plan), work,
                         mask, made)


def chosen(work: Work) -> str:
  """The implementation that `ours` runs."""
  length, heads, groups, width = work.shape
  mask, plan = planned(work)
  return choose(Request((1, length, heads, width), (1, length, groups, width), work.dtype,
                        jax.eval_shape(plan, mask),
                        has_classes=work.mask.q_class is not None))[0]


def compare(name: str, length: int, mesh: Mesh) -> dict:
  """Times one mask on every side; see the module for what it returns."""
  work = make_work(name, length, mesh)
  sides = {"ours": ours(work)} | peers.sides(work, "causal" if name == "causal" else "packed")
  if name == "long" and work.platform == "cpu":
    sides = {side: sides[side] for side in ("ours", "torch_dense")}
  steps = {f"{side} {step}": run for side, own in sides.items() for step, run in own.items()}
  errors = {}
  for step, run in steps.items():
    side, way = step.split()
    want = peers.numbers("ours", sides["ours"][way]())
    for a, b in zip(peers.numbers(side, run()), want, strict=True):
      worst = float(np.abs(a - b).max() / np.abs(b).max())
      errors[step] = max(errors.get(step, 0.0), worst)
    if not errors[step] < TOLERANCE[work.dtype]:
      raise AssertionError(f"mask {name}, {step}: differs from ours by {errors[step]:.2g}")
  # Forward alone only where a bar asks for it: the dense sides take seconds a step.
  if work.platform == "cpu":
    steps = {step: run for step, run in steps.items() if step.endswith(" fwd_bwd") or
             (name == "packed" and step in ("ours fwd", "torch_flex fwd"))}
  timings = {way: protocol.measure({step.split()[0]: run for step, run in steps.items()
                                    if step.endswith(f" {way}")})
             for way in ("fwd", "fwd_bwd") if f"ours {way}" in steps}
  visible = float(work.dense().mean())
  flops = visible * length**2 * HEADS * WIDTH
  return {"visible": visible, "errors": errors, "timings": timings,
          "implementation": chosen(work),
          "tflops": {f"{side} {way}": {"fwd": 4, "fwd_bwd": 14}[way] * flops / best / 1e12
                     for way, timing in timings.items() for side, best in timing["best"].items()}}


def grow(lengths: tuple[int, ...], mesh: Mesh) -> dict:
  """How seconds and temporary bytes of a forward and backward pass grow with the row."""
  steps, memory = {}, []
  for length in lengths:
    work = make_work("packed", length, mesh)
    mask, plan = planned(work)
    made, weigh = plan(mask), work.array("weigh")
    total = lambda q, k, v, mask, plan, weigh: (
      attention(q, k, v, mask, plan=plan) * weigh).sum().astype(jnp.float32)
    arguments = (*(work.array(side) for side in "qkv"), mask, made, weigh)
    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(*arguments).compile()
    memory.append(compiled.memory_analysis().temp_size_in_bytes)
    steps[str(length)] = lambda run=compiled, arguments=arguments: jax.block_until_ready(
      run(*arguments))
  timing = protocol.measure(steps)
  slope = lambda values: float(np.polyfit(np.log(lengths), np.log(values), 1)[0])
  return {"slope_time": None if timing["contended"] else slope(list(timing["best"].values())),
          "slope_memory": slope(memory), "memory": memory, **timing}


def share(length: int, mesh: Mesh) -> dict:
  """The plan's part of a forward pass of many layers that share it."""
  work = make_work("packed", length, mesh)
  mask, plan = planned(work)
  k, v = work.array("k"), work.array("v")

  def layers(q, mask, plan):
    layer = lambda x, _: (attention(x, k, v, mask, plan=plan), None)
    return jax.lax.scan(layer, q, None, length=LAYERS)[0]

  made, run = plan(mask), jax.jit(layers)
  timing = protocol.measure({
    "plan": lambda: jax.block_until_ready(plan(mask)),
    "layers": lambda: jax.block_until_ready(run(work.array("q"), mask, made))})
  part = timing["best"]["plan"] / timing["best"]["layers"]
  return {"plan_share_24_layers": None if timing["contended"] else part, **timing}


def ratios(found: dict[str, dict]) -> dict[str, float | None]:
  """The keys of the table, as far as their sides were measured."""
  wanted = {
    "vs_sdpa_dense_8192_fwd_bwd": ("packed", "fwd_bwd", "torch_dense"),
    "vs_sdpa_per_document_8192_fwd_bwd": ("packed", "fwd_bwd", "torch_per_document"),
    "vs_flex_8192_fwd": ("packed", "fwd", "torch_flex"),
    "vs_sdpa_dense_15pct_fwd_bwd": ("long", "fwd_bwd", "torch_dense"),
    "vs_sdpa_causal_fwd_bwd": ("causal", "fwd_bwd", "torch_causal"),
    "vs_splash_8192_fwd_bwd": ("packed", "fwd_bwd", "splash"),
    "vs_cudnn_dense_8192_fwd_bwd": ("packed", "fwd_bwd", "cudnn"),
    "vs_tokamax_8192_fwd_bwd": ("packed", "fwd_bwd", "tokamax"),
    "vs_flex_8192_fwd_bwd": ("packed", "fwd_bwd", "torch_flex"),
  }
  return {key: protocol.ratio(found[mask]["timings"][way], "ours", [side])[0]
          for key, (mask, way, side) in wanted.items()
          if mask in found and side in found[mask]["timings"].get(way, {"best": ()})["best"]}


def show(part: str, value: dict) -> None:
  """Prints what a part found as soon as it is known."""
  brief = {key: value[key] for key in ("best", "errors", "visible", "slope_time", "slope_memory",
                                       "plan_share_24_layers", "xent_memory", "xent_speed",
                                       "contended", "others") if key in value}
  brief |= {way: timing["best"] | {"contended": timing["contended"]}
            for way, timing in value.get("timings", {}).items()}
  print(f"{part}: {json.dumps(brief)}", flush=True)


def main() -> None:
  """Runs the comparison, or the named parts of it."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--platform", choices=("cpu", "gpu", "tpu"))
  parser.add_argument("--devices", type=int, help="of ours; a CPU has as many as asked for")
  parser.add_argument("--small", action="store_true", help="an eighth of the lengths, a quick look")
  parser.add_argument("parts", nargs="*", metavar="PART", help=" ".join(PARTS))
  args = parser.parse_args()
  os.environ["XLA_FLAGS"] = (f"{os.environ.get('XLA_FLAGS', '')} "
                             f"--xla_force_host_platform_device_count={args.devices or 2}")
  where = platform()  # starts JAX, which reads the flag for its CPU
  if args.platform not in (None, where):
    parser.error(f"--platform {args.platform}: JAX runs on '{where}' here")
  count = args.devices or (2 if where == "cpu" else 1)
  mesh = Mesh(np.asarray(jax.devices()[:count]).reshape(1, 1, count), AXES)
  if unknown := set(args.parts) - set(PARTS):
    parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
  less = 8 if args.small else 1
  make = {name: functools.partial(compare, name, 8192 // less, mesh) for name in MASKS} | {
    "growth": lambda: grow(tuple(length // less for length in LENGTHS), mesh),
    "layers": lambda: share(8192 // less, mesh),
    "vocabulary": lambda: vocabulary.measure(args.small)}
  found = {}
  for part in args.parts or (PARTS if where == "cpu" else PARTS[:-1]):
    with contextlib.nullcontext() if part == "vocabulary" else jax.set_mesh(mesh):
      found[part] = make[part]()
    show(part, found[part])
  masks = {name: found[name] for name in MASKS if name in found}
  rest = {name: found[name] for name in found if name not in MASKS}
  timings = [*rest.values(), *(one for row in masks.values() for one in row["timings"].values())]
  keys = ("slope_time", "slope_memory", "plan_share_24_layers", "xent_memory", "xent_speed")
  result = ratios(masks) | {key: row[key] for key in keys for row in rest.values() if key in row}
  result |= {key: {name: row[key] for name, row in masks.items()}
             for key in ("visible", "tflops", "errors", "timings", "implementation")}
  result |= rest | {"device": jax.devices()[0].device_kind, "devices": count,
                    "contended": any(timing["contended"] for timing in timings)}
  protocol.report(
    ["mask", "side", "best s", "TFLOP/s of visible pairs"],
    [[name, f"{side} {way}", best, row["tflops"][f"{side} {way}"]]
     for name, row in masks.items() for way, timing in row["timings"].items()
     for side, best in timing["best"].items()], result)


if __name__ == "__main__":
  main()
