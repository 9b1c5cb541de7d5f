"""The arrays of a checkpoint in pieces: written from and read into less memory than they take.

The layout is Orbax's, so that either side can be Orbax: a tree is an OCDBT store, an array in it a
zarr array under its path with dots. What is written here, and what `Checkpoints` saves, is cut into
chunks that can be read alone.
"""

import asyncio
import contextlib
import errno
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from vlm_jax.core import pieces
from vlm_jax.core.pieces import Pieces
from vlm_jax.core.tree import flatten, unflatten
from vlm_jax.core.typing import Params

# Trouble of this machine, not of the checkpoint: never a reason to move one aside.
OURS = (MemoryError, PermissionError, KeyboardInterrupt)

Span = tuple[tuple[int, int], ...]  # (start, stop) of every axis of a part of an array


class Corrupt(Exception):
  """A checkpoint that cannot be read back as it was written; the message says what is wrong."""


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
  """Makes a Corrupt of whatever a damaged checkpoint makes its readers say of `name`."""
  try:
    yield
  except OURS:
    raise
  except Exception as error:
    if "RESOURCE_EXHAUSTED" in str(error):
      raise
    if "PERMISSION_DENIED" in str(error):  # TensorStore has its own kinds of errors
      raise PermissionError(errno.EACCES, "permission denied", name) from error
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". See full ")[0]
    raise Corrupt(f"'{name}' cannot be read: {reason[:200]}") from error


class Writer(ocp.type_handlers.NumpyHandler):
  """Writes `Pieces`, one piece of one array at a time."""

  def __init__(self):
    super().__init__(deepcopy_host_arrays=False)  # nothing else has a piece
    self._turn = asyncio.Lock()

  async def _open_and_write(self, value: Pieces, tspec: dict[str, Any], ts_context: ts.Context
                            ) -> None:
    """What Orbax calls for every array, for all of them at once."""
    async with self._turn:
      if value.shape:  # whole chunks are written, so that none is read back
        tspec["metadata"]["chunks"] = [max(1, size) for size in (value.rows, *value.shape[1:])]
      array = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
      start = 0
      for piece in value:
        part = array[start : start + len(piece)] if value.shape else array
        await part.write(piece)
        start += value.rows


def handler() -> ocp.PyTreeCheckpointHandler:
  """What writes a nested dict of `Pieces` (`ocp.args.PyTreeSave`)."""
  registry = ocp.type_handlers.create_type_handler_registry((Pieces, Writer()))
  return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def cut(params: Params) -> Params:
  """The parameters, arrays or `Pieces`, as `handler` writes them."""
  return unflatten({path: pieces.of(leaf) for path, leaf in flatten(params).items()})


def chunks(tree: Any) -> Any:
  """How Orbax is to cut large arrays on devices, `ocp.SaveArgs` by leaf: between rows if it can.

  Else it would write what a device holds of an array as one chunk, which any reader of a part of it
  must decode as a whole.
  """

  def args(leaf: jax.Array) -> ocp.SaveArgs:
    row = math.prod(leaf.shape[1:]) * leaf.dtype.itemsize
    axes = (0,) if leaf.nbytes > pieces.BYTES and row >= pieces.BYTES // 2**5 else ()
    return ocp.SaveArgs(chunk_byte_size=pieces.BYTES, shard_axes=axes)

  return jax.tree.map(args, tree)


def open_pieces(directory: Path, expected: dict[str, dict[str, Any]],
                boxes: dict[str, tuple[slice, ...]] | None = None) -> dict[str, Pieces]:
  """The arrays of an item of a checkpoint by path.

  Args:
    directory: of the item.
    expected: path to "shape" and "dtype", of every array, as the checkpoint's manifest has them.
    boxes: path to the part of the array that is wanted; None: the whole of all.

  Raises:
    Corrupt: an array is missing, is another than expected, or cannot be read; now or when a piece
      is asked for.
  """
  context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
  base = {"driver": "file", "path": f"{directory.absolute()}/"}

  def opened(path: str, entry: dict[str, Any]) -> Pieces:
    with reading(path):
      store = {"driver": "ocdbt", "base": base, "path": path.replace("/", ".") + "/"}
      array = ts.open({"driver": "zarr", "kvstore": store}, open=True, read=True, context=context
                      ).result()
    shape, dtype = tuple(array.shape), np.dtype(array.dtype.numpy_dtype)
    if (list(shape), str(dtype)) != (entry["shape"], entry["dtype"]):
      raise Corrupt(f"array '{path}' is {dtype}{list(shape)}")
    # A chunk is decoded whole, so pieces are whole chunks.
    least = min(array.chunk_layout.read_chunk.shape[0], shape[0]) if shape else 1
    if boxes is not None and shape:
      array = array[boxes[path]].translate_to[(0,) * len(shape)]
      shape = tuple(array.shape)

    def read(start: int, stop: int) -> np.ndarray:
      with reading(path):
        return (array[start:stop] if shape else array).read().result()

    return Pieces(shape, dtype, read, pieces.rows(shape, dtype, max(1, least)))

  return {path: opened(path, entry) for path, entry in expected.items()}


def load(directory: Path, expected: dict[str, dict[str, Any]], abstract: Any) -> Any:
  """The arrays of an item of a checkpoint, each where its leaf of `abstract` lies.

  Every piece is read once, however many devices share it, and only where this process has a part
  of it; beside what the devices hold there is one array in memory.

  Args:
    directory: of the item.
    expected: as of `open_pieces`.
    abstract: the tree with shapes, dtypes and shardings.

  Raises:
    Corrupt: as `open_pieces`.
  """
  flat, treedef = jax.tree_util.tree_flatten_with_path(abstract)
  leaves = {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in flat}
  spans = {path: _spans(leaf) for path, leaf in leaves.items()}
  boxes = {path: tuple(slice(min(start for start, _ in axis), max(stop for _, stop in axis))
                       for axis in zip(*mine.values(), strict=True))
           for path, mine in spans.items()}
  found = open_pieces(directory, {path: expected[path] for path in leaves}, boxes)
  with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding lets the others run
    return treedef.unflatten(_spread(found[path], leaf, spans[path], boxes[path], pool)
                             for path, leaf in leaves.items())


def _spans(leaf: jax.ShapeDtypeStruct) -> dict[jax.Device, Span]:
  """What every device of this process holds of an array."""
  held = leaf.sharding.addressable_devices_indices_map(leaf.shape)
  return {device: tuple(part.indices(size)[:2]
                        for part, size in zip(index, leaf.shape, strict=True))
          for device, index in held.items()}


def _spread(array: Pieces, leaf: jax.ShapeDtypeStruct, spans: dict[jax.Device, Span],
            box: tuple[slice, ...], pool: ThreadPoolExecutor) -> jax.Array:
  """An array on the devices of `leaf`, from the pieces of its part within `box`."""
  parts = {span: np.empty([stop - start for start, stop in span], array.dtype)
           for span in spans.values()}

  def fill(begin: int) -> None:
    piece = array.read(begin, min(begin + array.rows, array.last))
    for span, part in parts.items():
      if not span:
        part[...] = piece
        continue
      (start, stop), *rest = [(start - of.start, stop - of.start)
                              for (start, stop), of in zip(span, box, strict=True)]
      low, high = max(start, begin), min(stop, begin + len(piece))
      if low < high:
        part[low - start : high - start] = piece[
          (slice(low - begin, high - begin), *(slice(*axis) for axis in rest))]

  list(pool.map(fill, range(0, array.last, array.rows)))
  last = {span: device for device, span in spans.items()}
  held = []
  for device, span in spans.items():  # a part goes when its last device has it
    part = parts.pop(span) if last[span] == device else parts[span]
    held.append(jax.block_until_ready(
      jax.device_put(part.astype(leaf.dtype, copy=False), device)))
  return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, held)
