"""One table says which array of ours is which array of theirs; it is read in both directions.

Every tower, connector and language model has a tuple `KEYS` of rows (ours, theirs, op):

  ours    path of the parameter below the module, "layers/attention/query/kernel"
  theirs  key below their module, "layers.{layer}.self_attn.q_proj.weight"; with {layer}, ours is
          stacked on a leading axis and one row stands for the keys of all layers; where theirs are
          not all alike, {layer+1} are those from 1 on and {2*layer+1} every second;
          "in_proj_weight[1/3]" is the second of three equal parts, along their first axis, of one
          tensor of theirs
  op      name in `OPS`: how the arrays of one layer differ

A row whose parameter the config does not make (a class token, a bias) is passed over. Because
export is read from the same rows as import, import -> export -> import is the identity.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np

from vlm_jax.convert.safetensors_io import Tensor
from vlm_jax.core import pieces
from vlm_jax.core.errors import DataError
from vlm_jax.core.pieces import Pieces
from vlm_jax.core.tree import flatten, unflatten
from vlm_jax.core.typing import Params

LISTED = 8  # keys named in an error message
LAYER = re.compile(r"\{(?:(\d+)\*)?layer(?:\+(\d+))?\}")
Shape = tuple[int, ...]
Keys = tuple[tuple[str, str, str], ...]
Part = tuple[str, str, Keys]  # our prefix "llm/", their prefix "language_model.", a module's KEYS


class Op(NamedTuple):
  """How one array of ours becomes theirs: `shape` and `export` go there, `load` comes back."""

  shape: Callable[[Shape], Shape]
  export: Callable[[np.ndarray], np.ndarray]
  load: Callable[[np.ndarray, Shape], np.ndarray]


def _patch_shape(shape: Shape) -> Shape:
  size = math.isqrt(shape[0] // 3)
  return (shape[1], 3, size, size)


def _load_patch(array: np.ndarray, shape: Shape) -> np.ndarray:
  return array.transpose(2, 3, 1, 0).reshape(shape)


def _export_patch(array: np.ndarray) -> np.ndarray:
  width, channels, size, _ = _patch_shape(array.shape)
  return array.reshape(size, size, channels, width).transpose(3, 2, 0, 1)


def _rows_shape(shape: Shape) -> Shape:
  size = math.isqrt(shape[0] // 3)
  return (size, size, 3, shape[1])


OPS = {
  "copy": Op(lambda s: s, lambda a: a, lambda a, s: a),
  # A bias or token with split axes, [H,C] for [H*C].
  "flat": Op(lambda s: (math.prod(s),), lambda a: a.reshape(-1), lambda a, s: a.reshape(s)),
  # torch Linear [out, in]; the output axes may be split: ours [D,H,C].
  "in": Op(
    lambda s: (math.prod(s[1:]), s[0]),
    lambda a: a.reshape(a.shape[0], -1).T,
    lambda a, s: a.T.reshape(s),
  ),
  # The same with the input axes split: ours [H,C,D].
  "out": Op(
    lambda s: (s[-1], math.prod(s[:-1])),
    lambda a: a.reshape(-1, a.shape[-1]).T,
    lambda a, s: a.T.reshape(s),
  ),
  # torch Conv2d [out,in,size,size]; ours [size,size,in,out].
  "conv": Op(
    lambda s: (s[3], s[2], s[0], s[1]),
    lambda a: a.transpose(3, 2, 0, 1),
    lambda a, s: a.transpose(2, 3, 1, 0),
  ),
  # Heads before the width: ours [D,H,C].
  "heads": Op(lambda s: (s[1], s[0], s[2]), lambda a: a.transpose(1, 0, 2),
              lambda a, s: a.transpose(1, 0, 2)),
  "heads_lead": Op(lambda s: (1, s[1], s[0], s[2]), lambda a: a.transpose(1, 0, 2)[None],
                   lambda a, s: a[0].transpose(1, 0, 2)),
  # Axes of size 1 in front.
  "lead": Op(lambda s: (1, *s), lambda a: a[None], lambda a, s: a.reshape(s)),
  "lead2": Op(lambda s: (1, 1, *s), lambda a: a[None, None], lambda a, s: a.reshape(s)),
  # Flax Conv [size,size,in,out] of patches.
  "rows": Op(_rows_shape, lambda a: a.reshape(_rows_shape(a.shape)), lambda a, s: a.reshape(s)),
  # torch Conv2d [D,3,size,size]; ours [size*size*3, D], a patch being (row, column, channel).
  "patch": Op(_patch_shape, _export_patch, _load_patch),
}


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of theirs: our path, the layer of a stacked parameter, its shape without layers."""

  path: str
  layer: int | None
  key: str
  op: Op
  shape: Shape


class Source(Protocol):
  """Where tensors come from: a safetensors Reader, or anything with shapes and tensors by key."""

  shapes: Mapping[str, Shape]

  def __getitem__(self, key: str) -> np.ndarray: ...


def entries(parts: Iterable[Part], shapes: Mapping[str, Shape]) -> list[Entry]:
  """The tensors of a checkpoint.

  Args:
    parts: of every module.
    shapes: our parameter paths to shapes, stacked layers included.

  Raises:
    ValueError: a parameter that no row or more than one row describes (a KEYS tuple is wrong).
  """
  found, seen = [], set()
  for ours, theirs, keys in parts:
    for path, key, op in keys:
      path, key = ours + path, theirs + key
      if path not in shapes:
        continue
      if path in seen:
        raise ValueError(f"two rows of KEYS describe {path}")
      seen.add(path)
      shape = tuple(shapes[path])
      if not LAYER.search(key):
        found.append(Entry(path, None, key, OPS[op], shape))
        continue
      for layer in range(shape[0]):
        found.append(Entry(path, layer, _key_of(key, layer), OPS[op], shape[1:]))
  if left := sorted(set(shapes) - seen):
    raise ValueError(f"no row of KEYS describes {name_keys(left)}")
  return found


def _key_of(key: str, layer: int) -> str:
  """The key of our layer of that number."""
  return LAYER.sub(lambda found: str(int(found[1] or 1) * layer + int(found[2] or 0)), key)


def load(
  source: Source,
  table: list[Entry],
  rename: Callable[[str], str] = lambda key: key,
  unread: Callable[[str], bool] = lambda key: False,
  dtype: np.dtype | None = None,
) -> Params:
  """Reads parameters tensor by tensor.

  Args:
    source: their tensors.
    table: from `entries`.
    rename: their key in this file to its canonical spelling.
    unread: canonical keys that the model is known not to read.
    dtype: of the parameters; None: the file's.

  Returns:
    The nested tree of numpy arrays.

  Raises:
    DataError: missing keys, unexpected keys, or wrong shapes; one sentence with the names.
  """
  source, spelled = _match(source, table, rename, unread)
  return unflatten({path: _read(source, rows, spelled, dtype)
                    for path, rows in _by_path(table).items()})


def open_pieces(
  source: Source,
  table: list[Entry],
  rename: Callable[[str], str] = lambda key: key,
  unread: Callable[[str], bool] = lambda key: False,
  dtype: np.dtype | None = None,
) -> dict[str, Pieces]:
  """As `load`, by path and without reading anything yet; the source has `dtypes`, too.

  One tensor is in memory at a time, or the layers of one piece.
  """
  dtypes = source.dtypes
  source, spelled = _match(source, table, rename, unread)
  last: dict[str, np.ndarray] = {}  # the last parameter that has no layers, nothing else

  def whole(path: str, rows: list[Entry]) -> np.ndarray:
    if path not in last:
      last.clear()
      last[path] = _read(source, rows, spelled, dtype)
    return last[path]

  def of(path: str, rows: list[Entry]) -> Pieces:
    shape, stacked = rows[0].shape, rows[0].layer is not None
    shape = (len(rows), *shape) if stacked else shape
    found = {row.key: dtype or dtypes[_tensor(spelled[row.key])] for row in rows}
    if other := [key for key in found if found[key] != found[rows[0].key]]:
      raise _mixed(other[0], found[other[0]], found[rows[0].key])
    kind = np.dtype(found[rows[0].key])

    def read(start: int, stop: int) -> np.ndarray:
      if stacked:
        return _read(source, rows[start:stop], spelled, dtype)
      return whole(path, rows)[start:stop] if shape else whole(path, rows)

    return Pieces(shape, kind, read, pieces.rows(shape, kind))

  return {path: of(path, rows) for path, rows in _by_path(table).items()}


def _match(source: Source, table: list[Entry], rename: Callable[[str], str],
           unread: Callable[[str], bool]) -> tuple[Source, dict[str, str]]:
  """The source with parts apart, and canonical key to its key there; all that `load` can refuse."""
  source = _apart(source, table, rename)
  spelled: dict[str, str] = {}
  for key in source.shapes:
    if rename(key) in spelled:
      raise DataError(f"weights: '{key}' and '{spelled[rename(key)]}' are two spellings of one "
                      "tensor; remove one of them")
    spelled[rename(key)] = key
  expected = {entry.key for entry in table}
  if missing := sorted(expected - set(spelled)):
    raise DataError(f"weights: {len(missing)} keys are missing: {name_keys(missing)}; the "
                    "checkpoint is incomplete or its config.json describes another model")
  if unexpected := sorted(key for key in set(spelled) - expected if not unread(key)):
    raise DataError(f"weights: {len(unexpected)} keys are unexpected: {name_keys(unexpected)}; the "
                    "model would ignore them, so its config.json describes another model")
  wrong = [
    f"{entry.key} is {source.shapes[spelled[entry.key]]}, expected {entry.op.shape(entry.shape)}"
    for entry in table if source.shapes[spelled[entry.key]] != entry.op.shape(entry.shape)
  ]
  if wrong:
    raise DataError(f"weights: {len(wrong)} shapes are wrong: {name_keys(wrong)}; the config.json "
                    "describes another model")
  return source, spelled


def _by_path(table: list[Entry]) -> dict[str, list[Entry]]:
  """Every parameter's tensors: its layers in order, or one."""
  found: dict[str, list[Entry]] = {}
  for entry in table:
    found.setdefault(entry.path, []).append(entry)
  return found


def _read(source: Source, rows: list[Entry], spelled: Mapping[str, str], dtype: np.dtype | None
          ) -> np.ndarray:
  """Some layers of a parameter, stacked, or one that has none."""
  array = rows[0].op.load(source[spelled[rows[0].key]], rows[0].shape)
  if rows[0].layer is None:
    return np.array(array, dtype, order="C")
  stacked = np.empty((len(rows), *rows[0].shape), dtype or array.dtype)
  for number, row in enumerate(rows):
    if number:
      array = row.op.load(source[spelled[row.key]], row.shape)
    if dtype is None and stacked.dtype != array.dtype:
      raise _mixed(row.key, array.dtype, stacked.dtype)
    stacked[number] = array
  return stacked


def _mixed(key: str, kind: np.dtype, first: np.dtype) -> DataError:
  return DataError(f"weights: {key} is {kind} but earlier layers are {first}; ask for one with "
                   "--dtype")


def dtype_of(name: str) -> np.dtype:
  """The dtype of a name, bfloat16 included."""
  return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def export(params: Params, table: list[Entry], dtype: np.dtype | None = None) -> dict[str, Tensor]:
  """Their tensors by key, in `dtype` (None: the parameters'); a parameter is an array or `Pieces`.

  Each is made when asked for. A piece of a parameter is read once for all its layers that are asked
  for in a row.
  """
  flat = {path: pieces.of(leaf) for path, leaf in flatten(params).items()}
  host: dict[tuple[str, int], np.ndarray] = {}  # the last piece read, nothing else

  def layer(entry: Entry) -> np.ndarray:
    whole = flat[entry.path]
    start = entry.layer // whole.rows * whole.rows
    if (entry.path, start) not in host:
      host.clear()
      stop = min(start + whole.rows, whole.shape[0])
      host[entry.path, start] = whole.read(start, stop)
    return host[entry.path, start][entry.layer - start]

  def get(entry: Entry) -> np.ndarray:
    array = flat[entry.path].whole() if entry.layer is None else layer(entry)
    return entry.op.export(array).astype(kind(entry), copy=False)

  def kind(entry: Entry) -> np.dtype:
    return np.dtype(dtype or flat[entry.path].dtype)

  def tensor(entry: Entry) -> Tensor:
    return Tensor(entry.op.shape(entry.shape), kind(entry), lambda: get(entry))

  return _together({entry.key: tensor(entry) for entry in table})


PART = re.compile(r"(.+)\[(\d+)/(\d+)\]")  # a key of KEYS: tensor, part, number of parts


class _Apart:
  """A source whose tensors of several parts are several tensors, with keys as in KEYS."""

  def __init__(self, source: Source, parts: Mapping[str, int]):
    self._source = source
    self.shapes: dict[str, Shape] = {}
    for key, shape in source.shapes.items():
      count = parts.get(key, 1)
      if count == 1:
        self.shapes[key] = shape
        continue
      if not shape or shape[0] % count:
        raise DataError(f"weights: {key} is {shape}, which is not {count} equal parts; the "
                        "config.json describes another model")
      for number in range(count):
        self.shapes[f"{key}[{number}/{count}]"] = (shape[0] // count, *shape[1:])

  def __getitem__(self, key: str) -> np.ndarray:
    match = PART.fullmatch(key)
    if not match:
      return self._source[key]
    return np.split(self._source[match[1]], int(match[3]))[int(match[2])]


def _tensor(key: str) -> str:
  """The tensor that a key of KEYS is, or is a part of."""
  match = PART.fullmatch(key)
  return match[1] if match else key


def _apart(source: Source, table: list[Entry], rename: Callable[[str], str]) -> Source:
  matches = [match for entry in table if (match := PART.fullmatch(entry.key))]
  counts = {match[1]: int(match[3]) for match in matches}
  return _Apart(source, {key: counts[rename(key)] for key in source.shapes
                         if rename(key) in counts}) if counts else source


def _together(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
  """The inverse on what is written: the parts of a tensor, which are in order, are one."""
  found: dict[str, list[Tensor]] = {}
  for key, tensor in tensors.items():
    found.setdefault(_tensor(key), []).append(tensor)

  def join(parts: list[Tensor]) -> Tensor:
    first, *_ = parts
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return Tensor(shape, first.dtype, lambda: np.concatenate([part.get() for part in parts]))

  return {key: parts[0] if len(parts) == 1 else join(parts) for key, parts in found.items()}


def renamer(rules: tuple[tuple[str, str], ...]) -> Callable[[str], str]:
  """A function that applies (pattern, replacement) to a key, each once and in order."""
  compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

  def rename(key: str) -> str:
    for pattern, replacement in compiled:
      key = pattern.sub(replacement, key, count=1)
    return key

  return rename


def name_keys(keys: list[str]) -> str:
  """The first keys of a list, and how many more there are."""
  more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
  return ", ".join(keys[:LISTED]) + more
