"""One packed row as the model gets it: who sees whom, in the tokens' colours, and its text.

Of a strategy with several streams, each with the mask of its own name, one after the other.
"""

from typing import Any

import numpy as np
from PIL import Image

from vlm_jax.core.batch import from_flat
from vlm_jax.core.layout import IGNORE
from vlm_jax.core.mask import IntervalMask
from vlm_jax.data import inspect, pipeline
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.report.html import Html, picture, tag
from vlm_jax.report.run import Run

KINDS = tuple(inspect.COLOURS)
CLOSE = 56  # slots of the enlarged corner
DOCUMENTS = 12  # written out
STRIP = 12  # pixels of the kinds along two sides


def section(run: Run) -> Html:
  """The first row of the run's first step.

  Raises:
    UserError: the data cannot be read.
  """
  batch, _ = inspect.batch_at(run.config, 1)
  tokenizer = pipeline.load_tokenizer(run.config)
  read = [path.split("/") for path in inspect.read_streams(run.config)]
  names = [name for kind, name in read if kind == "streams"]
  parts = [tag("p", tag("b", f"Stream {name}")) + one_stream(run, batch, name, tokenizer)
           if len(names) > 1 else one_stream(run, batch, name, tokenizer) for name in names]
  return Html("".join(parts))


def one_stream(run: Run, batch: dict[str, np.ndarray], stream: str, tokenizer: Tokenizer) -> Html:
  """Row 0 of one stream: its mask, large and whole, and its documents."""
  kinds, mask = inspect.kinds_of(batch, stream, 0), one_row(batch, stream)
  slots = len(kinds)
  whole = tag("figure", picture(draw(mask, kinds, 0, slots), "attention mask of the whole row",
                                class_="mask"),
              tag("figcaption", f"All {slots:,} slots of the row, each against each: one pixel a "
                  "pair. Blocks are documents; none sees another."))
  first = interesting(batch, stream, mask)
  last = min(first + CLOSE, slots)
  close = tag("figure", picture(draw(mask, kinds, first, last, 8), "some of it, enlarged",
                                class_="mask"),
              tag("figcaption", f"Slots {first} to {last - 1}. A square at row i and column j: "
                  "slot i sees slot j, in the colour of j."))
  legend = [tag("span", tag("i", class_=f"k-{kind}"), kind) for kind in KINDS]
  return Html(tag("div", legend, class_="legend") + tag("div", close, whole, class_="pair")
              + documents(run, batch, stream, kinds, mask, tokenizer))


def one_row(batch: dict[str, np.ndarray], stream: str) -> IntervalMask:
  """The mask of row 0."""
  mask = from_flat(batch).masks[stream]
  fields = (mask.lo, mask.hi, mask.q_class, mask.k_class, mask.k_index)
  return IntervalMask(*(None if field is None else np.asarray(field[0]) for field in fields))


def interesting(batch: dict[str, np.ndarray], stream: str, mask: IntervalMask) -> int:
  """Where the first document with branches begins, else the first with an image, else 0."""
  ids, fill = (batch[f"streams/{stream}/{field}"][0] for field in ("segment_ids", "fill"))
  for wanted in (None if mask.q_class is None else mask.q_class > 0, fill != IGNORE):
    if wanted is not None and wanted.any():
      return int(np.flatnonzero(ids == ids[np.argmax(wanted)])[0])
  return 0


def draw(mask: IntervalMask, kinds: list[str], first: int, last: int,
         size: int = 1) -> Image.Image:
  """A square of a mask around its diagonal, on transparent ground.

  Args:
    mask: of one row.
    kinds: of its slots.
    first, last: which slots, half open.
    size: pixels of a side of a square; above 1 squares are set apart.
  """
  index = 1 + np.array([KINDS.index(kind) for kind in kinds[first:last]], np.uint8)
  seen = np.asarray(mask.dense(len(kinds)))[first:last, first:last]
  cells = np.where(seen, index[None], 0).astype(np.uint8)
  cells = np.kron(cells, np.ones((size, size), np.uint8))
  if size > 1:
    cells[size - 1 :: size] = cells[:, size - 1 :: size] = 0
  canvas = np.zeros((len(cells) + STRIP,) * 2, np.uint8)
  canvas[STRIP:, STRIP:] = cells
  band = np.repeat(index, size)
  canvas[: STRIP - 3, STRIP:], canvas[STRIP:, : STRIP - 3] = band[None], band[:, None]
  image = Image.fromarray(canvas, "P")
  image.putpalette([0, 0, 0, *(part for kind in KINDS for part in inspect.COLOURS[kind])])
  image.info["transparency"] = 0
  return image


def documents(run: Run, batch: dict[str, np.ndarray], stream: str, kinds: list[str],
              mask: IntervalMask, tokenizer: Tokenizer) -> Html:
  """The documents of row 0, token by token."""
  path = f"streams/{stream}"
  ids, sources = batch[f"{path}/segment_ids"][0], batch[f"{path}/source_ids"][0]
  names = sorted(run.config.data.sources)
  numbers = [int(number) for number in np.unique(ids) if number]
  parts = []
  for number in numbers[:DOCUMENTS]:
    slots = np.flatnonzero(ids == number)
    head = tag("b", f"{number} {names[sources[slots[0]]]}")
    words = tokens(batch[f"{path}/tokens"][0], slots, kinds, mask, tokenizer)
    parts.append(tag("p", head, " ", words, class_="tokens"))
  more = len(numbers) - DOCUMENTS
  if more > 0:
    parts.append(tag("p", f"... and {more} more documents."))
  return Html("".join(parts))


def tokens(ids: np.ndarray, slots: np.ndarray, kinds: list[str], mask: IntervalMask,
           tokenizer: Tokenizer) -> list[Any]:
  """The tokens of a document in their colours; the slots of an image are one mark."""
  parts: list[Any] = []
  images = 0
  for slot in [*slots, None]:
    if slot is not None and kinds[slot] == "image":
      images += 1
      continue
    if images:
      parts.append(tag("span", f"image x {images}", class_="k-image"))
      images = 0
    if slot is None:
      break
    # Branches are classes: a question and its answer see the trunk and each other.
    branch = "" if mask.q_class is None else f", class {mask.q_class[slot]}"
    parts.append(tag("span", visible(tokenizer.decode([int(ids[slot])], specials=True)),
                     class_=f"k-{kinds[slot]}",
                     title=f"slot {slot}, sees {mask.lo[slot]} to {mask.hi[slot] - 1}{branch}"))
  return parts


def visible(text: str) -> str:
  """A token's text with its line breaks marked and control characters as dots."""
  return "".join("\u21b5\n" if c == "\n" else c if c.isprintable() else "\u00b7" for c in text)
