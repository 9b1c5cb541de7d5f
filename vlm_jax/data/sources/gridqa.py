"""GridQA: 4 x 4 cells of eight colours, and questions that only the picture answers.

Drawn here, by seed and number alone, so there is nothing to install and nothing to download. A
picture holds 48 bits and a question asks for three of them, at random: what a model gets right says
how much of a picture came through its connector. No part of an answer can be guessed beyond one in
eight, and a grid's split is a hash of its colours, so that no grid, nor one that differs from it in
the cell that `pair` changes, is in two splits.

Forms:
  fan_out      one document a grid: its sixteen cells are asked for, each in a branch of its own
  single       one document a question
  caption      the grid, then all its colours row by row
  pair         the captions of a grid and of the same with one cell changed, one document each: in a
               batch they are hard negatives of each other
  match        one document: both captions are branches, the picture's own has loss
  interleaved  three grids one after the other, behind each a question about it; nothing but its
               place says which grid a question is about, and the last answer is not that cell's
               colour in the grids before
  binding      twelve grids of one colour each and a name behind each; which name a colour has is
               drawn for every document, so that it can only be read off an earlier picture
  episode      the same with the eight colours once each, and then one of them again: few-shot
               questions, of which eight shots hold every answer and four hold half of them
"""

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from vlm_jax.core.document import Image, Text
from vlm_jax.data.sources import Parts, Record

FORMS = ("fan_out", "single", "caption", "pair", "match", "interleaved", "binding", "episode")
LICENCE = "Apache-2.0 (drawn by vlm_jax)"
PACKAGE = "vlm_jax"
RECORDS = {"train": 16_000, "validation": 1_000, "test": 1_000}
SIDE, CELL = 4, 4  # cells of a side, pixels of a cell's side
CELLS = SIDE * SIDE
PALETTE = {
  "black": (0, 0, 0), "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255),
  "yellow": (255, 255, 0), "pink": (255, 0, 255), "cyan": (0, 255, 255), "white": (255, 255, 255),
}
COLOURS = tuple(PALETTE)
PLACES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth",
          "tenth", "eleventh", "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth")
NAMES = ("dax", "wug", "blick", "fep", "toma", "zup", "modi", "kiki")  # words of no meaning
SHOWN = 3  # grids of an interleaved document
BOUND = 12  # pictures of a binding document

Grid = tuple[int, ...]


def prepare() -> dict[str, Iterable[Record]]:
  """Records {key, grid: 16 numbers of colours, near: the same with one cell changed} by split."""
  return {split: _records(split, count) for split, count in RECORDS.items()}


def _records(split: str, count: int) -> Iterator[Record]:
  for number in range(count):
    rng = random.Random(f"gridqa/{split}/{number}")
    grid = _draw(rng, split)
    yield {"key": f"{split}/{number}", "grid": grid, "near": _change(rng, grid)}


def split_of(grid: Sequence[int]) -> str:
  """The split that a grid belongs to: a tenth each is validation and test."""
  tenth = hashlib.sha256(bytes(grid)).digest()[0] % 10
  return {0: "validation", 1: "test"}.get(tenth, "train")


def _draw(rng: random.Random, split: str) -> Grid:
  """A grid of a split."""
  while split_of(grid := tuple(rng.choices(range(len(COLOURS)), k=CELLS))) != split:
    pass
  return grid


def _change(rng: random.Random, grid: Grid) -> Grid:
  """A grid of the same split that differs in one cell."""
  while True:
    cell, step = rng.randrange(CELLS), rng.randrange(1, len(COLOURS))
    near = (*grid[:cell], (grid[cell] + step) % len(COLOURS), *grid[cell + 1 :])
    if split_of(near) == split_of(grid):
      return near


def texts(record: Record) -> Iterator[str]:
  """All words equally often, colours inside a text too, so that each becomes one token."""
  del record  # which colours are frequent would otherwise decide how the others are cut
  yield from (*PLACES, *COLOURS, *NAMES, f"{', '.join(COLOURS)} {COLOURS[0]}")


def pixels(grid: Sequence[int]) -> np.ndarray:
  """A grid drawn, u8[16,16,3]."""
  colours = np.array(list(PALETTE.values()), np.uint8)[np.array(grid)]
  return colours.reshape(SIDE, SIDE, 3).repeat(CELL, 0).repeat(CELL, 1)


def caption(grid: Sequence[int]) -> str:
  """The colours of a grid in reading order, rows apart by a comma."""
  words = [COLOURS[colour] for colour in grid]
  return ", ".join(" ".join(words[start : start + SIDE]) for start in range(0, CELLS, SIDE))


def parts(record: Record, form: str) -> list[Parts]:
  """The documents of one grid; see the module for the forms."""
  grid, near = tuple(record["grid"]), tuple(record["near"])
  rng = random.Random(f"gridqa/{record['key']}/{form}")
  image = Image(pixels(grid))
  if form == "single":
    return [(image, *_ask(grid, cell)) for cell in range(CELLS)]
  if form == "caption":
    return [(image, Text(caption(grid), loss=True))]
  if form == "pair":
    return [(Image(pixels(one)), Text(caption(one), loss=True)) for one in (grid, near)]
  if form == "match":
    return [(image, *(Text(caption(one), loss=one == grid, branch=branch)
                      for branch, one in enumerate(rng.sample((grid, near), 2), 1)))]
  if form == "interleaved":
    return [_interleaved(rng, grid)]
  if form == "binding":
    return [_named(rng, _repeats(rng))]
  if form == "episode":
    shots = rng.sample(range(len(COLOURS)), len(COLOURS))
    return [_named(rng, [*shots, rng.choice(shots)])]
  return [(image, *(part for cell in range(CELLS) for part in _ask(grid, cell, cell + 1)))]


def _ask(grid: Grid, cell: int, branch: int = 0) -> Parts:
  """A question about a cell and its answer."""
  return (Text(PLACES[cell], "user", branch=branch),
          Text(COLOURS[grid[cell]], "assistant", loss=True, branch=branch))


def _interleaved(rng: random.Random, grid: Grid) -> Parts:
  """Grids with a question behind each; `grid` is the last one."""
  last = rng.randrange(CELLS)
  before: list[Grid] = []
  while len(before) < SHOWN - 1:
    other = _draw(rng, split_of(grid))
    if other[last] != grid[last]:
      before.append(other)
  asked = [*((one, rng.randrange(CELLS)) for one in before), (grid, last)]
  return tuple(part for one, cell in asked for part in (Image(pixels(one)), *_ask(one, cell)))


def _repeats(rng: random.Random) -> list[int]:
  """Colours of a binding document, of two kinds; no distance says where a colour was before.

  Half show each of theirs, then any of them again: what is asked for, but a guess for long. The
  others often show that of a picture a little before, which is matched first.
  """
  few = rng.sample(range(len(COLOURS)), rng.randint(2, len(COLOURS)))
  if rng.random() < 0.5:
    return few + rng.choices(few, k=BOUND - len(few))
  colours = rng.choices(few, k=BOUND)
  for place in range(1, BOUND):
    if rng.random() < 0.6:
      back = range(1, place + 1)
      colours[place] = colours[place - rng.choices(back, [1 / one for one in back])[0]]
  return colours


def _named(rng: random.Random, colours: Sequence[int]) -> Parts:
  """Grids of one colour each, with the name that the colour has in this document."""
  names = rng.sample(NAMES, len(NAMES))
  return tuple(part for colour in colours for part in (
    Image(pixels([colour] * CELLS)), Text(names[colour], "assistant", loss=True)))
