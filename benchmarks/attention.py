"""Attention over packed documents of text and images, forward and backward, against other kernels.

    python benchmarks/attention.py [--platform cpu|gpu|tpu] [--small]

One row of S slots, H=8 query heads in G=2 groups of C=64; f32 on a CPU, bf16 elsewhere. Documents
are text (20 to 150 tokens) and images (196 slots) in turn and end in text; seed 0. Three masks:

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
  xent_memory, xent_speed            see vocabulary.py (CPU only)
  visible                            share of visible pairs, every mask
  tflops                             of every side, FLOPs of visible pairs only (4HC forward, 14HC
                                     both ways)
  errors                             largest relative difference from ours, every side
  growth                             seconds and temporary bytes at each S
  masks                              for each mask: seconds, best, matmul, others, contended
  implementation                     of ours, every mask: on a GPU it may be one of the other sides
  contended, machine                 see protocol.py; a ratio of a contended measurement is null
"""

import argparse
import dataclasses

import attention_peers as peers
import jax
import jax.numpy as jnp
import numpy as np
import protocol

from vlm_jax.core.mask import IntervalMask
from vlm_jax.ops.attention import Request, attention, block_sizes, choose, make_plan, platform

HEADS, GROUPS, WIDTH = 8, 2, 64
IMAGE, LAYERS = 196, 24
LENGTHS = (2048, 4096, 8192, 16384, 32768)
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}  # of the largest number


@dataclasses.dataclass(frozen=True)
class Work:
  """One row. Attributes: platform; mask [1,S]; spans, the documents' [start, end); dtype; arrays
  {q, k, v, weigh} f32[1,S,H or G,C]."""

  platform: str
  mask: IntervalMask
  spans: list[tuple[int, int]]
  dtype: str
  arrays: dict[str, np.ndarray]

  @property
  def shape(self) -> tuple[int, int, int, int]:
    return self.mask.num_queries, HEADS, GROUPS, WIDTH

  def array(self, name: str) -> jax.Array:
    return jnp.asarray(self.arrays[name], self.dtype)

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


def make_work(name: str, length: int, where: str) -> Work:
  """The row of a mask's name."""
  if name == "causal":
    index = np.arange(length, dtype=np.int32)[None]
    mask, spans = IntervalMask(np.zeros_like(index), index + 1), [(0, length)]
  else:
    mask, spans = documents(length, *((3, True) if name == "packed" else (10, False)))
  rng = np.random.default_rng(1)
  draw = lambda heads: rng.standard_normal((1, length, heads, WIDTH), np.float32)
  arrays = {"q": draw(HEADS), "k": draw(GROUPS), "v": draw(GROUPS), "weigh": draw(HEADS)}
  return Work(where, mask, spans, "float32" if where == "cpu" else "bfloat16", arrays)


def planned(work: Work):
  """The mask on device and its plan."""
  length = work.mask.num_queries
  block_q, block_k = block_sizes(length, length, work.platform,
                                 sharing=HEADS // GROUPS, width=WIDTH, dtype=work.dtype)
  mask = jax.tree.map(jnp.asarray, work.mask)
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


def compare(name: str, length: int, where: str) -> dict:
  """Times one mask on every side; see the module for what it returns."""
  work = make_work(name, length, where)
  sides = {"ours": ours(work)} | peers.sides(work, "causal" if name == "causal" else "packed")
  if name == "long" and where == "cpu":
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
  timings = {way: protocol.measure({step.split()[0]: run for step, run in steps.items()
                                    if step.endswith(f" {way}")})
             for way in (("fwd", "fwd_bwd") if name == "packed" else ("fwd_bwd",))}
  visible = float(work.dense().mean())
  flops = visible * length**2 * HEADS * WIDTH
  return {"visible": visible, "errors": errors, "timings": timings,
          "implementation": chosen(work),
          "tflops": {f"{side} {way}": {"fwd": 4, "fwd_bwd": 14}[way] * flops / best / 1e12
                     for way, timing in timings.items() for side, best in timing["best"].items()}}


def grow(lengths: tuple[int, ...], where: str) -> dict:
  """How seconds and temporary bytes of a forward and backward pass grow with the row."""
  steps, memory = {}, []
  for length in lengths:
    work = make_work("packed", length, where)
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


def share(length: int, where: str) -> dict:
  """The plan's part of a forward pass of many layers that share it."""
  work = make_work("packed", length, where)
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
          if side in found[mask]["timings"].get(way, {"best": ()})["best"]}


def main() -> None:
  """Runs the comparison."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--platform", choices=("cpu", "gpu", "tpu"), default=platform())
  parser.add_argument("--small", action="store_true", help="an eighth of the lengths, a quick look")
  args = parser.parse_args()
  if args.platform != platform():
    parser.error(f"--platform {args.platform}: JAX runs on '{platform()}' here")
  part = 8 if args.small else 1
  found = {name: compare(name, 8192 // part, args.platform)
           for name in ("packed", "long", "causal")}
  growth = grow(tuple(length // part for length in LENGTHS), args.platform)
  layers = share(8192 // part, args.platform)
  result = ratios(found) | {key: growth[key] for key in ("slope_time", "slope_memory")}
  result["plan_share_24_layers"] = layers["plan_share_24_layers"]
  timings = [timing for row in found.values() for timing in row["timings"].values()]
  if args.platform == "cpu":
    import vocabulary

    entropy = vocabulary.measure(args.small)
    result |= {key: entropy[key] for key in ("xent_memory", "xent_speed")}
    result["vocabulary"] = entropy
    timings.append(entropy)
  result |= {"visible": {name: row["visible"] for name, row in found.items()},
             "tflops": {name: row["tflops"] for name, row in found.items()},
             "errors": {name: row["errors"] for name, row in found.items()},
             "masks": {name: row["timings"] for name, row in found.items()},
             "implementation": {name: row["implementation"] for name, row in found.items()},
             "growth": growth, "layers": layers, "device": jax.devices()[0].device_kind,
             "contended": any(timing["contended"] for timing in (*timings, growth, layers))}
  protocol.report(
    ["mask", "side", "best s", "TFLOP/s of visible pairs"],
    [[name, f"{side} {way}", best, row["tflops"][f"{side} {way}"]]
     for name, row in found.items() for way, timing in row["timings"].items()
     for side, best in timing["best"].items()], result)


if __name__ == "__main__":
  main()
