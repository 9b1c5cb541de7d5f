"""Rows and heads that lie on several devices are attended to where they are."""

import subprocess
import sys
from pathlib import Path


def test_eight_devices():
  script = Path(__file__).with_name("eight_devices.py")
  done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-3000:]
  assert done.stdout.splitlines()[-1] == "ok"
