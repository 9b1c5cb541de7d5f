"""Rules of the whole suite: CPU only, `--full` for long tests, no skip that nobody agreed to.

And what all processes of a run share: prepared data, and a folder of compiled programs.
"""

import fnmatch
import os
import tempfile
from pathlib import Path

# Before any test imports JAX; an accelerator would change timings and numbers.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Workers and the processes that tests start inherit it; it is gone when the first process ends.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  COMPILED = tempfile.TemporaryDirectory(prefix="vlm_jax-", ignore_cleanup_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
  # Reading a program takes some time as well; this is a guess of where compiling it takes longer.
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests import torchvision_cpu

torchvision_cpu.install()

ALLOWED = Path(__file__).parent / "allowed_skips.txt"
MAPPED = Path("/proc/self/maps")  # of Linux alone


@pytest.fixture(scope="module", autouse=True)
def programs():
  """A process keeps what it compiled, some four regions of memory a program; Linux grants 65,530.

  Past them XLA dies of a segmentation fault, after two thousand tests or so.
  """
  options = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = {name: getattr(jax.config, name) for name in options}
  yield
  release(20_000)
  if any(getattr(jax.config, name) != value for name, value in before.items()):  # `train` did
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()


def release(most: int) -> None:
  """Forgets every compiled program once this process maps more regions than `most`."""
  if MAPPED.exists() and MAPPED.read_bytes().count(b"\n") > most:
    jax.clear_caches()


@pytest.fixture
def optimized():
  """For tests that train long enough to be faster with optimized programs."""
  before = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]
  optimize(True)
  yield
  optimize(before == "0")


def optimize(on: bool) -> None:
  """Whether XLA optimizes what this process, and those it starts, compile from here on."""
  os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0" if on else "1"
  jax.config.update("jax_disable_most_optimizations", not on)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
  """The data of the quickstart, as the command prepares it; nobody may change a file of it."""
  from vlm_jax.cli import main as cli

  folder = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    folder = folder.parent  # of all workers: one prepares, the others wait and compare checksums
  path = folder / "prepared"
  assert cli.main(["data", "prepare", f"--root={path}"]) == 0
  return str(path)


def pytest_addoption(parser):
  parser.addoption("--full", action="store_true", help="also run the tests marked `long`")


def pytest_configure(config):
  # Tiny models: without --full compiling is all the time there is, so XLA shall do little of it.
  optimize(config.getoption("--full"))
  config.pluginmanager.register(Skips(read_allowed(ALLOWED.read_text())), "skips")


def pytest_collection_modifyitems(config, items):
  """Without --full, long tests are deselected: they do not count as skipped."""
  if config.getoption("--full"):
    return
  long = [item for item in items if item.get_closest_marker("long")]
  config.hook.pytest_deselected(items=long)
  items[:] = [item for item in items if not item.get_closest_marker("long")]


def read_allowed(text: str) -> list[tuple[str, str]]:
  """Lines "node id pattern | reason pattern" as pairs; '#' starts a comment."""
  lines = [line.split("#")[0].strip() for line in text.splitlines()]
  pairs = [tuple(part.strip() for part in line.split("|")) for line in lines if line]
  for pair in pairs:
    if len(pair) != 2 or not all(pair):
      raise pytest.UsageError(f"{ALLOWED.name}: '{' | '.join(pair)}' is not 'test | reason'")
  return pairs


class Skips:
  """Fails the run when a skipped test is not in `allowed_skips.txt` with its reason."""

  def __init__(self, allowed: list[tuple[str, str]]):
    self.allowed = allowed
    self.unexpected: list[str] = []

  def note(self, report):
    if not report.skipped or hasattr(report, "wasxfail"):
      return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not any(fnmatch.fnmatch(report.nodeid, test) and fnmatch.fnmatch(reason, why)
               for test, why in self.allowed):
      self.unexpected.append(f"{report.nodeid} | {reason}")

  def pytest_runtest_logreport(self, report):
    self.note(report)

  def pytest_collectreport(self, report):
    self.note(report)

  @pytest.hookimpl(trylast=True)
  def pytest_sessionfinish(self, session):
    if self.unexpected and session.exitstatus == 0:
      session.exitstatus = 1

  def pytest_terminal_summary(self, terminalreporter):
    for line in self.unexpected:
      terminalreporter.write_line(f"SKIP NOT ALLOWED (see tests/{ALLOWED.name}): {line}", red=True)
