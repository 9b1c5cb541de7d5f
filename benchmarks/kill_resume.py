"""Kills a training run with SIGKILL again and again, and compares it with one that nobody touched.

  python benchmarks/kill_resume.py --data=data --kills=30 --workers=0,2

Each third kill comes before the first new checkpoint of a start, inside the write of a checkpoint
(when its temporary directory appears) and at any moment. Compared to the last bit: parameters,
optimizer, position in the data, and the log of losses and batch checksums.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("before a checkpoint", "inside a checkpoint", "any moment")
MARK = "VLM_JAX_KILL_RESUME"  # in the environment of a run's processes: finds those it left behind
TRAIN = "import sys; from vlm_jax.cli.main import main; sys.exit(main())"


class Process:
  """A training process: lines of its output as they come, and its directory."""

  def __init__(self, command: list[str], workdir: Path):
    self.workdir, self.lines = workdir, []
    self._process = subprocess.Popen(
      command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu", MARK: str(workdir)}, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    self._reader = threading.Thread(target=self._read, daemon=True)
    self._reader.start()

  def _read(self) -> None:
    for line in self._process.stdout:
      self.lines.append(line.rstrip())

  @property
  def running(self) -> bool:
    return self._process.poll() is None

  def says(self, start: str, timeout: float = 600) -> bool:
    """Waits for a line with this start; False if the process ends first."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
      if any(line.startswith(start) for line in list(self.lines)):
        return True
      if not self.running:
        self._reader.join(5)
        return any(line.startswith(start) for line in self.lines)
      time.sleep(0.001)
    raise TimeoutError(f"no line '{start}' in {timeout} s: {self.lines}")

  def writing(self) -> bool:
    """Whether a checkpoint is being written at this moment."""
    return any((self.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

  def send(self, number: int) -> None:
    self._process.send_signal(number)

  def wait(self, timeout: float = 600) -> int:
    code = self._process.wait(timeout)
    self._reader.join(5)
    return code


def kill(process: Process, kind: str, rng: random.Random, seconds: float) -> str:
  """Kills a process in the way of `kind`; says what was hit ("" when it had ended already).

  Args:
    process: freshly started.
    kind: one of KINDS.
    rng: where the moments come from.
    seconds: about how long the steps of one start take.
  """
  if kind == "any moment":
    time.sleep(rng.uniform(0, 4))  # imports and compilation too
    if process.says("compiled") and process.running:
      time.sleep(rng.uniform(0, seconds))
  elif process.says("compiled"):
    if kind == "inside a checkpoint":
      wanted = rng.randint(1, 3)
      for _ in range(wanted):
        while process.running and not process.writing():
          time.sleep(0.0005)
        if _ < wanted - 1:
          while process.running and process.writing():
            time.sleep(0.0005)
      time.sleep(rng.uniform(0, 0.02))
    else:
      time.sleep(rng.uniform(0, 0.05))
  if not process.running:
    return ""
  process.send(signal.SIGKILL)
  process.wait()
  steps = [path.name for path in (process.workdir / "checkpoints").glob("[0-9]*")]
  return f"{kind}; writing: {process.writing()}; on disk: {sorted(steps)}"


def run_killed(command: list[str], workdir: Path, kinds: list[str], seed: int,
               seconds: float) -> list[str]:
  """Starts `command` until it ends by itself, killing it once per kind; what was hit each time.

  Raises:
    RuntimeError: the last start did not end with 0.
  """
  rng, hits = random.Random(seed), []
  for kind in kinds:
    process = Process(command, workdir)
    hit = kill(process, kind, rng, seconds)
    if not hit:
      break
    hits.append(hit)
  process = Process(command, workdir)
  if process.wait() != 0:
    raise RuntimeError("\n".join(process.lines))
  return hits


def left_behind(workdir: Path, seconds: float = 10) -> list[int]:
  """Processes of a run that still live (Linux); they get some seconds to notice the kill."""
  mark = f"{MARK}={workdir}\0".encode()
  end = time.monotonic() + seconds
  while True:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
      try:
        if mark in (folder / "environ").read_bytes():
          found.append(int(folder.name))
      except OSError:
        continue  # ended meanwhile, or not ours
    if not found or time.monotonic() > end:
      return found
    time.sleep(0.2)


def differences(one: Path, other: Path) -> list[str]:
  """What two finished runs differ in: log, newest checkpoint's arrays and data position."""
  found = []
  if (one / "metrics.jsonl").read_bytes() != (other / "metrics.jsonl").read_bytes():
    found.append("metrics.jsonl")
  newest = [max((path / "checkpoints").glob("[0-9]*"), key=lambda step: int(step.name))
            for path in (one, other)]
  if newest[0].name != newest[1].name:
    return [*found, "last step"]
  manifest, its = (json.loads((path / "manifest" / "metadata").read_text()) for path in newest)
  for name in sorted(manifest["arrays"].keys() | its["arrays"].keys()):
    if manifest["arrays"].get(name) != its["arrays"].get(name):
      found.append(name)
  if manifest["documents"]["data"] != its["documents"]["data"]:
    found.append("data position")
  return found


def main() -> int:
  """Prints every kill and the verdict; 1 when anything differs."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data", required=True, help="root of `vlm-jax data prepare`")
  parser.add_argument("--config", default="configs/quickstart.py:debug")
  parser.add_argument("--kills", type=int, default=30)
  parser.add_argument("--steps", type=int, default=60)
  parser.add_argument("--workers", default="0,2", help="numbers of loader workers to try")
  parser.add_argument("--seed", type=int, default=int(time.time()))
  args = parser.parse_args()
  print(f"seed {args.seed}", flush=True)
  failed = 0
  with tempfile.TemporaryDirectory() as folder:
    def command(workdir: Path, workers: str) -> list[str]:
      fields = {"data.root": args.data, "data.workers": workers, "train.steps": args.steps,
                "train.log_every": 1, "train.checkpoint_every": 5}
      return [sys.executable, "-c", TRAIN, "train", f"--config={args.config}",
              f"--workdir={workdir}",
              *(f"--config.{name}={value}" for name, value in fields.items())]

    clean = Path(folder) / "clean"
    began = time.monotonic()
    process = Process(command(clean, "0"), clean)
    if process.wait(600) != 0:
      raise RuntimeError("\n".join(process.lines))
    print(f"uninterrupted: {time.monotonic() - began:.1f} s", flush=True)
    rows = [json.loads(line) for line in (clean / "timing.jsonl").read_text().splitlines()]
    seconds = sum(row.get("step_seconds", 0) for row in rows)
    for workers in args.workers.split(","):
      workdir = Path(folder) / f"workers{workers}"
      kinds = [KINDS[number % len(KINDS)] for number in range(args.kills)]
      hits = run_killed(command(workdir, workers), workdir, kinds, args.seed,
                        seconds / max(args.kills, 1))
      for hit in hits:
        print(f"  workers={workers}: killed {hit}")
      found = differences(clean, workdir)
      found += [f"process {number} left behind" for number in left_behind(workdir)]
      inside = sum("writing: True" in hit for hit in hits)
      print(f"workers={workers}: {len(hits)} kills, {inside} inside a checkpoint write; "
            f"{'DIFFERENT: ' + ', '.join(found) if found else 'bit for bit the same'}", flush=True)
      failed += bool(found)
  return min(failed, 1)


if __name__ == "__main__":
  sys.exit(main())
