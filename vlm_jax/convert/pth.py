"""Reads tensors out of PyTorch's .pth files without PyTorch, and without running anything.

Such a file is a pickle: a program that may call any function it names. The opcodes are read here by
a machine that knows dictionaries, lists, numbers, strings and the few calls that rebuild tensors;
any other name is refused before anything else is read. Both layouts are known: a zip archive
(PyTorch 1.6 and later), and the older one of five pickles followed by the storages.
"""

import os
import pickletools
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from vlm_jax.core.errors import DataError

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the older layout
STORAGES = {
  "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
  "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}
TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
CALLS = (*TENSORS, "torch._utils._rebuild_parameter", "collections.OrderedDict")
WRAPPERS = ("state_dict", "model", "model_state_dict")  # keys that training programs put it under
VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
IGNORED = {"PROTO", "FRAME"}


class Storage(NamedTuple):
  """A run of numbers in the file: dtype, key, length."""

  dtype: np.dtype
  key: str
  count: int


class Tensor(NamedTuple):
  """A view of a storage; offset and stride in elements."""

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  stride: tuple[int, ...]

  def end(self) -> int:
    """The first element of the storage behind the view."""
    if not all(self.shape):
      return self.offset
    last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
    return self.offset + last + 1


class Name(str):
  """A function or class that the pickle names."""


class Reader:
  """The tensors of a .pth file by key; reads one only when it is asked for.

  Attributes:
    shapes, dtypes: key to shape and dtype, known without reading any.
  """

  def __init__(self, path: str | os.PathLike):
    """Opens the file and reads its description.

    Raises:
      DataError: it is damaged, holds no state dict, or names anything but tensors.
    """
    self.path = Path(path)
    try:
      self._file = open(self.path, "rb")
      self._places: dict[str, tuple[int, int]] = {}  # storage to (offset in the file, bytes)
      zipped = zipfile.is_zipfile(self._file)
      self._file.seek(0)
      found = self._read_zip() if zipped else self._read_old()
    except (OSError, ValueError, IndexError, KeyError, TypeError, AttributeError, struct.error,
            zipfile.BadZipFile) as error:
      self.close()
      raise DataError(f"{self.path}: cannot be read as a PyTorch file ({error}); download it again"
                      ) from error
    except DataError:
      self.close()
      raise
    self._tensors = state_dict(found, self.path)
    self._check()
    self.shapes = {key: tensor.shape for key, tensor in self._tensors.items()}
    self.dtypes = {key: tensor.storage.dtype for key, tensor in self._tensors.items()}

  def _read_zip(self) -> Any:
    with zipfile.ZipFile(self._file) as archive:
      names = {info.filename: info for info in archive.infolist()}
      description = next((name for name in names if name.endswith("/data.pkl")), None)
      if description is None:
        raise ValueError("it has no data.pkl")
      folder = description.removesuffix("data.pkl")
      if names.get(f"{folder}byteorder") and archive.read(f"{folder}byteorder") != b"little":
        raise ValueError("its numbers are big-endian")
      for name, info in names.items():
        if name.startswith(f"{folder}data/"):
          if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError("its tensors are compressed")
          self._file.seek(info.header_offset + 26)  # the local header's own name and extra field
          sizes = struct.unpack("<HH", self._file.read(4))
          start = info.header_offset + 30 + sum(sizes)
          self._places[name.removeprefix(f"{folder}data/")] = start, info.file_size
      with archive.open(description) as file:
        return run(file, self.path)

  def _read_old(self) -> Any:
    if run(self._file, self.path) != MAGIC:
      raise ValueError("it begins like none")
    run(self._file, self.path)  # version
    run(self._file, self.path)  # sizes of the writer's integers
    found = run(self._file, self.path)
    keys = run(self._file, self.path)
    widths = {tensor.storage.key: tensor.storage.dtype.itemsize for tensor in tensors_in(found)}
    for key in keys:
      count = struct.unpack("<q", self._file.read(8))[0]
      size = count * widths.get(key, 1)
      self._places[key] = self._file.tell(), size
      self._file.seek(size, os.SEEK_CUR)
    return found

  def _check(self) -> None:
    length = self.path.stat().st_size
    for key, tensor in self._tensors.items():
      start, size = self._places.get(tensor.storage.key, (0, 0))
      end = tensor.end() * tensor.storage.dtype.itemsize
      if end > size or start + end > length:
        self.close()
        raise DataError(f"{self.path}: '{key}' needs {end} bytes of its storage but the file holds "
                        f"{max(min(size, length - start), 0)}; it is truncated, download it again")

  def __getitem__(self, key: str) -> np.ndarray:
    tensor = self._tensors[key]
    dtype = tensor.storage.dtype
    start, _ = self._places[tensor.storage.key]
    self._file.seek(start + tensor.offset * dtype.itemsize)
    data = self._file.read((tensor.end() - tensor.offset) * dtype.itemsize)
    strides = [step * dtype.itemsize for step in tensor.stride]
    return np.ndarray(tensor.shape, dtype, data, strides=strides)

  def __enter__(self) -> "Reader":
    return self

  def __exit__(self, *error) -> None:
    self.close()

  def close(self) -> None:
    """Closes the file."""
    if hasattr(self, "_file"):
      self._file.close()


def tensors_in(value: Any) -> Iterable[Tensor]:
  """Every tensor of nested dictionaries and lists."""
  if isinstance(value, Tensor):
    yield value
  elif isinstance(value, dict | list):
    for item in value.values() if isinstance(value, dict) else value:
      yield from tensors_in(item)


def state_dict(found: Any, path: Path) -> dict[str, Tensor]:
  """The dictionary of tensors, where training programs put it; other entries are left out.

  Raises:
    DataError: there is none.
  """
  for name in WRAPPERS:
    if isinstance(found, dict) and isinstance(found.get(name), dict):
      found = found[name]
  tensors = {key: value for key, value in found.items() if isinstance(value, Tensor)
             } if isinstance(found, dict) else {}
  if not tensors:
    raise DataError(f"{path}: holds no dictionary of tensors, neither at its top nor below "
                    f"{', '.join(WRAPPERS)}; save model.state_dict() as safetensors")
  return tensors


def run(file: BinaryIO, path: Path) -> Any:
  """What one pickle describes, see the module.

  Raises:
    DataError: it names something that is not a tensor, or does something that this cannot.
    ValueError, IndexError: it is damaged.
  """
  stack: list[Any] = []
  marks: list[int] = []
  memo: dict[int, Any] = {}

  def since_mark() -> list[Any]:
    start = marks.pop()
    items = stack[start:]
    del stack[start:]
    return items

  def pop(count: int) -> list[Any]:
    items = stack[-count:]
    del stack[-count:]
    return items

  for opcode, argument, _ in pickletools.genops(file):
    name = opcode.name
    if name in IGNORED:
      continue
    if name == "STOP":
      return stack.pop()
    if name == "MARK":
      marks.append(len(stack))
    elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
      memo[argument] = stack[-1]
    elif name == "MEMOIZE":
      memo[len(memo)] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET", "GET"):
      stack.append(memo[argument])
    elif name in VALUES:
      stack.append(VALUES[name])
    elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
      stack.append({"D": dict, "L": list, "T": tuple}[name[6]]())
    elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
      stack.append(tuple(since_mark() if name == "TUPLE" else pop(int(name[-1]))))
    elif name in ("SETITEM", "SETITEMS"):
      items = since_mark() if name == "SETITEMS" else pop(2)
      stack[-1].update(zip(items[::2], items[1::2], strict=True))
    elif name in ("APPEND", "APPENDS"):
      items = since_mark() if name == "APPENDS" else pop(1)
      stack[-1].extend(items)
    elif name in ("GLOBAL", "STACK_GLOBAL"):
      stack.append(known(argument.split() if name == "GLOBAL" else pop(2), path))
    elif name == "BINPERSID":
      stack.append(storage(stack.pop(), path))
    elif name == "REDUCE":
      stack.append(call(*pop(2), path))
    elif name == "BUILD" and isinstance(stack[-2], dict):
      stack.pop()  # versions of the modules
    elif opcode.arg is not None and argument is not None and isinstance(
        argument, int | float | str | bytes):
      stack.append(argument)
    else:
      raise DataError(f"{path}: its pickle does '{name}', which no dictionary of tensors needs; "
                      "save model.state_dict() as safetensors where you trust the file")
  raise ValueError("it ends in the middle of its description")


def known(parts: Iterable[str], path: Path) -> Name:
  """A name that the pickle asks for, if it is one of tensors; else a DataError."""
  name = ".".join(parts)
  module, _, last = name.rpartition(".")
  if name not in CALLS and not (module == "torch" and last in STORAGES):
    raise DataError(f"{path}: asks to run '{name}'; only tensors are read from a .pth file, so "
                    "save model.state_dict() as safetensors where you trust it")
  return Name(name)


def storage(value: Any, path: Path) -> Storage:
  """A storage from its persistent id ("storage", class, key, device, length)."""
  if not (isinstance(value, tuple) and len(value) >= 5 and value[0] == "storage"
          and isinstance(value[1], Name)):
    raise DataError(f"{path}: refers to something that is not a tensor's storage")
  return Storage(np.dtype(STORAGES[value[1].rpartition(".")[2]]), str(value[2]), int(value[4]))


def call(name: Any, arguments: tuple, path: Path) -> Any:
  """The result of one of `CALLS`."""
  if not isinstance(name, Name) or name not in CALLS:
    raise DataError(f"{path}: asks to run {name!r}; only tensors are read from a .pth file")
  if name == "collections.OrderedDict":
    return dict(*arguments)
  if name not in TENSORS:
    return arguments[0]  # a parameter is its tensor
  source, offset, shape, stride = arguments[:4]
  if not isinstance(source, Storage) or min((offset, *shape, *stride)) < 0:
    raise DataError(f"{path}: describes a tensor that cannot be")
  return Tensor(source, offset, tuple(shape), tuple(stride))
