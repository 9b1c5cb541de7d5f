"""Text files and directories that are written whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from vlm_jax.core.errors import DataError, DiskError, UsageError


def write_atomically(path: str | Path, text: str) -> None:
  """Replaces a file: after a crash or on a full disk it is the old or the new one, never a half.

  Args:
    path: the file; its folder is made.
    text: what it is to hold, in UTF-8.

  Raises:
    DiskError: it cannot be written; nothing of the new one is left behind.
  """
  path = Path(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}")  # of this process alone
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, path)
    except BaseException:
      temporary.unlink(missing_ok=True)
      raise
  except OSError as error:
    reason = f"{path.parent} is no directory" if isinstance(error, FileExistsError) else (
      error.strerror)
    raise DiskError(f"{path} cannot be written ({reason}); free space, mend its permissions or "
                    "choose another place") from error


def copy(path: str | Path, folder: str | Path) -> None:
  """Copies a file into a folder that is there.

  Raises:
    DataError: it cannot be read.
    DiskError: it cannot be written; nothing is left behind.
  """
  target = Path(folder) / Path(path).name
  try:
    content = Path(path).read_bytes()
  except OSError as error:
    raise DataError(f"{path} cannot be read ({error.strerror}); mend its permissions or get it "
                    "again") from error
  try:
    target.write_bytes(content)
  except OSError as error:
    with contextlib.suppress(OSError):
      target.unlink(missing_ok=True)
    raise DiskError(f"{target} cannot be written ({error.strerror}); free space, mend its "
                    "permissions or choose another place") from error


@contextlib.contextmanager
def new_directory(path: str | Path, field: str = "--out") -> Iterator[Path]:
  """A directory that appears under its name only when all of it is written.

  Args:
    path: must be missing or empty.
    field: the flag or field that names it.

  Yields:
    The directory to write into, beside it.

  Raises:
    UsageError: there is something already.
    DiskError: it cannot be made, or an operating system's error while it was written; nothing is
      left behind.
  """
  path = Path(path).absolute()
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise UsageError(f"{field} {path} holds something already; name a new directory")
  partial = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir()
    yield partial
    os.replace(partial, path)
  except OSError as error:
    raise DiskError(f"{field} {path} cannot be written ({error.strerror or error}); free space, "
                    "mend its permissions or choose another place") from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)
