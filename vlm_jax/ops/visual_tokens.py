"""How many tokens an image becomes in every published system, by arithmetic on its size alone.

`SYSTEMS` has a `System` for each row of the README's table that puts images before a language model
and whose number is published; `UNCOUNTED` says why the others have none. Sizes are pixels of the
image as it is on the disk. Floats appear where the released code rounds with them, nowhere else.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Memory:
  """Rows that text reads by cross-attention, outside the sequence.

  Attributes:
    rows: of one image.
    width: of a row.
    every: one layer of the language model in so many has the cross-attention.
    mlp: hidden width of the MLP behind it, in widths of the language model; 0: none.
  """

  rows: int
  width: int
  every: int
  mlp: int


@dataclasses.dataclass(frozen=True)
class Footprint:
  """What one image, or several alike, are to the language model.

  Attributes:
    slots: places of one image in its sequence.
    mask: "causal", "prefix" (image and prompt see each other) or "full".
    later: slots from layer `at` on, None: as before.
    at: that layer; a negative one counts from the last.
    memory: what cross-attention reads, if any: of several images the last one before the text.
    before: (layers, slots) of layers of the same shape that read one image and the prompt first.
    count: how many images.
  """

  slots: int
  mask: str = "causal"
  later: int | None = None
  at: int = 0
  memory: Memory | None = None
  before: tuple[int, int] = (0, 0)
  count: int = 1


@dataclasses.dataclass(frozen=True)
class System:
  """A published system: its `source`, its `rule` in words, and `image(height, width)` in pixels."""

  source: str
  rule: str
  image: Callable[[int, int], Footprint]


def fixed(source: str, rule: str, slots: int, **fields) -> System:
  """A system whose images are resized to one size, so that their number never changes."""
  return System(source, rule, lambda height, width: Footprint(slots, **fields))


def sized(source: str, rule: str, slots: Callable[[int, int], int]) -> System:
  """A system whose slots depend on (height, width)."""
  return System(source, rule, lambda height, width: Footprint(slots(height, width)))


def patches(size: int, patch: int) -> int:
  """Patches of a square image.

  Raises:
    ValueError: the patches do not fill it, e.g. 1024 pixels in patches of 14.
  """
  if size % patch:
    raise ValueError(f"{size} pixels are no whole number of patches of {patch}")
  return (size // patch) ** 2


# As (height, width), in the order in which LLaVA's code tries them: ties go to the first.
PINPOINTS = ((672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336))


def best_canvas(height: int, width: int, pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
  """The canvas (height, width) on which most pixels of an image survive, then fewest are empty.

  `select_best_resolution` of LLaVA's mm_utils.py. The same list of sizes is read as (width, height)
  there and as (height, width) by transformers: they choose differently between a canvas and its
  transpose for images that fit into both.
  """
  kept = {}
  for canvas in pinpoints:
    scale = min(canvas[1] / width, canvas[0] / height)  # rounded as published: a tie decides
    shown = min(int(width * scale) * int(height * scale), height * width)
    kept[canvas] = (shown, shown - canvas[0] * canvas[1])
  return max(pinpoints, key=kept.__getitem__)


def llava_next(height: int, width: int, pinpoints: Sequence[tuple[int, int]] = PINPOINTS, *,
               tile: int = 336, side: int = 24) -> int:
  """LLaVA-NeXT's AnyRes: the small image, then the canvas without its padding, a newline a row.

  `spatial_unpad` of LLaVA's llava_arch.py: rows (or columns) of features that hold padding alone
  are cut on both sides alike, so that one may remain; every row then ends in `image_newline`.
  """
  canvas = best_canvas(height, width, pinpoints)
  rows, columns = side * canvas[0] // tile, side * canvas[1] // tile
  if width * rows > height * columns:
    rows -= (rows - height * columns // width) // 2 * 2
  else:
    columns -= (columns - width * rows // height) // 2 * 2
  return side**2 + rows * (columns + 1)


def fuyu(height: int, width: int, *, patch: int = 30, most: tuple[int, int] = (1080, 1920)) -> int:
  """Fuyu: shrunk to fit 1080 x 1920, padded to whole patches of 30, a newline after every row.

  Images are never enlarged (processor of Fuyu in transformers).
  """
  if height > most[0] or width > most[1]:
    scale = min(most[0] / height, most[1] / width)
    height, width = max(int(height * scale), 1), max(int(width * scale), 1)
  rows, columns = -(-height // patch), -(-width // patch)
  return rows * (columns + 1)


@functools.cache
def grids(least: int, most: int) -> list[tuple[int, int]]:
  """All (rows, columns) of `least` to `most` tiles; fewest first, then fewest columns."""
  every = [(rows, columns) for columns in range(1, most + 1) for rows in range(1, most + 1)
           if least <= rows * columns <= most]
  return sorted(every, key=math.prod)


def closest_grid(height: int, width: int, *, tile: int, least: int, most: int) -> tuple[int, int]:
  """The (rows, columns) of tiles whose aspect ratio is nearest to the image's.

  Among equally near ones more tiles win while they are not more than twice the image's area
  (`dynamic_preprocess` of InternVL and DeepSeek-OCR).
  """
  best, distance = (1, 1), math.inf
  for rows, columns in grids(least, most):
    off = abs(width / height - columns / rows)
    large = height * width > 0.5 * tile**2 * rows * columns
    if off < distance or off == distance and large:
      best, distance = (rows, columns), off
  return best


def deepseek_ocr(height: int, width: int, *, view: int, tile: int = 0, most: int = 6) -> int:
  """DeepSeek-OCR (2510.18234, released code): rows with newlines, and one separator.

  A view of `view` pixels is a grid of ceil(view / 64) a side. With `tile` (Gundam) an image larger
  than a tile is also cut into 2 to `most` tiles, which are read as one stitched grid.
  """
  side = -(-view // 64)
  slots = side * (side + 1) + 1
  if tile and max(height, width) > tile:
    rows, columns = closest_grid(height, width, tile=tile, least=2, most=most)
    cell = -(-tile // 64)
    slots += rows * cell * (columns * cell + 1)
  return slots


def covering_tiles(height: int, width: int, *, tile: int, most: int) -> int:
  """The number of tiles of Ovis: as few as keep nine tenths of the image's area, else the most.

  A piece of the image whose longer side exceeds the tile shrinks to it, and loses area.
  """
  def kept(piece: tuple[int, int]) -> float:
    short, long = sorted(piece)
    return short / long * tile * tile if long > tile else short * long

  def share(rows: int, columns: int) -> float:
    spans = lambda length, parts: [length // parts] * (parts - 1) + [
      length - length // parts * (parts - 1)]
    return sum(kept((high, wide)) for high in spans(height, rows)
               for wide in spans(width, columns)) / (height * width)

  shares = {grid: share(*grid) for grid in grids(1, most)}
  enough = [math.prod(grid) for grid, kept_share in shares.items() if kept_share > 0.9]
  most_kept = min(shares, key=lambda grid: (-shares[grid], math.prod(grid)))
  return min(enough) if enough else math.prod(most_kept)


def ovis2(height: int, width: int) -> int:
  """Ovis2 (2405.20797, released code): 256 slots a tile of 448 pixels, at most 9 tiles.

  More than one tile come with the small image. Start, grid and end of the image are indicators, and
  so is what stands between two tiles, in a row or in the next.
  """
  tiles = covering_tiles(height, width, tile=448, most=9)
  return 256 * (tiles + (tiles > 1)) + 3 + tiles - 1


def internvl(height: int, width: int) -> int:
  """InternVL: up to 12 tiles of 448 pixels, 32 x 32 patches in windows of 2 x 2, start and end."""
  tiles = math.prod(closest_grid(height, width, tile=448, least=1, most=12))
  return 256 * (tiles + (tiles > 1)) + 2


def idefics3(height: int, width: int, *, longest: int = 1456, tile: int = 364) -> int:
  """Idefics3: the longer side becomes 1456 pixels; tiles of 364 pixels are 169 slots each.

  A tile stands behind its name and a separator, a row of tiles ends in a newline, and the small
  image follows between two separators and behind its name (its processor in transformers).
  """
  short, ratio = min(height, width), width / height
  short = int(longest / ratio) if width >= height else int(longest * ratio)
  tiles = -(-(short + short % 2) // tile) or 1
  across = longest // tile
  rows, columns = (tiles, across) if width >= height else (across, tiles)
  return 169 + 3 + rows * (columns * (169 + 2) + 1)


CLIP_336 = patches(336, 14)
FLAMINGO = Memory(rows=64, width=1536, every=4, mlp=4)  # the 9B model; 1 at 3B, 7 at 80B

# By the README's names, and what tells forms of one system apart.
SYSTEMS: dict[str, System] = {
  "LLaVA": fixed("2304.08485", "CLIP-L/14 at 224", patches(224, 14)),
  "LLaVA-1.5": fixed("2310.03744", "CLIP-L/14 at 336", CLIP_336),
  "LLaVA-NeXT": sized("blog, 2024", "AnyRes: 576 and the canvas unpadded, a newline a row",
                      llava_next),
  "SimVLM": fixed("2108.10904", "224 pixels at stride 16, in the prefix", patches(224, 16),
                  mask="prefix"),
  **{f"PaliGemma {size}": fixed("2407.07726", f"SigLIP/14 at {size}, image and prompt the prefix",
                                patches(size, 14), mask="prefix") for size in (224, 448, 896)},
  "CM3": fixed("2201.07520", "VQGAN codes of 256 pixels at stride 16", patches(256, 16)),
  "BEiT-3": fixed("2208.10442", "patches of 16 at 224 and a class token", patches(224, 16) + 1,
                  mask="full"),
  "Fuyu": sized("blog, 2023", "patches of 30, a newline a row, no encoder", fuyu),
  "Chameleon": fixed("2405.09818", "VQ codes of 512 pixels at stride 16, begin and end",
                     patches(512, 16) + 2),
  "CoCa": fixed("2205.01917", "256 pooled rows, read by half of the layers", 0,
                memory=Memory(rows=patches(288, 18), width=1408, every=2, mlp=0)),
  "Flamingo": fixed("2204.14198", "64 latents, read by every fourth layer (9B)", 1,
                    memory=FLAMINGO),
  "BLIP-2": fixed("2301.12597", "32 queries", 32),
  "InstructBLIP": fixed("2305.06500", "32 queries that have read the instruction", 32),
  "Perceiver Resampler": fixed("2204.14198", "64 latents, put into the sequence", 64),
  "WiCo": fixed("2504.04024", "windows of 2 x 2 of LLaVA-1.5's patches", CLIP_336 // 4),
  "WiCo+": fixed("2504.04024", "144, 576 again in the last two layers", CLIP_336 // 4,
                 later=CLIP_336, at=-2),
  "DeepSeek-VL": fixed("2403.05525", "SAM at 1024 and SigLIP at 384 on one grid of 24 x 24",
                       patches(384, 16)),
  **{f"DeepSeek-OCR {mode}": sized("2510.18234", f"{view} pixels, a newline a row, a separator",
                                   functools.partial(deepseek_ocr, view=view))
     for mode, view in (("tiny", 512), ("small", 640), ("base", 1024), ("large", 1280))},
  "DeepSeek-OCR gundam": sized("2510.18234", "up to 6 tiles of 640 and the whole at 1024",
                               functools.partial(deepseek_ocr, view=1024, tile=640)),
  "Ovis 2": sized("2405.20797", "up to 9 tiles of 448 and the small image, 256 each", ovis2),
  "C-Abstractor 144": fixed("2312.06742", "convolutions around a pool to 12 x 12", 144),
  "C-Abstractor 256": fixed("2312.06742", "convolutions around a pool to 16 x 16", 256),
  "D-Abstractor": fixed("2312.06742", "144 queries that sample the features", 144),
  "Victor": fixed("2410.14072", "576 and 8 registers, from layer 3 on the registers alone",
                  CLIP_336 + 8, later=8, at=3),
  "LLaVA-Mini": fixed("2501.03895", "1 query, after 4 layers of its own over everything", 1,
                      before=(4, CLIP_336 + 1)),
  **{f"TokenPacker {scale}x": fixed("2407.02392", f"24 x 24 shrunk {scale} times a side",
                                    (24 // scale) ** 2) for scale in (2, 3, 4)},
  "pixel shuffle (Idefics3)": sized("2504.05299", "tiles of 364 and the small image, 169 each",
                                    idefics3),
  "pixel shuffle (InternVL)": sized("2504.05299", "up to 12 tiles of 448 and the small image, 256 "
                                    "each", internvl),
  "adaptive pooling": fixed("", "windows of 2 x 2 of LLaVA-1.5's patches, averaged", CLIP_336 // 4),
  "ToMe": fixed("2210.09461", "18 merged in each of the 23 layers that LLaVA-1.5 reads",
                CLIP_336 - 18 * 23),
  "FastV": fixed("2403.06764", "half of LLaVA-1.5's dropped after 2 layers", CLIP_336,
                 later=CLIP_336 // 2, at=2),
  "MM-Interleaved": fixed("2401.10208", "64 queries behind a start; sampled finer maps not counted",
                          64 + 1),
}

_IMAGES = "several images of one of the systems above: see --images"
_FRAMES = "frames are images of one of the systems above: see --images"
UNCOUNTED: dict[str, str] = {
  "VisualBERT": "regions of a detector, not pixels",
  "LXMERT": "objects of a detector, not pixels",
  "Frozen": "n vectors an image, n chosen by the experiment",
  "CLIP": "image and text never share a model",
  "SigLIP": "image and text never share a model",
  "TokenFusion": "two kinds of pixels, no language model",
  "YOPO": "LLaVA-1.5's 576; what it drops is inside the layers",
  "multi-image: separate prefixes": _IMAGES,
  "multi-image: shared context": _IMAGES,
  "multi-image: image-specific": _IMAGES,
  "multi-image: local + global": _IMAGES,
  "multi-image: k-nearest": _IMAGES,
  "video: key frames": _FRAMES,
  "video: temporal averaging": _FRAMES,
  "video: hierarchical": _FRAMES,
  "video: recurrent memory": _FRAMES,
  "Mamba": "a language model, not a way to join images",
  "RWKV": "a language model, not a way to join images",
}
