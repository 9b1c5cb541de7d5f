"""What an image costs a language model in every published system: `vlm-jax plan --tokens`."""

import argparse
import dataclasses
import json
import re
from typing import Any

from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.writing import write_atomically
from vlm_jax.ops import costs
from vlm_jax.ops.costs import LLM, LLMS
from vlm_jax.ops.visual_tokens import SYSTEMS, UNCOUNTED

LARGEST = 100_000  # pixels a side, tokens of a text
DEFAULTS = {"image": "640x480", "images": 1, "text": 64, "answer": 64, "llm": "vicuna-7b",
            "memory": 80.0, "out": None}
DERIVED = {"kv_heads": lambda known: known["heads"],
           "head_dim": lambda known: known["width"] // known["heads"]}
REFERENCE = "LLaVA-1.5"  # whose sequence is shown under every mask
ASSUMED = (
  "The same language model for every system; images, each as if alone, then the prompt, then the "
  "answer, which training predicts. FLOPs are those of the language model's matrices and of "
  "visible pairs; the backward pass costs twice the forward pass, as if every parameter trained. "
  "Vision tower and connector are not counted. Weights, keys and values take 2 bytes a number, and "
  "nothing else takes memory: the batch is an upper bound.")
COLUMNS = (  # heading, width, the cell of a row
  ("slots", 7, lambda row: f"{row['slots']:,}"),
  ("memory", 8, lambda row: f"{row['memory_rows']:,}" if row["memory_rows"] else "-"),
  ("context", 9, lambda row: f"{row['context_share']:.1%}"),
  ("M pairs", 11, lambda row: f"{row['pairs'] / 1e6:,.2f}"),
  ("TFLOP prefill", 15, lambda row: f"{row['prefill_flops'] / 1e12:,.3f}"),
  ("training", 10, lambda row: f"{row['train_flops'] / 1e12:,.2f}"),
  ("MB of KV", 10, lambda row: f"{row['kv_bytes'] / 1e6:,.1f}"),
  ("batch", 8, lambda row: f"{row['batch']:,}"),
)


def arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  group = parser.add_argument_group("comparing systems")
  group.add_argument("--tokens", action="store_true",
                     help="what an image costs in every published system")
  group.add_argument("--image", metavar="WxH", help="its pixels (640x480)")
  group.add_argument("--images", metavar="N", type=int, help="how many of them, or of frames (1)")
  group.add_argument("--text", metavar="N", type=int, help="tokens of the prompt (64)")
  group.add_argument("--answer", metavar="N", type=int, help="tokens of the answer (64)")
  group.add_argument("--llm", metavar="NAME[,FIELD=N...]",
                     help=f"{', '.join(LLMS)}, or fields alone: depth=24,width=2048,... "
                          "(vicuna-7b)")
  group.add_argument("--memory", metavar="GB", type=float, help="of the device (80)")
  group.add_argument("--out", metavar="FILE.html", help="draw it, too")


def refuse(args: argparse.Namespace) -> None:
  """Refuses the flags of a comparison where none is asked for."""
  for name in DEFAULTS:
    if getattr(args, name) is not None:
      raise UsageError(f"--{name} belongs to --tokens, which compares systems; add --tokens")


def run(args: argparse.Namespace) -> None:
  """Prints the comparison, and draws it."""
  if args.config is not None or args.overrides:
    raise UsageError("--tokens compares published systems and reads no recipe; leave out --config")
  given = {name: default if getattr(args, name) is None else getattr(args, name)
           for name, default in DEFAULTS.items()}
  for name, least in (("images", 1), ("text", 0), ("answer", 0), ("memory", 1)):
    if not least <= given[name] <= LARGEST:
      raise UsageError(f"--{name} is {given[name]:g}; use {least} to {LARGEST}")
  if given["out"] is not None and not given["out"].endswith(".html"):
    raise UsageError(f"--out is {given['out']}; name a file that ends in .html")
  plan = compare(image_size(given["image"]), given["images"], read_llm(given["llm"]),
                 given["text"], given["answer"], round(given["memory"] * 1e9))
  if given["out"] is not None:
    write_atomically(given["out"], draw(plan))
  print(json.dumps(plan) if args.json else render(plan))


def image_size(text: str) -> tuple[int, int]:
  """"WxH" as (width, height).

  Raises:
    UsageError: it is something else, or out of range.
  """
  match = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text)
  size = tuple(int(side) for side in match.groups()) if match else (0, 0)
  if not all(1 <= side <= LARGEST for side in size):
    raise UsageError(f"--image is '{text}'; give width and height in pixels, e.g. 640x480, "
                     f"each 1 to {LARGEST}")
  return size


def read_llm(text: str) -> LLM:
  """A language model by name, by fields, or by name with some fields changed.

  Raises:
    UsageError: no such name or field, a field that is missing or no count, or heads that do not
      share their keys evenly.
  """
  fields = [field.name for field in dataclasses.fields(LLM)]
  name, *rest = text.split(",")
  if "=" in name:
    name, rest = "", text.split(",")
  elif name not in LLMS:
    raise UsageError(f"--llm: no language model '{name}'; {nearest(name, LLMS)}; or give its "
                     f"fields, e.g. --llm=depth=24,width=2048,...")
  known = dataclasses.asdict(LLMS[name]) if name else {}
  for item in rest:
    field, _, value = item.partition("=")
    if field not in fields:
      raise UsageError(f"--llm: no field '{field}'; {nearest(field, fields)}")
    if not re.fullmatch(r"[1-9]\d{0,8}", value):
      raise UsageError(f"--llm: {field} is '{value}', not a positive whole number")
    known[field] = int(value)
  missing = [field.name for field in dataclasses.fields(LLM)
             if field.default is dataclasses.MISSING and field.name not in {*known, *DERIVED}]
  if missing:
    raise UsageError(f"--llm: {', '.join(missing)} missing; give every field, or a name first: "
                     f"{', '.join(LLMS)}")
  for field, derive in DERIVED.items():
    known.setdefault(field, derive(known))
  llm = LLM(**known)
  if llm.heads % llm.kv_heads or not llm.head_dim:
    raise UsageError(f"--llm: {llm.heads} heads of width {llm.head_dim} cannot share "
                     f"{llm.kv_heads} kv_heads evenly")
  return llm


def compare(image: tuple[int, int], images: int, llm: LLM, text: int, answer: int,
            memory: int) -> dict[str, Any]:
  """The costs of every system.

  Args:
    image: width and height in pixels.
    images: how many of them.
    llm: the language model, the same for all.
    text, answer: tokens of the prompt and of the answer.
    memory: bytes of the device.

  Returns:
    "image", "images", "text", "answer", "llm", "memory", "assumed" (in words), "systems" {name:
    what `costs.estimate` returns, "context_share", "rule", "source"}, "uncounted" {name: why},
    "masks" {name: visible pairs of one layer for the slots of LLaVA-1.5}.
  """
  width, height = image
  systems = {}
  for name, system in SYSTEMS.items():
    seen = dataclasses.replace(system.image(height, width), count=images)
    row = costs.estimate(seen, llm, text, answer, memory)
    systems[name] = row | {"context_share": row["sequence"] / llm.context, "rule": system.rule,
                           "source": system.source}
  return {"image": list(image), "images": images, "text": text, "answer": answer,
          "llm": dataclasses.asdict(llm), "memory": memory, "assumed": ASSUMED,
          "systems": systems, "uncounted": dict(UNCOUNTED),
          "masks": by_mask(SYSTEMS[REFERENCE].image(height, width).slots, images, text, answer)}


def by_mask(each: int, images: int, text: int, answer: int) -> dict[str, int]:
  """Visible pairs of one layer when images and text see each other by one rule or another."""
  slots = each * images
  n = slots + text + answer
  return {
    "causal": costs.causal(n),
    "bidirectional images": costs.image_blocks(n, [each] * images),
    "prefix": costs.prefix(n, slots + text),
    "full": costs.full(n),
    "cross-attention to all": costs.causal(text + answer) + costs.cross(text + answer, slots),
    "to the last image": costs.causal(text + answer) + costs.cross(text + answer, each),
  }


def lead(plan: dict[str, Any]) -> str:
  """What is compared, in one sentence."""
  llm, (width, height) = plan["llm"], plan["image"]
  what = "An image" if plan["images"] == 1 else f"{plan['images']:,} images"
  return (f"{what} of {width} x {height} pixels, {plan['text']} tokens of prompt, "
          f"{plan['answer']} of answer; a language model of {llm['depth']} layers of "
          f"{llm['width']}, {llm['heads']} heads in {llm['kv_heads']} groups of {llm['head_dim']}, "
          f"context {llm['context']:,}; a device of {plan['memory'] / 1e9:g} GB")


def render(plan: dict[str, Any]) -> str:
  """The comparison as text."""
  lines = [lead(plan), "", f"{'system':<26}" + "".join(f"{head:>{wide}}"
                                                       for head, wide, _ in COLUMNS)]
  for name, row in plan["systems"].items():
    lines.append(f"{name:<26}" + "".join(f"{cell(row):>{wide}}" for _, wide, cell in COLUMNS))
  reasons: dict[str, list[str]] = {}
  for name, reason in plan["uncounted"].items():
    reasons.setdefault(reason, []).append(name)
  lines += ["", "not counted"]
  lines += [f"  {', '.join(names)}: {reason}" for reason, names in reasons.items()]
  masks = ", ".join(f"{name} {pairs:,}" for name, pairs in plan["masks"].items())
  lines += ["", f"pairs of one layer in the sequence of {REFERENCE}: {masks}", "",
            "slots: places in the sequence, where they are most; memory: rows that text reads by",
            "cross-attention; pairs: visible, of all layers, one head; above 100% the context is",
            "too short", plan["assumed"]]
  return "\n".join(lines)


def draw(plan: dict[str, Any]) -> str:
  """The comparison as one HTML file that loads nothing."""
  from vlm_jax.report import charts
  from vlm_jax.report.html import table, tag
  from vlm_jax.report.style import document

  systems = plan["systems"]
  values = lambda key, unit: {name: row[key] / unit for name, row in systems.items()}
  short, percent = lambda value: f"{value:,.1f}", lambda value: f"{100 * value:.1f}%"
  figures = [
    charts.bars("Slots in the sequence", values("slots", 1), note="where they are most"),
    charts.bars("Context", values("context_share", 1), note="text included", show=percent),
    charts.bars("Prefill", values("prefill_flops", 1e12), note="TFLOP", show=short),
    charts.bars("Training step", values("train_flops", 1e12), note="TFLOP, one sequence",
                show=short),
    charts.bars("Keys and values", values("kv_bytes", 1e6), note="MB a sequence", show=short),
    charts.bars("Batch", values("batch", 1), note="sequences that fit"),
  ]
  rows = [[name, *(cell(row) for _, _, cell in COLUMNS), row["rule"],
           row["source"]]
          for name, row in systems.items()]
  head = ["system", *(head for head, _, _ in COLUMNS), "rule", "source"]
  rest = [[name, reason] for name, reason in plan["uncounted"].items()]
  body = [tag("h1", "What an image costs"), tag("p", lead(plan), class_="lead"),
          tag("div", figures, class_="charts"), tag("h2", "Every system"),
          table(head, rows, range(1, len(COLUMNS) + 1)), tag("p", plan["assumed"], class_="muted"),
          tag("h2", f"The sequence of {REFERENCE} under every mask"),
          charts.bars("Visible pairs", plan["masks"], note="of one layer"),
          tag("h2", "Not counted"), table(["system", "why"], rest)]
  return document("What an image costs - vlm_jax", body)
