"""Draws the pictures of attention.md and prints its table, from the functions that training uses.

    python docs/attention.py [FOLDER]

Documents are laid out by a strategy or by the builders of `core.mask`, packed by the packer, and
classified by `make_plan`. Without a folder the pictures beside this file are written anew.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from vlm_jax.configs import base
from vlm_jax.core import fusion
from vlm_jax.core import mask as masks
from vlm_jax.core.document import Encoded, Pixels, Tokens
from vlm_jax.core.layout import Slots, mask_fields, write_slots
from vlm_jax.core.mask import IntervalMask
from vlm_jax.data.pack import Packer
from vlm_jax.fusion import concat
from vlm_jax.ops.attention import make_plan
from vlm_jax.ops.attention.plan import FULL, PARTIAL

CELL = 3  # pixels of a query-key pair
STRIP, GAP = 8, 24
COLOURS = {"image": "#d95f02", "text": "#1b9e77", "pad": "#dddddd"}
SEEN, EMPTY_BLOCK, PARTIAL_BLOCK, FULL_BLOCK = "#222222", "#ffffff", "#fdd9a0", "#a6d8ec"
WINDOW = 12


@dataclasses.dataclass(frozen=True)
class Size:
  """How large a row is: slots of an image (a square), slots of the row, slots of a block."""

  side: int
  slots: int
  block: int

  @property
  def image(self) -> int:
    return self.side**2


PICTURE = Size(side=4, slots=96, block=8)
ROW = Size(side=16, slots=4096, block=128)  # the table's second half: images of 256 slots


@dataclasses.dataclass(frozen=True)
class Policy:
  """A rule who sees whom.

  Attributes:
    title: heading of its picture.
    strategy: the fusion whose layout writes it, and its image_attention.
    image_attention: of that fusion.
    rewrite: of one document's slots (and slots of an image), where no strategy writes it yet.
    keys: the axis of the keys.
    fan_out: whether documents have branches.
  """

  title: str
  strategy: str = "concat"
  image_attention: str = "causal"
  rewrite: Callable[[Slots, int], IntervalMask] | None = None
  keys: str = concat.STREAM
  fan_out: bool = False


def only_itself(slots: Slots, image: int) -> IntervalMask:
  """Text is causal; the slots of an image see that image and nothing else."""
  ends = concat.image_ends(slots)
  mask = masks.see_until(masks.causal(len(slots)), ends)
  return dataclasses.replace(mask, lo=np.where(ends > 0, ends - image, 0).astype(np.int32))


def window(slots: Slots, image: int) -> IntervalMask:
  """Causal, and no further back than the window."""
  return masks.window(len(slots), WINDOW * image // PICTURE.image)


def last_image(slots: Slots, image: int) -> IntervalMask:
  """Text reads the last image before it, out of the features of all images; images read nothing."""
  last = np.where(slots.image > 0, 0, np.maximum.accumulate(slots.image))
  first = np.maximum(last - 1, 0) * image
  return IntervalMask(first.astype(np.int32), (last * image).astype(np.int32))


POLICIES = {
  "causal": Policy("causal, packed"),
  "prefix": Policy("prefix-LM", "prefix_lm"),
  "bidirectional": Policy("bidirectional images", image_attention="bidirectional"),
  "only_itself": Policy("an image sees only itself", rewrite=only_itself),
  "window": Policy("local window", rewrite=window),
  "last_image": Policy("last image before the text", rewrite=last_image, keys="table"),
  "fan_out": Policy("fan-out: questions about one image", fan_out=True),
}


def get_config(policy: Policy, size: Size) -> ConfigDict:
  """A config whose rows and images have this size."""
  config = base.get_config()
  config.fusion.update(name=policy.strategy, image_attention=policy.image_attention)
  config.tower.update(image_size=4 * size.side, patch=4)
  config.data.update(rows=1, tokens=size.slots, images=size.slots // size.image)
  config.data.sources.pictures = base.source(form="fan_out" if policy.fan_out else "conversation")
  return config


def lengths(size: Size) -> Iterator[tuple[int, int]]:
  """Prompts and answers, about as long as an image together; the picture's are chosen."""
  if size == PICTURE:
    return itertools.cycle([(4, 9), (3, 7), (2, 6)])
  rng = np.random.default_rng(0)
  draw = lambda: int(rng.integers(size.image // 8, size.image))
  return ((draw() // 4, draw()) for _ in itertools.count())


def documents(policy: Policy, size: Size) -> Iterator[Encoded]:
  """Introduction, image, text; two images with text behind each; or branches about one image."""
  length = lengths(size)
  pixels = Pixels(np.zeros((4 * size.side, 4 * size.side, 3), np.uint8))

  def text(branch: int = 0, predicted: bool = True) -> Tokens:
    prompt, answer = next(length)
    loss = (np.arange(prompt + answer) >= prompt) & predicted
    return Tokens(np.ones(prompt + answer, np.int32), loss, branch)

  for number in itertools.count():
    if policy.fan_out:
      parts = (pixels, text(1), text(2), text(3))
    else:
      parts = ((pixels, text(), pixels, text()) if number % 2
               else (text(predicted=False), pixels, text()))
    yield Encoded(parts, "pictures", str(number))


def packed(policy: Policy, size: Size) -> tuple[IntervalMask, dict[str, np.ndarray]]:
  """The mask of one row with as many documents as fit, [1,T] and [1,S], and the whole batch."""
  config = get_config(policy, size)
  module = fusion.find_fusion(config)
  fields, axes = module.fields(config), module.axes(config)
  if policy.rewrite:
    fields |= mask_fields(concat.STREAM, concat.STREAM, policy.keys, False)
  packer, rng = Packer(fields, axes, 1), np.random.default_rng(0)
  for encoded in documents(policy, size):
    layout = module.layout(encoded, config, rng)
    if policy.rewrite:
      mask = policy.rewrite(write_slots(encoded, module.rows(config)), size.image)
      arrays = {f"masks/{concat.STREAM}/lo": mask.lo, f"masks/{concat.STREAM}/hi": mask.hi}
      layout = dataclasses.replace(layout, arrays=layout.arrays | arrays)
    if not packer.add([layout]):
      break
  flat = packer.build().arrays
  names = ("lo", "hi", "q_class", "k_class")
  return IntervalMask(*(flat.get(f"masks/{concat.STREAM}/{name}") for name in names)), flat


def keys_of(policy: Policy, size: Size) -> int:
  """S."""
  return size.slots if policy.keys == concat.STREAM else size.slots // size.image * size.image


def kinds_of_blocks(mask: IntervalMask, keys: int, block: int) -> np.ndarray:
  """i8[Q,K], what the plan says of every block."""
  plan = make_plan(jax.tree.map(np.asarray, mask), keys, block_q=block, block_k=block)
  return np.asarray(plan.kinds)[0]


def shares(policy: Policy, size: Size) -> tuple[float, float, float]:
  """Of all pairs: those that are visible, those a kernel computes, those it need not mask."""
  mask, _ = packed(policy, size)
  keys = keys_of(policy, size)
  kinds = kinds_of_blocks(mask, keys, size.block)
  return mask.dense(keys)[0].mean(), (kinds >= PARTIAL).mean(), (kinds == FULL).mean()


def table() -> str:
  """The shares of every policy, in the picture's row and in a long one, as Markdown."""
  lines = ["| policy | picture: visible | computed | without mask | long row: visible | computed | "
           "without mask |", "|---|---|---|---|---|---|---|"]
  for policy in POLICIES.values():
    numbers = (*shares(policy, PICTURE), *shares(policy, ROW))
    lines.append(f"| {policy.title} | " + " | ".join(f"{x:.3f}" for x in numbers) + " |")
  return "\n".join(lines)


def rectangles(chosen: np.ndarray, unit: int, left: int, top: int) -> str:
  """An SVG path of the chosen cells of a grid, neighbours of one row joined."""
  pieces = []
  for y, row in enumerate(chosen):
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
    for start, end in zip(edges[::2], edges[1::2], strict=True):
      x, width = left + start * unit, (end - start) * unit
      pieces.append(f"M{x} {top + y * unit}h{width}v{unit}h-{width}z")
  return "".join(pieces)


def strip(kinds: np.ndarray, left: int, top: int, across: bool) -> str:
  """What the slots of an axis are, as a coloured strip."""
  parts = []
  for kind, colour in COLOURS.items():
    row = (kinds == kind)[None]
    path = "".join(
      rectangles(row if across else row.T, CELL, left + shift[0], top + shift[1])
      for shift in ([(0, CELL * i) for i in range(2)] if across else
                    [(CELL * i, 0) for i in range(2)])
    )
    parts.append(f'<path fill="{colour}" d="{path}"/>')
  return "".join(parts)


def picture(policy: Policy) -> str:
  """The SVG of a policy: left who sees whom, right the blocks of its plan."""
  mask, flat = packed(policy, PICTURE)
  keys, block = keys_of(policy, PICTURE), PICTURE.block
  blocks = kinds_of_blocks(mask, keys, block)
  stream = f"streams/{concat.STREAM}"
  used = flat[f"{stream}/segment_ids"][0] > 0
  queries = np.where(used, np.where(flat[f"{stream}/fill"][0] >= 0, "image", "text"), "pad")
  if policy.keys == concat.STREAM:
    columns = queries
  else:
    items = np.repeat(flat["media/images/segment_ids"][0] > 0, PICTURE.image)
    columns = np.where(items, "image", "pad")
  width, height = keys * CELL, PICTURE.slots * CELL
  seen = mask.dense(keys)[0]
  body = []
  for left in (STRIP, 2 * STRIP + width + GAP):
    body.append(strip(columns, left, 0, True))
    body.append(strip(queries, left - STRIP, STRIP, False))
    body.append(f'<rect x="{left}" y="{STRIP}" width="{width}" height="{height}" '
                f'fill="{EMPTY_BLOCK}" stroke="#888888"/>')
    if left > STRIP:
      for kind, colour in ((PARTIAL, PARTIAL_BLOCK), (FULL, FULL_BLOCK)):
        path = rectangles(blocks == kind, block * CELL, left, STRIP)
        body.append(f'<path fill="{colour}" d="{path}"/>')
      lines = "".join(f"M{left + x} {STRIP}v{height}" for x in range(0, width + 1, block * CELL))
      lines += "".join(f"M{left} {STRIP + y}h{width}" for y in range(0, height + 1, block * CELL))
      body.append(f'<path stroke="#888888" stroke-width=".5" d="{lines}"/>')
    opacity = 1 if left == STRIP else 0.35
    path = rectangles(seen, CELL, left, STRIP)
    body.append(f'<path fill="{SEEN}" fill-opacity="{opacity}" d="{path}"/>')
  total = 2 * (STRIP + width) + GAP + 1, STRIP + height + 1
  return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{total[0]}" height="{total[1]}" '
          f'viewBox="0 0 {total[0]} {total[1]}"><title>{policy.title}</title>'
          f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(body)}</svg>\n')


def main(folder: str = "") -> None:
  """Writes a picture a policy below `folder` and prints the table."""
  target = Path(folder) if folder else Path(__file__).parent / "attention"
  target.mkdir(parents=True, exist_ok=True)
  for name, policy in POLICIES.items():
    (target / f"{name}.svg").write_text(picture(policy))
  print(table())


if __name__ == "__main__":
  main(*sys.argv[1:2])
