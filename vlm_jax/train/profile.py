"""`--config.profile=steps:10-15`: a trace of some steps for xprof (`xprof RUN/profile`).

Operations carry the names of what they belong to: tower, connector, llm, loss, optimizer.
"""

import re
from pathlib import Path
from typing import Any

import jax

from vlm_jax.core.errors import UsageError

SPAN = re.compile(r"steps:(\d+)-(\d+)")
FOLDER = "profile"


class Profile:
  """Starts the trace before the first step of a span and ends it behind the last.

  Args:
    spec: `config.profile`, "" for no trace.
    path: the run directory; the trace goes to its `profile/`.

  Raises:
    UsageError: a spec that is not "steps:FIRST-LAST" with 1 <= FIRST <= LAST.
  """

  def __init__(self, spec: str, path: Path):
    self._path, self._open = path / FOLDER, False
    self._first, self._last = span(spec) if spec else (0, 0)

  def before(self, step: int, running: Any) -> None:
    """Called ahead of each step with what the step before it is computing."""
    if not self._open and self._first <= step <= self._last:
      jax.block_until_ready(running)  # not a part of the span
      jax.profiler.start_trace(str(self._path))
      self._open = True

  def after(self, step: int, running: Any) -> None:
    """Called behind each step with what it is computing."""
    if self._open and step >= self._last:
      jax.block_until_ready(running)
      self.close()

  def close(self) -> None:
    """Ends a trace that is still open."""
    if self._open:
      jax.profiler.stop_trace()
      self._open = False


def span(spec: str) -> tuple[int, int]:
  """The first and the last step of "steps:10-15"."""
  match = SPAN.fullmatch(spec)
  first, last = map(int, match.groups()) if match else (0, 0)
  if not 1 <= first <= last:
    raise UsageError(f"config.profile is '{spec}'; write steps:FIRST-LAST, e.g. steps:10-15, "
                     "counted from 1")
  return first, last
