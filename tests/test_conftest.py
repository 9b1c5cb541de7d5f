"""The rule about skips is itself tested: a skip that is not listed fails the run."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tests.conftest import MAPPED, read_allowed, release

ROOT = Path(__file__).parent.parent


def run(folder: Path, body: str, *args: str, allowed: str = "") -> subprocess.CompletedProcess:
  tests = folder / "tests"
  tests.mkdir()
  for name in ("conftest.py", "torchvision_cpu.py"):
    (tests / name).write_text((ROOT / "tests" / name).read_text())
  (tests / "allowed_skips.txt").write_text(allowed)
  (tests / "test_x.py").write_text("import pytest\n" + body)
  (folder / "setup.cfg").write_text("[tool:pytest]\nmarkers =\n  long: x\n")
  return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args],
                        cwd=folder, capture_output=True, text=True, timeout=300)


SKIP = "def test_a():\n  pytest.skip('no cat')\ndef test_b():\n  pass\n"


def test_unlisted_skip_fails(tmp_path):
  done = run(tmp_path, SKIP)
  assert done.returncode == 1 and "tests/test_x.py::test_a | no cat" in done.stdout, done.stdout


def test_listed_skip_passes_only_with_its_reason(tmp_path):
  for index, (allowed, code) in enumerate({"*test_a | no c*": 0, "*test_a | no dog": 1}.items()):
    folder = tmp_path / str(index)
    folder.mkdir()
    assert run(folder, SKIP, allowed=allowed).returncode == code


def test_long_is_deselected_not_skipped(tmp_path):
  body = "@pytest.mark.long\ndef test_a():\n  assert 0\ndef test_b():\n  pass\n"
  done = run(tmp_path, body)
  assert done.returncode == 0 and "1 deselected" in done.stdout
  (tmp_path / "full").mkdir()
  assert run(tmp_path / "full", body, "--full").returncode == 1


def test_malformed_line_is_refused():
  with pytest.raises(pytest.UsageError, match="not 'test"):
    read_allowed("tests/test_x.py")


@pytest.mark.skipif(not MAPPED.exists(), reason="no /proc/self/maps")
def test_compiled_programs_are_released():
  regions = lambda: MAPPED.read_bytes().count(b"\n")
  functions = [jax.jit(lambda x, i=i: jnp.tanh(x * i)) for i in range(40)]
  jax.block_until_ready([function(jnp.ones(4)) for function in functions])
  kept = regions()
  release(kept)
  assert regions() >= kept
  release(0)
  assert regions() < kept - 40
