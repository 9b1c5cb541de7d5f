"""`vlm-jax data inspect`: what the model is really given, in words and as a picture.

Counts, histograms and fill come from packed steps, the decoded text from the packed arrays
themselves: what is shown is what is trained on.
"""

import json
import os

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from vlm_jax.core.batch import from_flat
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.layout import IGNORE, TIME, heard, mask_axes, owners_of
from vlm_jax.data import pipeline
from vlm_jax.data.tokenizer import Tokenizer

Flat = dict[str, np.ndarray]
COLOURS = {
  "padding": (235, 235, 235), "image": (70, 130, 200), "prompt": (240, 180, 60),
  "predicted": (200, 60, 60),
}
SEEN, UNSEEN = (40, 40, 40), (255, 255, 255)
BAR = 40  # characters of the longest bar


def inspect(config: ConfigDict, steps: int = 4, examples: int = 3, rows: int = 2,
            picture: str = "") -> str:
  """Describes the first packed steps of a recipe.

  Args:
    config: the recipe.
    steps: how many steps to pack.
    examples: documents to write out.
    rows: rows of the first step to draw.
    picture: where to write the PNG, "" for none.

  Returns:
    The description, lines of text.
  """
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.data.prefetch = 0
  loader = pipeline.make(config)
  made = [next(loader) for _ in range(steps)]
  tallies = loader.tallies
  loader.close()
  lines = [f"{steps} steps of {config.data.rows} rows, {config.data.tokens} tokens and "
           f"{config.data.images} images each"]
  lines += [f"  {tally.source}: {tally.seen} records read, {sum(tally.bad.values())} bad "
            f"{tally.examples()}".rstrip() for tally in tallies]
  lines += summary(config, [batch for batch, _ in made], [info for _, info in made])
  lines += ["", *show(config, made[0][0], examples)]
  if picture:
    draw_rows(config, made[0][0], rows).save(picture)
    lines += ["", f"{picture}: tokens and attention of {rows} rows of the first step"]
  return "\n".join(lines)


def summary(config: ConfigDict, batches: list[Flat], infos: list[dict]) -> list[str]:
  """Fill, documents of every source, and histograms of tokens and images a document; lines."""
  lines = ["fill: " + ", ".join(
    f"{axis} {np.mean([info['fill'][axis] for info in infos]):.3f}" for axis in infos[0]["fill"]
  )]
  names = sorted(config.data.sources)
  counts = {name: sum(info["documents"].get(name, 0) for info in infos) for name in names}
  lines.append("documents: " + ", ".join(f"{name} {counts[name]}" for name in names))
  tokens: dict[str, list[int]] = {name: [] for name in names}
  images: dict[str, list[int]] = {name: [] for name in names}
  for batch in batches:
    for row, number in _documents(batch):
      slots = _slots(batch, row, number)
      sources = [batch[f"{path}/source_ids"][row][mine] for path, mine in slots.items()]
      name = names[np.concatenate(sources)[0]]
      tokens[name].append(sum(map(len, slots.values())))
      if "media/images/segment_ids" in batch:
        images[name].append(int((batch["media/images/segment_ids"][row] == number).sum()))
  for name in names:
    lines += [f"slots of a document, {name}:", *histogram(tokens[name])]
    if any(images[name]):
      lines += [f"images of a document, {name}:", *histogram(images[name])]
  return lines


def _documents(batch: Flat) -> list[tuple[int, int]]:
  """(row, number in the row) of every document."""
  ids = np.concatenate([batch[f"{path}/segment_ids"] for path in owners_of(batch)], axis=1)
  return [(row, int(n)) for row in range(len(ids)) for n in np.unique(ids[row]) if n]


def _slots(batch: Flat, row: int, number: int) -> dict[str, np.ndarray]:
  """Path of a stream, or of texts that are compared, to the slots of a document."""
  return {path: np.flatnonzero(batch[f"{path}/segment_ids"][row] == number)
          for path in owners_of(batch)}


def read_streams(config: ConfigDict) -> list[str]:
  """Paths of what has words of its own: streams that are heard, or else texts of fixed length."""
  module = find_fusion(config)
  fields = module.fields(config)
  return owners_of(heard(fields, module.STREAM) if module.STREAM else fields)


def histogram(values: list[int], bins: int = 8) -> list[str]:
  """Bars of text, one line a bin; whole-number edges."""
  if not values:
    return ["  nothing"]
  low, high = min(values), max(values)
  width = max(1, -(-(high - low + 1) // bins))
  counts = np.bincount([(value - low) // width for value in values])
  labels = [f"{low + i * width}" if width == 1 else f"{low + i * width}-{low + (i + 1) * width - 1}"
            for i in range(len(counts))]
  return [f"  {label:>11} {'#' * -(-BAR * count // max(counts))} {count}"
          for label, count in zip(labels, counts.tolist(), strict=True)]


def show(config: ConfigDict, batch: Flat, examples: int) -> list[str]:
  """Documents written out: <image:n> for n image slots, [[predicted text]] in double brackets.

  Several streams are written one after the other, with " | " between them.
  """
  tokenizer, paths, lines = pipeline.load_tokenizer(config), read_streams(config), []
  for row, number in _documents(batch)[:examples]:
    slots = _slots(batch, row, number)
    parts = [written(batch, path, row, slots[path], tokenizer) for path in paths]
    lines += [f"row {row}, document {number}:", "  " + " | ".join(parts)]
  return lines


def written(batch: Flat, path: str, row: int, slots: np.ndarray, tokenizer: Tokenizer) -> str:
  """The text of some slots of a row; a token is in [[ ]] when the slot before it predicts it."""
  kind, stream = path.split("/")
  if kind == "documents":  # texts of fixed length, padded with 0
    texts = batch[f"{path}/tokens"][row, slots]
    return "".join(tokenizer.decode(text[text > 0], specials=True) for text in texts)
  tokens, fill = batch[f"streams/{stream}/tokens"][row], batch[f"streams/{stream}/fill"][row]
  runs: list[tuple[str, list[int]]] = []
  kinds = kinds_of(batch, stream, row)
  for slot in slots:
    kind = "image" if fill[slot] != IGNORE else kinds[slot]
    if not runs or runs[-1][0] != kind:
      runs.append((kind, []))
    runs[-1][1].append(int(tokens[slot]))

  def write(kind: str, ids: list[int]) -> str:
    if kind == "image":
      return f"<image:{len(ids)}>"
    text = tokenizer.decode(ids, specials=True).replace("\n", "\\n")
    return f"[[{text}]]" if kind == "predicted" else text

  return "".join(write(kind, ids) for kind, ids in runs)


def kinds_of(batch: Flat, stream: str, row: int) -> list[str]:
  """The kind of every slot of a row of a stream: a key of `COLOURS`."""
  path = f"streams/{stream}"
  fill, segments = batch[f"{path}/fill"][row], batch[f"{path}/segment_ids"][row]
  predicted = np.zeros(len(fill), bool)
  for name, weights in batch.items():
    if name.startswith(f"{path}/loss_weights/"):
      predicted[1:] |= weights[row][:-1] > 0
  return ["padding" if not segments[i] else "image" if fill[i] != IGNORE
          else "predicted" if predicted[i] else "prompt" for i in range(len(fill))]


def draw_rows(config: ConfigDict, batch: Flat, rows: int) -> Image.Image:
  """The first rows as a picture: token kinds on two sides of every mask, one pixel a pair.

  A dark pixel at (i, j) says that slot i sees slot j. Masks stand side by side in the order of the
  batch, rows of the batch too; a legend stands below.

  Raises:
    UsageError: the strategy has no mask.
  """
  masks = from_flat(batch).masks
  if not masks:
    raise UsageError(f"config.fusion.name '{config.fusion.name}' has no packed stream and no mask "
                     "to draw; leave the picture out")
  module = find_fusion(config)
  axes, capacity = mask_axes(module.fields(config)), module.axes(config)
  rows = min(rows, len(next(iter(masks.values())).lo))
  strip, gap, legend = 12, 16, 24
  length = {axis: capacity[axis] for pair in axes.values() for axis in pair}
  panels = [(name, row) for row in range(rows) for name in axes]
  width = sum(strip + length[axes[name][1]] + gap for name, _ in panels) - gap
  side = strip + max(length[queries] for queries, _ in axes.values())
  canvas = Image.new("RGB", (width, side + legend), UNSEEN)
  left = 0
  # Frames of a video are one item, whose rows come behind those of the item before.
  items = np.sort(batch[TIME] != 0) == 0 if TIME in batch else batch["media/images/segment_ids"] > 0
  of_table = lambda row: np.repeat(items[row], capacity["table"] // capacity["images"])
  kinds = lambda axis, row: kinds_of(batch, axis, row) if axis != "table" else [
    "image" if there else "padding" for there in of_table(row)]
  colours = lambda axis, row: np.array([COLOURS[kind] for kind in kinds(axis, row)], np.uint8)
  for name, row in panels:
    queries, keys = axes[name]
    one = jax.tree.map(lambda field, row=row: np.asarray(field[row]), masks[name])
    pixels = np.where(np.asarray(one.dense(length[keys]))[..., None], SEEN, UNSEEN)
    canvas.paste(Image.fromarray(pixels.astype(np.uint8)), (left + strip, strip))
    top, aside = colours(keys, row), colours(queries, row)
    canvas.paste(Image.fromarray(np.repeat(top[None], strip, 0)), (left + strip, 0))
    canvas.paste(Image.fromarray(np.repeat(aside[:, None], strip, 1)), (left, strip))
    left += strip + length[keys] + gap
  pen, left = ImageDraw.Draw(canvas), 4
  for kind, colour in (COLOURS | {"sees": SEEN}).items():
    pen.rectangle((left, side + 7, left + 10, side + 17), fill=colour)
    pen.text((left + 14, side + 6), kind, fill=SEEN)
    left += 24 + 7 * len(kind)
  return canvas


def batch_at(config: ConfigDict, step: int, start: dict | None = None, start_step: int = 1
             ) -> tuple[Flat, dict]:
  """The exact batch that training read as step `step` (1 is the first, as in metrics.jsonl).

  Args:
    config: the frozen config of the run.
    step: which step, from 1.
    start: a saved data state at or before it, None to pack every step from the beginning.
    start_step: the step that `start` makes next.

  Raises:
    UsageError: `start_step` is behind `step`.
  """
  if not 1 <= start_step <= step:
    raise UsageError(f"step {step} cannot be rebuilt from a position at step {start_step}; start "
                     "from an earlier checkpoint")
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.data.prefetch = 0
  loader = pipeline.make(config, start=start)
  try:
    for _ in range(step - start_step):
      next(loader)
    return next(loader)
  finally:
    loader.close()


def inspect_step(workdir: str, step: int, start: dict | None = None, start_step: int = 1,
                 examples: int = 3, rows: int = 2, picture: str = "", outside: bool = False) -> str:
  """Describes the exact batch that a run read as step `step`; see `batch_at` and `inspect`.

  `outside` lets the run's config name modules outside vlm_jax: they run code.
  """
  path = os.path.join(workdir, "config.json")
  try:
    with open(path, encoding="utf-8") as file:
      config = ConfigDict(json.load(file) | {"outside": outside})
  except (OSError, ValueError) as error:
    raise DataError(f"{path} cannot be read ({error}); name the workdir of a run") from error
  batch, info = batch_at(config, step, start, start_step)
  lines = [f"step {step} of {workdir}", *summary(config, [batch], [info]), "",
           *show(config, batch, examples)]
  if picture:
    draw_rows(config, batch, rows).save(picture)
    lines += ["", f"{picture}: tokens and attention of {rows} rows"]
  return "\n".join(lines)
