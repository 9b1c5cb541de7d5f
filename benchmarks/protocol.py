"""How every benchmark of this folder measures and reports; the rules are in README.md."""

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

ROUNDS = 7
CONTENDED = 0.15  # relative change of the fixed matmul that voids a run
OTHERS = 0.1  # share of the machine that other processes may use


def seconds(step: Callable[[], object]) -> float:
  """Wall-clock time of one call; `step` must not return before its result is there."""
  start = time.perf_counter()
  step()
  return time.perf_counter() - start


def fixed_matmul() -> float:
  """Median seconds of a 1024 x 1024 f32 product in numpy: how fast the machine is right now."""
  rng = np.random.default_rng(0)
  left, right = rng.standard_normal((2, 1024, 1024), np.float32)
  time.sleep(1)  # pools of threads spin for a while after their last work
  left @ right
  return float(np.median([seconds(lambda: left @ right) for _ in range(15)]))


def cpu_seconds() -> tuple[float, float]:
  """Processor seconds that everybody has used, stolen ones included, and that this group has.

  The group is this process and those it started. Without /proc (macOS) everybody is this process.
  """
  try:
    user, nice, system, _, _, *rest = Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
  except OSError:
    return time.process_time(), time.process_time()
  group = 0
  for path in Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):  # ended meanwhile
      fields = path.read_text().rpartition(")")[2].split()
      if int(fields[2]) == os.getpgrp():
        group += sum(map(int, fields[11:15]))  # its own and those of children that ended
  tick = os.sysconf("SC_CLK_TCK")
  return sum(map(int, (user, nice, system, *rest))) / tick, group / tick


def measure(sides: dict[str, Callable[[], object]], rounds: int = ROUNDS,
            ready: Callable[[str], object] = lambda name: None) -> dict:
  """Runs the sides in turn, `rounds` times, after one call of each that is not counted.

  `ready` is called with a side's name before each of its calls and not timed.

  Returns:
    {"seconds": {side: [one time a round]}, "best": {side: minimum},
     "matmul": [before, after], "others": share of the machine that other processes used,
     "contended": whether the matmuls differ or others used too much}
  """
  for step in sides.values():
    step()
  start, (all_before, own_before) = time.perf_counter(), cpu_seconds()
  before = fixed_matmul()
  times: dict[str, list[float]] = {name: [] for name in sides}
  for _ in range(rounds):
    for name, step in sides.items():
      ready(name)
      times[name].append(seconds(step))
  after = fixed_matmul()
  all_after, own_after = cpu_seconds()
  free = (time.perf_counter() - start) * os.cpu_count()
  others = max(0.0, all_after - all_before - (own_after - own_before)) / free
  return {
    "seconds": times,
    "best": {name: min(values) for name, values in times.items()},
    "matmul": [before, after],
    "others": others,
    "contended": abs(after - before) > CONTENDED * min(before, after) or others > OTHERS,
  }


def ratio(timing: dict, ours: str, theirs: list[str]) -> tuple[float | None, str]:
  """How much faster `ours` is than the fastest of `theirs`, None when contended; and that side."""
  fastest = min(theirs, key=lambda name: timing["best"][name])
  if timing["contended"]:
    return None, fastest
  return timing["best"][fastest] / timing["best"][ours], fastest


def machine() -> dict:
  """What the numbers were measured on."""
  return {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine(),
          "python": platform.python_version()}


def report(header: list[str], rows: list[list[object]], result: dict) -> None:
  """Prints a table and, as the last line, `result` with the machine as one line of JSON."""
  widths = [max(len(_text(row[i])) for row in [header, *rows]) for i in range(len(header))]
  for row in [header, *rows]:
    print(line(row, widths))
  if result.get("contended"):
    print(f"CONTENDED: the fixed matmul changed by more than {CONTENDED:.0%}, or others used more "
          f"than {OTHERS:.0%} of the machine; ratios are void.")
  finish(result)


def line(row: Sequence[object], widths: Sequence[int]) -> str:
  """A row of a table whose columns are so wide."""
  cells = (_text(cell).ljust(width) for cell, width in zip(row, widths, strict=True))
  return "  ".join(cells).rstrip()


def finish(result: dict) -> None:
  """Prints, as the last line, `result` with the machine as one line of JSON."""
  print(json.dumps({**result, "machine": machine()}), flush=True)


def _text(cell: object) -> str:
  if cell is None:
    return "void"
  return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
