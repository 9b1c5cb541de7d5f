"""`vlm-jax data prepare`: every source into ArrayRecord files, a tokenizer, and a manifest.

Everything is written into a hidden folder first. The manifest is moved into place last and taken
away first, and nothing reads data without one: whenever the process dies, what is left is either
the old data, complete, or no data, and the next start clears the rest away.
"""

import contextlib
import fcntl
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import cast

from ml_collections import ConfigDict

from vlm_jax.core.document import Text
from vlm_jax.core.errors import DataError, DiskError, RetryError, UsageError
from vlm_jax.data import draw, files, records, tokenizer
from vlm_jax.data.bad import BadExample
from vlm_jax.data.sources import DataSet, find_source, folder, is_format

SOURCES = ("easy_vqa", "openmoji", "pydoc")
OWN_RECORDS = 100_000  # of a user's own files that the tokenizer learns from, evenly spaced
TEMPORARY = ".prepare"
LOCK = ".prepare.lock"


def prepare(root: str, sources: Sequence[str] = SOURCES, vocab_size: int = 1024,
            wait: bool = True, log: Callable[[str], None] = print,
            config: ConfigDict | None = None) -> dict:
  """Prepares the data, or says that it already is.

  Args:
    root: folder to write to; made if need be. Other files in it are left alone.
    sources: modules in vlm_jax/data/sources, or dotted names.
    vocab_size: tokens of the tokenizer that is trained on the training splits.
    wait: wait for another `prepare` of the same root (else RetryError).
    log: gets the progress, one line at a time.
    config: a recipe; the tokenizer also learns from those of its sources that are a user's own
      files, which are not copied.

  Returns:
    The manifest.

  Raises:
    UsageError: an unknown source, or a package that is not installed.
    DiskError: `root` cannot be written or the disk is full.
  """
  own = own_sources(config) if config is not None else []
  if not (sources or own) or len({folder(name) for name in sources}) != len(sources):
    raise UsageError(f"sources are '{', '.join(sources)}'; name at least one, each once")
  modules = {folder(name): cast(DataSet, find_source(name)) for name in sources}
  for name, module in modules.items():
    if is_format(module):
      raise UsageError(f"source '{name}' reads your own files and needs no preparing; name it in a "
                       "recipe, or try it with `vlm-jax data check FILE`")
  with _disk_errors(root):
    os.makedirs(root, exist_ok=True)
    with _locked(root, wait, log):
      shutil.rmtree(os.path.join(root, TEMPORARY), ignore_errors=True)
      request = {"sources": sorted(sources), "vocab_size": vocab_size}
      if own:
        request["own"] = {name: _stamp(config, name) for name in own}
      manifest = _existing(root, request, log)
      if manifest is None:
        manifest = _write(root, modules, request, log, _own_texts(config, own))
        log(f"prepared {root}: " + _summary(manifest))
      return manifest


def own_sources(config: ConfigDict) -> list[str]:
  """The sources of a recipe that are a user's own files."""
  return [name for name, entry in sorted(config.data.sources.items())
          if is_format(find_source(entry.name, config.outside))]


def _stamp(config: ConfigDict, name: str) -> list:
  """Changes when the files of a source do; JSON."""
  entry = files.of_split(config.data.sources[name], config.data.sources[name].split)
  stamp: list = [[field, str(entry[field])] for field in
                 ("name", "path", "annotations", "split", "form", "held_out")]
  with contextlib.suppress(DataError):  # a folder of TFDS, whose versions do not change
    for path in files.paths(entry.path, "files"):
      stamp.append([path, os.path.getsize(path), os.stat(path).st_mtime_ns])
  return stamp


def _own_texts(config: ConfigDict | None, names: Sequence[str]) -> Iterator[str]:
  for name in names if config is not None else ():
    entry = config.data.sources[name]
    module = find_source(entry.name, config.outside)
    reader, _ = draw.open_records(config, name, module, entry.split)
    for index in range(0, len(reader), max(1, len(reader) // OWN_RECORDS)):
      with contextlib.suppress(BadExample):  # training counts and names them
        for parts in module.parts(reader[index], entry.form or module.FORMS[0]):
          yield from (part.text for part in parts if isinstance(part, Text))


def _existing(root: str, request: dict, log: Callable[[str], None]) -> dict | None:
  if not os.path.exists(os.path.join(root, records.MANIFEST)):
    return None
  try:
    manifest = records.check(root, verify=True)
  except DataError as error:
    log(f"preparing again: {error}")
    return None
  if manifest["request"] != request:
    log(f"preparing again: {root} holds {manifest['request']}, asked for {request}")
    return None
  log(f"{root} is already prepared and every sha256 agrees: " + _summary(manifest))
  return manifest


def _write(root: str, modules: dict[str, DataSet], request: dict, log: Callable[[str], None],
           own: Iterator[str]) -> dict:
  temporary = os.path.join(root, TEMPORARY)
  os.makedirs(temporary)
  manifest: dict = {"request": request, "sources": {}, "files": {},
                    "python": platform.python_version()}
  for name, module in modules.items():
    os.makedirs(os.path.join(temporary, name))
    counts = {}
    for split, items in module.prepare().items():
      counts[split] = records.write(os.path.join(temporary, name, f"{split}.array_record"), items)
      log(f"{name}: {split} {counts[split]} records")
    manifest["sources"][name] = {
      "records": counts, "licence": module.LICENCE, "package": module.PACKAGE,
      "version": _version(module.PACKAGE),
    }
  log(f"tokenizer: training {request['vocab_size']} tokens")
  texts = itertools.chain(_texts(temporary, modules), own)
  tokenizer.train(texts, request["vocab_size"]).save(os.path.join(temporary, records.TOKENIZER))
  _describe(temporary, manifest)
  _commit(root, temporary, manifest)
  return manifest


def _texts(temporary: str, modules: dict[str, DataSet]) -> Iterator[str]:
  for name, module in modules.items():
    path = os.path.join(temporary, name, "train.array_record")
    if os.path.exists(path):
      reader = records.Reader(path)
      for index in range(len(reader)):
        yield from module.texts(reader[index])


def _describe(temporary: str, manifest: dict) -> None:
  for folder_path, _, names in sorted(os.walk(temporary)):
    for name in sorted(names):
      path = os.path.join(folder_path, name)
      manifest["files"][os.path.relpath(path, temporary)] = {
        "bytes": os.path.getsize(path), "sha256": records.digest(path),
      }
  with open(os.path.join(temporary, records.MANIFEST), "w", encoding="utf-8") as file:
    json.dump(manifest, file, indent=2, sort_keys=True)
    file.flush()
    os.fsync(file.fileno())


def _commit(root: str, temporary: str, manifest: dict) -> None:
  """Moves everything into place. Only renames stand between taking the old manifest away and the
  new one: what is deleted waits in `temporary`."""
  path = os.path.join(root, records.MANIFEST)
  old: list[str] = []
  if os.path.exists(path):
    with contextlib.suppress(OSError, ValueError, KeyError), open(path, encoding="utf-8") as file:
      old = list(json.load(file)["sources"])
  new = sorted(set(os.listdir(temporary)) - {records.MANIFEST})
  trash = os.path.join(temporary, "old")
  os.makedirs(trash)
  with contextlib.suppress(FileNotFoundError):
    os.remove(path)
  for name in sorted({folder(name) for name in old} | set(new)):
    if os.path.isdir(os.path.join(root, name)):
      os.replace(os.path.join(root, name), os.path.join(trash, name))
  for name in new:
    os.replace(os.path.join(temporary, name), os.path.join(root, name))
  os.replace(os.path.join(temporary, records.MANIFEST), path)
  shutil.rmtree(temporary)


@contextlib.contextmanager
def _locked(root: str, wait: bool, log: Callable[[str], None]) -> Iterator[None]:
  # The kernel drops the lock when the process dies, so a stale lock cannot exist.
  with open(os.path.join(root, LOCK), "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      if not wait:
        raise RetryError(f"{root} is being prepared by another process; try again when it is done"
                         ) from error
      log(f"waiting for another process that prepares {root}")
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


@contextlib.contextmanager
def _disk_errors(root: str) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise DiskError(f"{error.filename or root} cannot be written ({error.strerror}); free space, "
                    "mend its permissions or choose another --root") from error
  except RuntimeError as error:  # how the ArrayRecord library reports a failed write
    if "write() failed" not in str(error) and "open() failed" not in str(error):
      raise
    raise DiskError(f"{root} cannot be written ({error}); free space or choose another --root"
                    ) from error


def _version(package: str) -> str:
  if package == "python":
    return platform.python_version()
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "unknown"


def _summary(manifest: dict) -> str:
  counts = [f"{name} {sum(entry['records'].values())} records"
            for name, entry in manifest["sources"].items()]
  return ", ".join([*counts, f"{manifest['request']['vocab_size']} tokens"])
