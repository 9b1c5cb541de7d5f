"""SIGTERM and Ctrl-C: finish the step or the batch of an evaluation, save, leave with a code.

The second one leaves at once.
"""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from vlm_jax.core import errors


class Signals:
  """Remembers the first SIGTERM or SIGINT while the block runs.

  Outside the main thread Python cannot install handlers; then nothing is ever remembered.
  """

  def __init__(self):
    self.received: int | None = None
    self._event = threading.Event()
    self._old: dict[int, Any] = {}

  def __enter__(self) -> "Signals":
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._old[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *error) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _handle(self, number: int, frame: Any) -> None:
    del frame
    if self.received is not None:
      os.write(2, b"\nvlm-jax: second signal, leaving at once\n")
      os._exit(code(number))
    self.received = number
    self._event.set()
    name = signal.Signals(number).name
    line = (f"\nvlm-jax: {name}: finishing the step, or the batch of an evaluation, and saving "
            "(again: leave at once)\n")
    os.write(2, line.encode())

  def check(self, message: str) -> None:
    """Raises Interrupted with `message` when a signal came."""
    if self.received is not None:
      name = signal.Signals(self.received).name
      raise errors.Interrupted(f"{name}: {message}", code(self.received))

  def run(self, work: Callable[[], Any], message: str) -> Any:
    """Runs `work` in a thread and raises Interrupted as soon as a signal comes.

    Compilation is one long call that no Python signal handler can enter, so it must not block the
    main thread.
    """
    result: dict[str, Any] = {}

    def target() -> None:
      try:
        result["value"] = work()
      except BaseException as error:  # handed to the main thread below
        result["error"] = error
      finally:
        self._event.set()

    self._event.clear()
    self.check(message)
    thread = threading.Thread(target=target, name="compile", daemon=True)
    thread.start()
    while thread.is_alive() and self.received is None:
      self._event.wait(1.0)
    if self.received is not None and thread.is_alive():
      atexit.register(_leave, thread, code(self.received))
    self.check(message)
    thread.join()
    if "error" in result:
      raise result["error"]
    return result["value"]


def code(number: int) -> int:
  """The exit code of a signal: 130 or 143."""
  return errors.INTERRUPTED if number == signal.SIGINT else errors.TERMINATED


def _leave(thread: threading.Thread, status: int) -> None:
  # The compiler cannot be cancelled, and tearing the interpreter down under it crashes: nothing is
  # open any more, so the process may simply end.
  if thread.is_alive():
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
