"""What the user reads when something is wrong, and the exit code the shell sees.

A `UserError` is one sentence that names the field or file and the way out. The command line prints
it without a traceback (`--debug` shows one) and exits with its code. Anything else is our bug: 70.
"""

import difflib
from collections.abc import Iterable

OK = 0
USAGE = 2  # wrong flag, unknown field, wrong type, refused workdir
DATA = 65  # bad data above the configured rate, missing or damaged data files
BUG = 70  # an exception that is not a UserError
DISK = 73  # read-only, full or missing directory
RETRY = 75  # another process holds the workdir, a host is missing: try again later
NUMERICS = 76  # loss or gradient is not finite
INTERRUPTED = 130  # Ctrl-C: the step, or the batch of an evaluation, was finished, all is saved
TERMINATED = 143  # SIGTERM: the same


class UserError(Exception):
  """An error the user can mend: the message is one sentence, `code` the exit code."""

  code = USAGE


class UsageError(UserError):
  """A wrong flag, field, type or request."""


class DataError(UserError):
  """Data that cannot be used: missing, damaged, or too much of it bad."""

  code = DATA


class DiskError(UserError):
  """A directory that cannot be written, or a disk that is full."""

  code = DISK


class RetryError(UserError):
  """Something else must finish first; the same command may succeed later."""

  code = RETRY


class NumericsError(UserError):
  """A loss or gradient that is not finite."""

  code = NUMERICS


class Interrupted(UserError):
  """A signal asked the run to stop, and everything was saved first."""

  def __init__(self, message: str, code: int):
    super().__init__(message)
    self.code = code


def nearest(name: str, known: Iterable[str]) -> str:
  """The hint behind an unknown name: the nearest known one if any, then all that exist."""
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=1)
  hint = f"did you mean '{close[0]}'? " if close else ""
  return f"{hint}known: {', '.join(known)}"
