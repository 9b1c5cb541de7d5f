"""launch/env.sh with stand-ins for python and pip: nothing is installed, no network is touched."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A python that makes "environments" whose pip writes down its arguments and does as it is told.
PYTHON = f"""#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
  mkdir -p "$3/bin"
  cat > "$3/bin/pip" <<'PIP'
#!/bin/sh
echo "$@" >> calls
[ -f broken ] && {{ echo "ERROR: no such package"; exit 1; }}
i=0; while [ $i -lt 25 ]; do echo "Collecting p$i"; i=$((i + 1)); done
PIP
  chmod +x "$3/bin/pip"
  exit
fi
exec {sys.executable} "$@"
"""


@pytest.fixture
def checkout(tmp_path):
  shutil.copytree(ROOT / "launch", tmp_path / "launch")
  for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
    shutil.copy(ROOT / name, tmp_path)
  fake = tmp_path / "bin" / "python"
  fake.parent.mkdir()
  fake.write_text(PYTHON)
  fake.chmod(0o755)
  return tmp_path


def sh(checkout: Path, script: str, **env) -> subprocess.CompletedProcess:
  return subprocess.run(["bash", "-c", f". launch/env.sh; {script}"], cwd=checkout, text=True,
                        capture_output=True, timeout=300, env={**os.environ, **env})


MAKE = 'make_env quick quickstart "$PWD/bin/python" -c constraints.txt'


def calls(checkout: Path) -> list[str]:
  path = checkout / "calls"
  return path.read_text().splitlines() if path.exists() else []


def test_an_environment_is_made_once(checkout):
  done = sh(checkout, MAKE)
  assert done.returncode == 0, done.stderr
  assert "20 packages found" in done.stderr and "ready after" in done.stderr
  assert calls(checkout) == ["install --disable-pip-version-check --progress-bar off "
                             "-c constraints.txt -e .[quickstart]"]
  again = sh(checkout, MAKE)
  assert "up to date" in again.stderr and len(calls(checkout)) == 1
  with (checkout / "constraints.txt").open("a") as file:
    file.write("# changed\n")
  assert sh(checkout, MAKE).returncode == 0 and len(calls(checkout)) == 2


def test_a_failed_install_is_an_error_and_is_tried_again(checkout):
  (checkout / "broken").touch()
  failed = sh(checkout, MAKE)
  assert failed.returncode == 1
  assert "ERROR: no such package" in failed.stderr
  assert "error: pip could not install .[quickstart]; the whole log is" in failed.stderr
  (checkout / "broken").unlink()
  assert sh(checkout, MAKE).returncode == 0 and len(calls(checkout)) == 2


def test_a_python_that_does_not_start_is_passed_over(checkout):
  shim = checkout / "bin" / "python3.11"
  shim.write_text("#!/bin/sh\necho 'not switched on' >&2\nexit 127\n")
  shim.chmod(0o755)
  minor = sys.version_info.minor
  path = f"{checkout}/bin:{os.environ['PATH']}:{Path(sys.executable).parent}"
  found = sh(checkout, f"find_python 11 {minor}", PATH=path)
  assert found.returncode == 0 and found.stdout.strip() != str(shim)
  assert sh(checkout, "find_python 3", PATH=path).returncode == 1


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "launch").glob("*.sh")))
def test_scripts_parse(script):
  subprocess.run(["bash", "-n", str(ROOT / "launch" / script)], check=True, timeout=10)
