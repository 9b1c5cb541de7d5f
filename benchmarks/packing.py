"""What packing saves: one pass over the same documents, packed or padded, through the train step.

The documents are the quickstart's mix (config and prepared data; missing data is prepared first).
Three ways to make steps of them, each with as many slots a step as the quickstart's:

  packed    whole sampling cycles packed into rows, as training does
  fixed     one document a row, every row as long as the longest document
  bucketed  one document a row; documents are sorted by whether they have an image and by length,
            and rows are as long as the bucket (multiples of 32 slots), without the tower where no
            document of the step has an image

Every side runs the same number of documents forward, backward and through the optimizer.

The last line is JSON:
  fixed_ratio      seconds of a fixed pass / seconds of a packed pass, null when contended
  bucketed_ratio   the same for bucketed
  tokens_per_s     useful (not padding) slots per second of every side
  images_per_s     images per second of every side
  fill             share of slots that are not padding, every side
  steps, shapes    steps of a pass, and different shapes among them (each is compiled once)
  documents        how many there are; tokens, images: their useful slots and images
  compile          seconds of every side's first pass, compilation included
  seconds, best, matmul, others, contended, machine   see protocol.py
"""

from collections.abc import Iterator

import numpy as np
import ours
import protocol
from ml_collections import ConfigDict

from vlm_jax.configs import quickstart
from vlm_jax.core import fusion
from vlm_jax.core.layout import Layout
from vlm_jax.data import draw, prepare
from vlm_jax.data.bad import Bad
from vlm_jax.data.pack import Packer

CYCLES = 200  # steps of a bucket that are not full then cost bucketed less than a tenth
BUCKET = 32
Step = tuple[ConfigDict, dict[str, np.ndarray]]


def cycles(config: ConfigDict) -> list[list[Layout]]:
  """The first sampling cycles of the mix, records in a shuffled order."""
  streams = {name: stream(config, name) for name in sorted(config.data.sources)}
  return [
    [next(streams[name]) for name in streams for _ in range(config.data.sources[name].ratio)]
    for _ in range(CYCLES)
  ]


def stream(config: ConfigDict, name: str) -> Iterator[Layout]:
  """Layouts of one source, one epoch."""
  drawer = draw.Draw(config, name)
  for index in np.random.default_rng(config.seed).permutation(len(drawer.records)):
    layouts = drawer((0, int(index)))
    if not isinstance(layouts, Bad):
      yield from layouts


def packed(config: ConfigDict, mix: list[list[Layout]]) -> list[Step]:
  """The steps training makes; a last one that is not full stays so."""
  module = fusion.find_fusion(config)
  packer = Packer(module.fields(config), module.axes(config), config.data.rows)
  steps = []
  for cycle in mix:
    if not packer.add(cycle):
      steps.append(packer.build().arrays)
      packer.add(cycle)
  steps.append(packer.build().arrays)
  return [(config, arrays) for arrays in steps]


def fixed(config: ConfigDict, layouts: list[Layout]) -> list[Step]:
  """One document a row, every row as long as the longest document."""
  longest = max(layout.sizes["text"] for layout in layouts)
  most = max(layout.sizes["images"] for layout in layouts)
  return list(_rows(config, layouts, longest, most))


def bucketed(config: ConfigDict, layouts: list[Layout]) -> list[Step]:
  """One document a row, rows of one step in one bucket of length and images."""
  buckets: dict[tuple[int, int], list[Layout]] = {}
  for layout in layouts:
    key = (layout.sizes["images"], -(-layout.sizes["text"] // BUCKET) * BUCKET)
    buckets.setdefault(key, []).append(layout)
  return [step for (images, tokens), members in sorted(buckets.items())
          for step in _rows(config, members, tokens, images)]


def _rows(config: ConfigDict, layouts: list[Layout], tokens: int, images: int) -> Iterator[Step]:
  rows = max(1, config.data.rows * config.data.tokens // tokens)
  shape = ours.resized(config, rows, tokens, max(images, 1))
  for start in range(0, len(layouts), rows):
    flat = ours.pack(layouts[start : start + rows], shape, one_a_row=True)
    # Steps without images do not run the tower: padding gets its best too.
    yield shape, {path: array for path, array in flat.items()
                  if images or not path.startswith("media/")}


def main() -> None:
  """Runs the comparison."""
  config = quickstart.get_config()
  prepare.prepare(config.data.root, vocab_size=config.llm.vocab_size)
  mix = cycles(config)
  layouts = [layout for cycle in mix for layout in cycle]
  sides = {"packed": packed(config, mix), "fixed": fixed(config, layouts),
           "bucketed": bucketed(config, layouts)}
  tokens = sum(layout.sizes["text"] for layout in layouts)
  images = sum(layout.sizes["images"] for layout in layouts)
  for name, steps in sides.items():
    used = sum(int((flat["streams/text/segment_ids"] > 0).sum()) for _, flat in steps)
    if used != tokens:
      raise AssertionError(f"'{name}' trains on {used} tokens, the documents have {tokens}")

  trainer = ours.Trainer(config)
  placed = {name: [trainer.place(flat) for _, flat in steps] for name, steps in sides.items()}
  passes = {name: lambda batches=batches: [trainer.step(batch) for batch in batches]
            for name, batches in placed.items()}
  compile_seconds = {name: protocol.seconds(run) for name, run in passes.items()}
  timing = protocol.measure(passes)
  best = timing["best"]
  shape = lambda flat: tuple(sorted((path, array.shape) for path, array in flat.items()))
  result = {
    "fixed_ratio": protocol.ratio(timing, "packed", ["fixed"])[0],
    "bucketed_ratio": protocol.ratio(timing, "packed", ["bucketed"])[0],
    "tokens_per_s": {name: tokens / best[name] for name in sides},
    "images_per_s": {name: images / best[name] for name in sides},
    "fill": {name: tokens / sum(flat["streams/text/tokens"].size for _, flat in steps)
             for name, steps in sides.items()},
    "steps": {name: len(steps) for name, steps in sides.items()},
    "shapes": {name: len({shape(flat) for _, flat in steps}) for name, steps in sides.items()},
    "documents": len(layouts), "tokens": tokens, "images": images, "compile": compile_seconds,
    **timing,
  }
  protocol.report(
    ["side", "pass s", "useful tokens/s", "images/s", "fill", "steps", "shapes"],
    [[name, best[name], result["tokens_per_s"][name], result["images_per_s"][name],
      result["fill"][name], result["steps"][name], result["shapes"][name]] for name in sides],
    result,
  )


if __name__ == "__main__":
  main()
