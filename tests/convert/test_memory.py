"""A conversion holds a fraction of what it converts, whatever its size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
  done = subprocess.run([sys.executable, Path(__file__).with_name("memory.py"), tmp_path],
                        capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr
  size, imported, exported, held = json.loads(done.stdout.splitlines()[-1])
  megabytes = [f"{each / 1e6:.0f}" for each in (size, imported, exported, held)]
  print("MB of parameters, and above a conversion of a tenth of them: imported, exported, held:",
        *megabytes)
  assert size > 600e6
  assert max(imported, exported) < 300e6
  assert held > size / 2  # the twin
