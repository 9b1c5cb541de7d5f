"""Where the model looks: the attention over a picture behind every word of an answer.

The prompt and its answer are read once more as one sequence; the weights are the exact softmax of
the layers, a mean over their heads. The slot before a token is the one that predicts it.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict
from PIL import Image, ImageDraw

from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Encoded, Tokens
from vlm_jax.core.errors import DiskError, UsageError
from vlm_jax.core.fusion import find_fusion, find_tower
from vlm_jax.core.layout import mask_axes
from vlm_jax.core.typing import Params
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.generate.prompts import layouts, stack
from vlm_jax.nn.attention_maps import record

SIDE, GAP, LINE, COLUMNS = 160, 10, 16, 6  # of the drawing, in pixels and panels a row


@dataclasses.dataclass(frozen=True)
class WordMap:
  """Where one word looked.

  Attributes:
    word: its text.
    share: of the attention that is on all pictures together, in [0, 1].
    maps: f32[N,h,w], the weights on the slots of every picture, a mean over the word's tokens.
  """

  word: str
  share: float
  maps: np.ndarray


def word_maps(config: ConfigDict, params: Params, prompt: Encoded, answer: Sequence[int],
              tokenizer: Tokenizer, layers: Sequence[int] = ()) -> list[WordMap]:
  """The maps of every word of an answer.

  Args:
    config: of the run.
    params: the parameters.
    prompt: the encoded prompt, one open turn.
    answer: the tokens said.
    tokenizer: to find words.
    layers: which to average, from 0, negative ones from the last; (): all.

  Raises:
    UsageError: no answer, or as `check`.
  """
  check(config, len(prompt.images), layers)
  if not len(answer):
    raise UsageError("--attention-map: the model said nothing, so there is no word to look behind")
  weights, fill = attention(config, params, prompt, answer)
  chosen = weights[list(layers)] if layers else weights
  shares = chosen.mean(axis=(0, 1))  # [T,T]
  count, order, (height, width) = len(prompt.images), *grid(config)
  on_images = np.zeros((len(shares), count * len(order)))
  slots = np.flatnonzero(fill >= 0)
  on_images[:, fill[slots]] = shares[:, slots]
  # The slots of a picture name its feature rows: back to where those rows are in the picture.
  placed = np.zeros_like(on_images).reshape(len(shares), count, height * width)
  placed[:, :, order] = on_images.reshape(len(shares), count, len(order))
  first = len(shares) - len(answer) - 1  # predicts the first token of the answer
  out = []
  for word, tokens in words(answer, tokenizer):
    rows = placed[[first + token for token in tokens]].mean(0)
    out.append(WordMap(word, float(rows.sum()), rows.reshape(count, height, width)))
  return out


def attention(config: ConfigDict, params: Params, prompt: Encoded,
              answer: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
  """The weights f32[L,H,T,T] of prompt and answer as one sequence, and its fill i32[T]."""
  branch = getattr(prompt.parts[-1], "branch", 0)
  said = Tokens(np.asarray(answer, np.int32), np.ones(len(answer), bool), branch)
  whole = dataclasses.replace(prompt, parts=(*prompt.parts, said))
  config = config.copy_and_resolve_references() if isinstance(config, ConfigDict) else config
  with config.unlocked():
    config.llm.remat = "none"  # nothing to save memory for, and it hides the layers
  laid_out = layouts([whole], config)
  prompts = stack(laid_out, config, rows=1, bucket=1)
  module = find_fusion(config)
  model = module.Model(FrozenConfigDict(config))
  run = lambda params, flat: model.apply({"params": params}, from_flat(flat)).hidden
  weights = record(run, params, prompts.flat, under="llm")
  return np.stack(weights)[:, 0], laid_out[0].arrays[f"streams/{module.STREAM}/fill"]


def grid(config: ConfigDict) -> tuple[np.ndarray, tuple[int, int]]:
  """i32[K], where in reading order every slot of an image is, and the grid's height and width.

  Raises:
    UsageError: the connector does not keep the grid of the tower, or there is one for every tile.
  """
  if config.data.decode.grids:
    raise UsageError("--attention-map: config.data.decode.grids cuts pictures into tiles, whose "
                     "maps are not put together")
  rows = find_fusion(config).rows(config)
  height, width = find_tower(config).grid(config.tower)
  factor = math.isqrt(height * width // len(rows))
  small = (height // max(factor, 1), width // max(factor, 1))
  if not factor or small[0] * small[1] != len(rows) or rows.max() >= len(rows):
    raise UsageError(f"--attention-map: the {len(rows)} slots of config.connector.name "
                     f"'{config.connector.name}' are no grid over the picture")
  return rows, small


def words(tokens: Sequence[int], tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
  """The words of an answer and the indices of their tokens: a blank begins the next one."""
  found: list[tuple[str, list[int]]] = []
  before = ""
  for index in range(len(tokens)):
    text = tokenizer.decode(tokens[: index + 1])
    piece = text[len(before):]
    word = found[-1][0] if found else ""
    if not found or word.strip() and (piece[:1].isspace() or word[-1:].isspace()):
      found.append(("", []))
    word, members = found.pop()
    # Decoded again from its first token: a character may be spread over several.
    found.append((tokenizer.decode(tokens[(members or [index])[0] : index + 1]),
                  [*members, index]))
    before = text
  return [(word.strip(), members) for word, members in found]


def check(config: ConfigDict, pictures: int, layers: Sequence[int]) -> None:
  """Refuses what cannot be drawn, before anything is computed.

  Raises:
    UsageError: no picture, a layer that does not exist, slots that are no grid, a model whose
      pictures are not in the stream that speaks, or one without a language model that does.
  """
  if not pictures:
    raise UsageError("--attention-map needs a picture; give one with --image")
  module = find_fusion(config)
  if not module.STREAM or hasattr(module, "empty_cache"):
    raise UsageError("--attention-map draws layers of the language model that speaks, and "
                     f"config.fusion.name '{config.fusion.name}' has none; leave it out")
  apart = [name for name, (queries, keys) in mask_axes(module.fields(config)).items()
           if queries == module.STREAM != keys]
  if apart:
    raise UsageError(f"--attention-map: in config.fusion.name '{config.fusion.name}' pictures are "
                     f"not among the slots of text, which reads them through the mask '{apart[0]}';"
                     " leave it out")
  depth = config.llm.depth
  if any(not -depth <= layer < depth for layer in layers):
    raise UsageError(f"--attention-layers: the model has layers 0 to {depth - 1}, got "
                     f"{', '.join(map(str, layers))}")
  grid(config)


def draw(maps: Sequence[WordMap], pictures: Sequence[np.ndarray]) -> Image.Image:
  """The pictures, then a panel for every word and picture: heat where its weights are.

  Dark is the word's smallest weight and bright its largest; what part of its attention is on
  pictures at all stands below.
  """
  names = [(f"picture {number + 1}" if len(pictures) > 1 else "picture", "", picture(pixels))
           for number, pixels in enumerate(pictures)]
  for word in maps:
    low, high = word.maps.min(), word.maps.max()
    levels = (word.maps - low) / ((high - low) or 1.0)
    names += [(word.word or "(blank)", f"{100 * word.share:.1f}% on pictures",
               heat(level, pixels)) for level, pixels in zip(levels, pictures, strict=True)]
  columns = min(COLUMNS, len(names))
  rows, tall = -(-len(names) // columns), SIDE + 2 * LINE
  canvas = Image.new("RGB", (columns * (SIDE + GAP) + GAP, rows * (tall + GAP) + GAP), "white")
  pen = ImageDraw.Draw(canvas)
  for index, (above, below, panel) in enumerate(names):
    left, top = GAP + index % columns * (SIDE + GAP), GAP + index // columns * (tall + GAP)
    canvas.paste(panel, (left, top + LINE))
    pen.text((left, top), above[:26], fill=(20, 20, 20))
    pen.text((left, top + LINE + SIDE + 2), below, fill=(110, 110, 110))
  return canvas


def picture(pixels: np.ndarray) -> Image.Image:
  """A picture u8[H,W,3] at the size of a panel."""
  return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def heat(levels: np.ndarray, pixels: np.ndarray) -> Image.Image:
  """A picture u8[H,W,3] under levels f[h,w] in [0, 1]: from dark blue over red to yellow."""
  small = Image.fromarray(np.float32(levels)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
  level = np.clip(np.asarray(small), 0, 1)[..., None]
  colour = np.concatenate([np.clip(2 * level, 0, 1), np.clip(2 * level - 0.9, 0, 1),
                           0.35 * (1 - level)], -1)
  return Image.fromarray(np.uint8(0.4 * np.asarray(picture(pixels)) + 0.6 * 255 * colour))


def check_place(path: Path) -> None:
  """Raises a UsageError or DiskError when no PNG can be at `path`."""
  if path.suffix.lower() != ".png":
    raise UsageError(f"--attention-map is {path}; give it a name that ends in .png")
  if not (folder := path.absolute().parent).is_dir():
    raise DiskError(f"--attention-map: there is no directory {folder}; make it or choose another")


def save(picture: Image.Image, path: Path) -> None:
  """Writes a drawing; a DiskError when that fails."""
  try:
    picture.save(path)
  except OSError as error:
    raise DiskError(f"--attention-map {path} cannot be written ({error.strerror}); free space or "
                    "choose another file") from error
