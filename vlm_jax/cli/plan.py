"""Says what a recipe will cost before anything runs: parameters, shapes, tokens, FLOPs, kernels.

Nothing is computed and no parameter is made; only shapes are traced. With prepared data, one step
of it is packed and measured. --tokens needs no recipe: it compares what an image costs a language
model in every published system.
"""

import argparse
import collections
import functools
import json
import math
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.cli import config as recipes
from vlm_jax.cli import plan_tokens
from vlm_jax.core.errors import UsageError

SUMMARY = "parameters, shapes, tokens, FLOPs and kernels of a recipe, or of all systems"
MOMENTS = 2  # AdamW keeps two numbers a parameter that trains
DEPTH = 2  # path segments by which parameters are grouped


def arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  recipes.argument(parser, required=False)
  parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
  plan_tokens.arguments(parser)


def run(args: argparse.Namespace) -> None:
  """Prints the plan."""
  if args.tokens:
    return plan_tokens.run(args)
  plan_tokens.refuse(args)
  if args.config is None:
    raise UsageError("plan needs a recipe, --config=FILE.py[:ARG], or --tokens to compare systems")
  plan = make(recipes.read(args))
  print(json.dumps(plan) if args.json else render(plan))


def make(config: ConfigDict) -> dict[str, Any]:
  """The plan of a config.

  Returns:
    "modules" {name: {"parameters", "trainable", "bytes"}} with bytes of parameters and optimiser,
    "batch" {path: [dtype, shape]}, "image_slots" (slots of one square of the image axis), "tiled"
    (whether an image may be several squares), "frames" (the most of a video, 0: there are none),
    "data" (see `measure`) or the reason why there is none, "flops" of one step, "attention" (see
    `kernels`).
  """
  from vlm_jax.core.fusion import find_fusion
  from vlm_jax.core.layout import TIME
  from vlm_jax.core.mesh import make_mesh
  from vlm_jax.core.tree import flatten
  from vlm_jax.train import state as states
  from vlm_jax.train.metrics import Work
  from vlm_jax.train.optimizer import make_optimizer

  module, mesh = find_fusion(config), make_mesh(config)
  _, leaves = states.initializer(module, config)
  optimizer = make_optimizer(config, module.STAGES, leaves)
  batch = states.abstract_batch(module, config, mesh)
  moved = set(flatten(optimizer.select(states.abstract_params(leaves, mesh))))
  data = measure(config)
  return {
    "fusion": config.fusion.name,
    "modules": modules(leaves, moved),
    "batch": {path: [str(leaf.dtype), list(leaf.shape)] for path, leaf in batch.items()},
    "image_slots": len(module.rows(config)),
    "tiled": bool(config.data.decode.grids),
    "frames": config.data.frames if TIME in batch else 0,
    "data": data,
    "flops": flops(Work(config, leaves, batch), data),
    "attention": kernels(config),
  }


def modules(leaves: dict, moved: set[str]) -> dict[str, dict[str, int]]:
  """Parameters and bytes by module; a parameter that trains also costs its optimiser moments."""
  rows: dict = collections.defaultdict(lambda: {"parameters": 0, "trainable": 0, "bytes": 0})
  for path, leaf in leaves.items():
    size = math.prod(leaf.shape)
    trains = size if path in moved else 0
    for name in ("/".join(path.split("/")[:DEPTH]), "total"):
      rows[name]["parameters"] += size
      rows[name]["trainable"] += trains
      rows[name]["bytes"] += (size + MOMENTS * trains) * leaf.dtype.itemsize
  total = rows.pop("total")
  return {**dict(sorted(rows.items())), "total": total}


def measure(config: ConfigDict) -> dict[str, Any] | str:
  """Packs one step of the prepared data.

  Returns:
    "documents" {source: in the step}, "tokens" {source: mean slots a document takes, images
    included; a text of fixed length is one}, "fill" {axis: share}, "pairs" {mask: visible pairs
    inside the intervals}, "predicted": tokens with a loss; or a sentence that says why there is no
    data.
  """
  import numpy as np

  from vlm_jax.core.errors import DataError
  from vlm_jax.core.layout import owners_of
  from vlm_jax.data import pipeline

  try:
    loader = pipeline.make(config)
    batch, info = next(loader)
    loader.close()
  except DataError as error:
    return f"not measured: {error}"
  tokens = {}
  ids = lambda field: np.concatenate([
    batch[f"{path}/{field}"] for path in owners_of(batch)], axis=1)
  segments, sources = ids("segment_ids"), ids("source_ids")
  for index, name in enumerate(sorted(config.data.sources)):
    mine = (segments > 0) & (sources == index)
    tokens[name] = round(float(mine.sum()) / max(info["documents"].get(name, 0), 1), 1)
  pairs = {path.split("/")[1]: int(np.maximum(batch[path.replace("/lo", "/hi")] - lo, 0).sum())
           for path, lo in batch.items() if path.startswith("masks/") and path.endswith("/lo")}
  predicted = sum(int((values > 0).sum()) for path, values in batch.items()
                  if "/loss_weights/" in path)
  return {"documents": info["documents"], "tokens": tokens, "fill": info["fill"], "pairs": pairs,
          "predicted": predicted}


def flops(work: Any, data: dict | str) -> dict[str, float]:
  """FLOPs of one step, both ways: dense layers on every slot, attention on visible pairs, the head.

  Without prepared data only the layers are there: visible pairs and predictions are in the data.
  """
  row = {"dense": float(work.dense())}
  if isinstance(data, dict):
    row["attention"] = float(work.attention(data["pairs"]))
    row["head"] = float(work.head(data["predicted"]))
  return row | {"total": sum(row.values())}


def kernels(config: ConfigDict) -> dict[str, dict[str, Any]]:
  """For training rows: which implementation runs each mask and the tower, and why not others."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from vlm_jax.core.fusion import find_fusion, find_tower
  from vlm_jax.core.layout import mask_axes
  from vlm_jax.core.mask import full
  from vlm_jax.nn.attention import make_context
  from vlm_jax.ops import attention

  module, tower, llm = find_fusion(config), find_tower(config), config.llm
  capacity, head = module.axes(config), llm.head_dim or llm.width // llm.heads
  fields = module.fields(config)
  shapes = {
    name: (capacity[queries], capacity[keys], llm.heads, llm.kv_heads, head)
    for name, (queries, keys) in mask_axes(fields).items()
  }
  own = module.attention_shapes(config) if hasattr(module, "attention_shapes") else {}
  for name, (_, heads, width) in own.items():
    shapes[name] = (*shapes[name][:2], heads, heads, width)
  if hasattr(tower, "attention_shape"):
    length, *sizes = tower.attention_shape(config.tower)
    shapes["tower"] = (length, length, *sizes)
  rows, dtype = {}, jnp.dtype(config.precision.compute)
  biased = {*getattr(module, "BIASED", ()),
            *(("encoder", module.STREAM) if llm.relative_buckets else ())}
  for name, (length, keys, heads, groups, width) in shapes.items():
    mask = jax.tree.map(lambda field: np.asarray(field)[None], full(length))
    context = functools.partial(make_context, rotation=None, sharing=heads // groups, keys=keys,
                                width=width, dtype=dtype,
                                blocks=(config.attention.block_q, config.attention.block_k))
    plan = jax.eval_shape(context, mask).plan
    request = attention.Request(
      q_shape=(1, length, heads, width), k_shape=(1, keys, groups, width), plan=plan,
      dtype=dtype, has_bias=name in biased,
      has_classes=f"masks/{name}/q_class" in fields,
      soft_cap=None if name == "tower" else llm.attention_soft_cap or None)
    chosen, refused = attention.choose(request, config.attention.implementation)
    rows[name] = {"length": length, "keys": keys, "heads": heads, "groups": groups,
                  "head_dim": width, "implementation": chosen, "refused": refused,
                  "blocks": [plan.block_q, plan.block_k]}
  return rows


def render(plan: dict[str, Any]) -> str:
  """The plan as text."""
  lines = [f"{plan['fusion']}", "", f"{'module':<28}{'parameters':>14}{'that train':>14}{'MB':>10}"]
  for name, row in plan["modules"].items():
    lines.append(f"{name:<28}{row['parameters']:>14,}{row['trainable']:>14,}"
                 f"{row['bytes'] / 1e6:>10.2f}")
  lines += ["", "batch of one step"]
  lines += [f"  {path:<36}{dtype}[{', '.join(map(str, shape))}]"
            for path, (dtype, shape) in plan["batch"].items()]
  what = "the whole of an image, and each of its tiles," if plan["tiled"] else "an image"
  what += f" or a video of up to {plan['frames']} frames" if plan["frames"] else ""
  lines += ["", f"{what} takes {plan['image_slots']} slots"]
  data = plan["data"]
  if isinstance(data, dict):
    for name, tokens in data["tokens"].items():
      lines.append(f"  {name:<20}{data['documents'].get(name, 0):>5} documents in the first step, "
                   f"{tokens:,.1f} slots each")
    fill = ", ".join(f"{axis} {share:.1%}" for axis, share in data["fill"].items())
    lines.append(f"  slots in use: {fill}")
  else:
    lines.append(f"  {data}")
  parts = ", ".join(f"{name} {value:.3g}" for name, value in plan["flops"].items())
  lines += ["", f"FLOPs of a step, forward and backward: {parts}", "", "attention"]
  for name, row in plan["attention"].items():
    lines.append(f"  {name:<8}{row['length']} x {row['keys']}, {row['heads']} heads in "
                 f"{row['groups']} groups of {row['head_dim']}: {row['implementation']}, blocks of "
                 f"{' x '.join(map(str, row['blocks']))}")
    lines += [f"          not {other}: {reason}" for other, reason in row["refused"].items()]
  return "\n".join(lines)
