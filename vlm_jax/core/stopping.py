"""Long work that may be stopped between two of its batches, whoever runs it.

What is long, an evaluation, says `point` where stopping loses nothing. Who hears meanwhile that it
should stop, training of a signal, runs it inside `stoppable`. What is between them need not know.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

_check: contextvars.ContextVar[Callable[[], None] | None] = contextvars.ContextVar(
  "check", default=None)


@contextlib.contextmanager
def stoppable(check: Callable[[], None]) -> Iterator[None]:
  """While it is open, every `point` calls `check`, which raises to stop the work."""
  token = _check.set(check)
  try:
    yield
  finally:
    _check.reset(token)


def point() -> None:
  """A place to stop; without a check nothing happens."""
  if (check := _check.get()) is not None:
    check()
