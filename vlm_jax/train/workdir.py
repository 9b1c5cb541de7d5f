"""The directory of a run: one owner at a time, one config since its first step, and enough to
continue it.

config.json    the frozen config          metrics.jsonl  numbers that are functions of the config
command.txt    one line per start         timing.jsonl   numbers that are not
env.json       versions, devices, commit  checkpoints/   events.*  evals/  predictions/  LOCK
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import jax
from ml_collections import ConfigDict

from vlm_jax.core.errors import DiskError, RetryError, UsageError
from vlm_jax.core.writing import write_atomically

# What may change between two starts of one run: nothing the data or the arithmetic depend on.
# Another mesh only rounds differently, and a run must go on with the devices that are left.
FREE = ("data.workers", "data.prefetch", "train.log_every", "train.compilation_cache", "train.keep",
        "train.trackers", "profile", "mesh.data", "mesh.fsdp", "mesh.tensor")
# Adds the fields of now that the config of a file lacks, see `configs/older.py`.
Fill = Callable[[ConfigDict, str], Any]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Workdir:
  """An open run directory; use as a context manager, the lock is given back at the end.

  In a job of many hosts all of them share the directory and the first one holds the lock.

  Args:
    path: the directory.
    config: every field.
    fill: what makes the config of a run of an older version comparable; None: nothing is lacking.

  Raises:
    DiskError: the directory cannot be made or written.
    RetryError: another process holds it.
    UsageError: it belongs to a run with a different config, or as `fill`.
  """

  def __init__(self, path: str | Path, config: ConfigDict, fill: Fill | None = None):
    self.path = Path(path).absolute()
    self._lock = None
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      if jax.process_index() == 0:
        self._lock = lock(self.path / "LOCK")
    except OSError as error:
      raise _disk_error(self.path, error) from error
    try:
      self._freeze(config, fill)
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> "Workdir":
    return self

  def __exit__(self, *error) -> None:
    self.close()

  def close(self) -> None:
    """Gives the lock back."""
    if self._lock is not None:
      self._lock.close()
      self._lock = None

  def _freeze(self, config: ConfigDict, fill: Fill | None) -> None:
    path = self.path / "config.json"
    if path.exists() and self._begun():
      frozen = load_config(self.path, outside=config.outside)
      if fill is not None:
        fill(frozen, str(path))
      refuse_changes(frozen, config, self.path)
    elif jax.process_index() == 0:
      if not path.exists() and (self.path / "checkpoints").exists():
        raise UsageError(f"{self.path} has checkpoints but no config.json; put its config.json "
                         "back or choose a new --workdir")
      write_atomically(path, config.to_json(indent=2, sort_keys=True) + "\n")
    if jax.process_index() == 0:
      try:
        with open(self.path / "command.txt", "a") as file:
          file.write(shlex.join(sys.argv) + "\n")
        write_atomically(self.path / "env.json", json.dumps(environment(), indent=2) + "\n")
      except OSError as error:
        raise _disk_error(self.path, error) from error

  def _begun(self) -> bool:
    """Whether there is anything of a config; a start that found no data leaves nothing."""
    metrics = self.path / "metrics.jsonl"
    saved = any(entry.name[0].isdigit() for entry in self.path.glob("checkpoints/*"))
    return saved or metrics.exists() and metrics.stat().st_size > 0


def load_config(workdir: str | Path, outside: bool = False) -> ConfigDict:
  """The frozen config of a run directory.

  Args:
    workdir: the run directory.
    outside: whether it may name modules outside vlm_jax (they run code).

  Raises:
    UsageError: there is no readable config.json.
  """
  path = Path(workdir) / "config.json"
  try:
    fields = json.loads(path.read_text())
    if not isinstance(fields, dict):
      raise ValueError("it holds no fields")
    config = ConfigDict(_tuples(fields))
  except FileNotFoundError as error:
    raise UsageError(f"{path} does not exist; --workdir must be the directory of a run") from error
  except ValueError as error:
    raise UsageError(f"{path} is no config ({error}); restore it or choose a new "
                     "--workdir") from error
  config.outside = outside
  return config


def refuse_changes(frozen: ConfigDict, config: ConfigDict, workdir: Path) -> None:
  """Raises UsageError naming the fields in which the config of a started run was changed."""
  old, new = _fields(frozen), _fields(config)
  changed = [
    f"{name} ({old.get(name, 'absent')!r} -> {new.get(name, 'absent')!r})"
    for name in sorted(old.keys() | new.keys())
    if name not in FREE and old.get(name, "absent") != new.get(name, "absent")
  ]
  if changed:
    raise UsageError(f"{workdir} belongs to a run with another config, which differs in "
                     f"{', '.join(changed)}; undo the change or choose a new --workdir")


def environment() -> dict[str, Any]:
  """Versions, devices and the commit of the code, as far as they can be known."""
  command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
  try:
    commit = subprocess.run(command, capture_output=True, text=True, timeout=5,
                            check=True).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    commit = None  # not a checkout
  return {
    "python": platform.python_version(),
    "platform": platform.platform(),
    "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    "processes": jax.process_count(),
    "devices": [device.device_kind for device in jax.devices()],
    "commit": commit,
  }


def lock(path: Path) -> TextIO:
  """Takes the lock of a run directory; closing the file, or the process, gives it back.

  Raises:
    RetryError: another process holds it.
  """
  file = open(path, "a+")
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    file.seek(0)
    owner = file.read().strip() or "unknown"
    file.close()
    raise RetryError(f"{path.parent} is in use by process {owner}; wait until it ends or choose "
                     "another --workdir") from error
  file.truncate(0)
  file.write(str(os.getpid()))
  file.flush()
  return file


def _disk_error(path: Path, error: OSError) -> DiskError:
  return DiskError(f"--workdir {path} cannot be written ({error.strerror}); free space, mend its "
                   "permissions or choose another directory")


def _tuples(value: Any) -> Any:
  # JSON has no tuples, and every sequence of a config is one.
  if isinstance(value, dict):
    return {key: _tuples(item) for key, item in value.items()}
  return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _fields(config: ConfigDict) -> dict[str, Any]:
  flat: dict[str, Any] = {}

  def visit(prefix: str, value: Any) -> None:
    if isinstance(value, dict) and value:
      for key, item in value.items():
        visit(f"{prefix}.{key}" if prefix else key, item)
    else:
      flat[prefix] = value

  visit("", _tuples(json.loads(config.to_json())))
  return flat
