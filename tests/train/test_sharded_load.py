"""A checkpoint is loaded onto eight devices: each holds its part, and nothing holds all of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def loaded(folder, name):
  done = subprocess.run(
    [sys.executable, Path(__file__).with_name("sharded_load.py"), folder, name],
    capture_output=True, text=True, timeout=3000)
  assert done.returncode == 0, done.stderr[-3000:]
  size, spread, alone, lifted = json.loads(done.stdout.splitlines()[-1])
  print(f"{name}: {size / 1e9:.2f} GB, a device holds {spread:.3f} of it, memory rose by "
        f"{lifted / 1e9:.2f} GB")
  assert alone == 1  # the twin
  return size, spread, lifted


def test_every_device_holds_its_part(tmp_path):
  _, spread, _ = loaded(tmp_path, "small")
  assert spread < 0.16  # small models have more that is not split


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_a_billion_parameters_take_one_copy(tmp_path):
  size, spread, lifted = loaded(tmp_path, "1B")
  assert size > 2e9 and spread < 0.13
  assert size / 2 < lifted < 1.35 * size
