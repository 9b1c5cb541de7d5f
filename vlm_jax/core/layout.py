"""From an encoded document to arrays on axes, and how packing may move them.

A fusion declares every array it fills once, as a `Field`. Its `layout` returns the arrays of one
document; the packer concatenates documents along each axis and adds to a shifted field the offset
of the axis it points into. The packer knows nothing else.
"""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from vlm_jax.core.document import Encoded, Pixels, Tokens

IGNORE = -1  # the fill of a slot that holds a token, not a row of the media table
LEARNED = -2  # and of one that holds the strategy's learned row, which packing does not move
TOLD = "media/images/words"  # of strategies whose connector reads, see `Media`
TIME = "media/images/time"  # of strategies that see videos, see `Media`


@dataclasses.dataclass(frozen=True)
class Field:
  """One array of a layout.

  Attributes:
    axis: the axis its first dimension lives on ("text", "images", ...).
    shift: the axis whose offset packing adds to its values, or None.
    pad: the value of empty slots.
    base: only values >= base are shifted; smaller ones are sentinels (fill -1, class 0 and -1).
    dtype: numpy dtype name.
    shape: the trailing shape behind the axis.
  """

  axis: str
  shift: str | None = None
  pad: float = 0
  base: int = 0
  dtype: str = "int32"
  shape: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Layout:
  """The arrays of one document.

  Attributes:
    arrays: path ("streams/text/tokens") to array [size of its axis, ...]; no leading batch.
    sizes: how much of every axis the document takes, also of axes that no array lives on.
    source, key: where the document came from.
  """

  arrays: dict[str, np.ndarray]
  sizes: dict[str, int]
  source: str
  key: str


def stream_fields(stream: str, objectives: tuple[str, ...], classes: bool) -> dict[str, Field]:
  """The fields of one packed text axis named `stream`, its mask included.

  Args:
    stream: name of the stream, of its axis and of its mask.
    objectives: names of the losses that read it; each gets a weight per slot. Without any the
      stream has no targets either.
    classes: whether the mask needs classes (fan-out documents).
  """
  path = f"streams/{stream}"
  fields = {
    f"{path}/tokens": Field(stream),
    f"{path}/fill": Field(stream, shift="table", pad=IGNORE),
    f"{path}/positions": Field(stream),
    f"{path}/segment_ids": Field(stream, shift="documents", base=1),
    f"{path}/source_ids": Field(stream),
  } | mask_fields(stream, stream, stream, classes)
  if objectives:
    fields[f"{path}/targets"] = Field(stream)
  for objective in objectives:
    fields[f"{path}/loss_weights/{objective}"] = Field(stream, dtype="float32")
  return fields


def mask_fields(name: str, queries: str, keys: str, classes: bool) -> dict[str, Field]:
  """The fields of the mask `name`: slots of the axis `queries` see slots of the axis `keys`."""
  path = f"masks/{name}"
  fields = {f"{path}/lo": Field(queries, shift=keys), f"{path}/hi": Field(queries, shift=keys)}
  if classes:
    fields[f"{path}/q_class"] = Field(queries, base=1)
    fields[f"{path}/k_class"] = Field(keys, base=1)
  return fields


def streams_of(fields: Iterable[str]) -> list[str]:
  """The names of the streams, in the order of the paths of fields or of a flat batch."""
  found = (path.split("/") for path in fields)
  return [parts[1] for parts in found if parts[0] == "streams" and parts[2] == "tokens"]


def owners_of(fields: Iterable[str]) -> list[str]:
  """The paths of what has documents of known sources: "streams/text", "documents/captions"."""
  return [path.removesuffix("/source_ids") for path in fields if path.endswith("/source_ids")]


def mask_axes(fields: dict[str, Field]) -> dict[str, tuple[str, str]]:
  """Mask name to the axes of its queries and of its keys."""
  found = ((path.split("/"), field) for path, field in fields.items())
  return {parts[1]: (field.axis, field.shift or field.axis) for parts, field in found
          if parts[0] == "masks" and parts[2] == "lo"}


def heard(fields: dict[str, Field], stream: str) -> dict[str, Field]:
  """The fields that what a stream says may depend on.

  Left out are streams that read it and that it does not read, and what documents are compared by.
  """
  masks = mask_axes(fields)
  behind = {queries for queries, keys in masks.values() if keys == stream} - {stream}
  behind -= {keys for queries, keys in masks.values() if queries == stream}
  compared = {path.split("/")[1] for path in fields
              if path.startswith("documents/") and path.endswith("/digests")}

  def said(path: str) -> bool:
    kind, name = path.split("/")[:2]
    if kind == "documents":
      return name not in compared
    return {"streams": name, "masks": masks.get(name, ("",))[0]}.get(kind) not in behind

  return {path: field for path, field in fields.items() if said(path)}


def image_fields(height: int, width: int, grids: bool = False, words: int = 0,
                 frames: bool = False) -> dict[str, Field]:
  """The fields of the media axis "images": u8 pixels and the document of each image (0: empty).

  Args:
    height: of an image in pixels.
    width: of an image in pixels.
    grids: whether each image has a grid of its own, see `Media`.
    words: L, the most that a connector is told about each image; 0: nothing.
    frames: whether an image may be a frame of a video.
  """
  return {
    "media/images/values": Field("images", dtype="uint8", shape=(height, width, 3)),
    "media/images/segment_ids": Field("images", shift="documents", base=1),
  } | ({"media/images/grid": Field("images", shape=(2,))} if grids else {}) | (
    {TOLD: Field("images", pad=-1, shape=(words,))} if words else {}) | (
    {TIME: Field("images", pad=-1)} if frames else {})


def text_fields(name: str, length: int = 0, stream: str = "") -> dict[str, Field]:
  """The fields of the text of a document that is compared, on the axis "documents"; see `Texts`.

  Args:
    name: of these texts.
    length: L of texts of fixed length.
    stream: or the stream with a slot that stands for the text.
  """
  path = f"documents/{name}"
  own = {f"{path}/tokens": Field("documents", shape=(length,))} if length else {
    f"{path}/slots": Field("documents", shift=stream, pad=-1),
    f"{path}/images": Field("documents", shift="images", pad=-1),
  }
  return own | {
    f"{path}/segment_ids": Field("documents", shift="documents", base=1),
    f"{path}/source_ids": Field("documents"),
    f"{path}/digests": Field("documents", shape=(2,)),
  }


@dataclasses.dataclass(frozen=True)
class Slots:
  """A document written out slot by slot, T slots; what every concatenating fusion starts from.

  Attributes:
    tokens: i32[T], 0 at image slots.
    fill: i32[T], row of the media table, IGNORE at tokens, LEARNED at a learned row.
    positions: i32[T] for RoPE; each branch restarts after the trunk.
    targets: i32[T], the next token of the same branch.
    weight: f32[T], 1 where the target is predicted.
    branch: i32[T], 0 in the trunk.
    image: i32[T], 1 + index of the image a slot belongs to, 0 at tokens.
    predicted: bool[T], the slot's own token carries loss (it is an answer, not a prompt).
  """

  tokens: np.ndarray
  fill: np.ndarray
  positions: np.ndarray
  targets: np.ndarray
  weight: np.ndarray
  branch: np.ndarray
  image: np.ndarray
  predicted: np.ndarray

  def __len__(self) -> int:
    return len(self.tokens)


def write_slots(encoded: Encoded, rows: np.ndarray,
                order: Callable[[Pixels], np.ndarray] | None = None) -> Slots:
  """Writes a document out in reading order, every image as rows of the media table.

  Args:
    encoded: the document; images are in the trunk, and the trunk comes before every branch.
    rows: i32[K], the feature rows of one square in reading order, from the connector's `slots`.
    order: the fill i32[k] of an image's slots, counted from the first row of its first square;
      None: every image is one square and takes its `rows`.

  Raises:
    ValueError: a trunk part behind a branch (its tokens could not be causal and shared at once).
  """
  tokens, fill, branch, image, predicted = [], [], [], [], []
  images = squares = 0
  last = 0
  for part in encoded.parts:
    if isinstance(part, Pixels):
      filled = rows if order is None else order(part)
      n, number = len(filled), 0
      images += 1
      tokens.append(np.zeros(n, np.int32))
      fill.append(np.where(filled < 0, filled, filled + squares * len(rows)).astype(np.int32))
      squares += len(part.squares)
      image.append(np.full(n, images, np.int32))
      predicted.append(np.zeros(n, bool))
    else:
      n, number = len(part.ids), part.branch
      tokens.append(part.ids.astype(np.int32))
      fill.append(np.full(n, IGNORE, np.int32))
      image.append(np.zeros(n, np.int32))
      predicted.append(part.loss.astype(bool))
    if number < last:
      raise ValueError(f"document {encoded.key}: branch {number} after branch {last}; "
                       "the trunk comes first and branches are in order")
    last = number
    branch.append(np.full(n, number, np.int32))
  tokens, fill, branch, image, predicted = map(
    np.concatenate, (tokens, fill, branch, image, predicted)
  )
  index = np.arange(len(tokens), dtype=np.int32)
  trunk = int((branch == 0).sum())
  first = np.searchsorted(branch, branch).astype(np.int32)  # first slot of the slot's branch
  positions = np.where(branch == 0, index, trunk + index - first)
  same = np.append(branch[1:] == branch[:-1], False)
  targets = np.where(same, np.append(tokens[1:], 0), 0)
  weight = np.where(same & np.append(predicted[1:], False), 1.0, 0.0)
  return Slots(tokens, fill, positions.astype(np.int32), targets.astype(np.int32),
               weight.astype(np.float32), branch, image, predicted)


def split(encoded: Encoded, capacity: int, image_slots: Callable[[Pixels], int], images: int
          ) -> list[Encoded]:
  """Cuts a document that is longer than a row, never inside an image or between turn and answer.

  Plain text is cut into windows of `capacity` tokens. A document with images is cut between turns,
  a fan-out document between branches: the trunk is repeated in every piece, so each branch still
  sees the image. A turn of text that alone is too long is cut into windows like plain text.

  Args:
    encoded: the document.
    capacity: slots of one row.
    image_slots: how many slots an image takes.
    images: squares (images, tiles, frames) that one row has room for.

  Returns:
    The pieces in order; [encoded] itself when it fits; [] when an image (or the images of one turn)
    cannot fit, which makes it bad data.
  """
  length = lambda part: image_slots(part) if isinstance(part, Pixels) else len(part.ids)
  total = lambda parts: sum(map(length, parts))
  count = lambda parts: sum(len(part.squares) for part in parts if isinstance(part, Pixels))
  fits = lambda parts: total(parts) <= capacity and count(parts) <= images
  if fits(encoded.parts):
    return [encoded]

  trunk: tuple = ()
  if encoded.branched:
    trunk = tuple(p for p in encoded.parts if isinstance(p, Pixels) or p.branch == 0)
  groups: dict[tuple, list] = {}
  for part in encoded.parts[len(trunk):]:
    groups.setdefault((getattr(part, "branch", 0), part.turn), []).append(part)
  pieces, current = [], list(trunk)
  for group in groups.values():
    if fits(current + group):
      current = current + group
      continue
    if len(current) > len(trunk):
      pieces.append(current)
    current = list(trunk)
    if fits(current + group):
      current = current + group
    elif not trunk and not count(group):
      for window in _windows(group, capacity):
        pieces.append([window])
    else:
      return []
  if len(current) > len(trunk):
    pieces.append(current)
  return [
    dataclasses.replace(encoded, parts=tuple(piece), key=f"{encoded.key}#{number}")
    for number, piece in enumerate(pieces)
  ]


def _windows(parts: list[Tokens], capacity: int) -> list[Tokens]:
  ids = np.concatenate([part.ids for part in parts])
  loss = np.concatenate([part.loss for part in parts])
  return [
    Tokens(ids[start : start + capacity], loss[start : start + capacity], turn=parts[0].turn)
    for start in range(0, len(ids), capacity)
  ]
