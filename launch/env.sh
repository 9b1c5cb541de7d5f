# Shared by the launch scripts (source it): finds a Python, makes an environment once, reuses it.
#
#   PYTHON=/path/to/python   use this interpreter instead of looking for one

set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"

say() { printf '== %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# find_python MINOR...: prints the first interpreter of these 3.MINOR versions that really starts
# (a pyenv shim may exist for a version that is not switched on), in the order given.
find_python() {
  local minor candidate pyenv
  pyenv=$(pyenv root 2>/dev/null || echo "${PYENV_ROOT:-$HOME/.pyenv}")
  for minor in "$@"; do
    for candidate in "python3.$minor" python3 python "$pyenv"/versions/3."$minor".*/bin/python; do
      "$candidate" - "$minor" 2>/dev/null <<'PYTHON' && return 0
import sys, venv
if sys.version_info[:2] != (3, int(sys.argv[1])):
  sys.exit(1)
print(sys.executable)
PYTHON
    done
  done
  return 1
}

# make_env NAME EXTRA PYTHON [pip options...]: leaves an environment in .venv/NAME with this
# checkout installed editable. Nothing is done, and no network touched, when setup.cfg, the pins,
# the interpreter and the place are those of the last time.
make_env() {
  local name=$1 extra=$2 python=$3; shift 3
  local env="$ROOT/.venv/$name" want start=$SECONDS
  want=$({ cat setup.cfg pyproject.toml constraints.txt; echo "$ROOT $extra $*"
           "$python" -VV; } | "$python" -c 'import hashlib, sys
print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
  if [ "$(cat "$env/stamp" 2>/dev/null)" = "$want" ]; then
    say "environment .venv/$name is up to date"
    return
  fi
  say "making .venv/$name with $("$python" -V) (once; needs the network, takes a few minutes)"
  rm -rf "$env"
  mkdir -p "$ROOT/.venv"
  "$python" -m venv "$env" >&2 ||
    die "'$python -m venv' failed; on Debian or Ubuntu install python3-venv, or set PYTHON"
  if ! "$env/bin/pip" install --disable-pip-version-check --progress-bar off "$@" \
      -e ".[$extra]" 2>&1 | tee "$env/install.log" | awk '
        /^Collecting/ { n += 1; if (n % 20 == 0) print "   " n " packages found"; fflush() }
        /^Installing collected/ { print "   installing " n " packages"; fflush() }' >&2; then
    tail -n 15 "$env/install.log" >&2
    die "pip could not install .[$extra]; the whole log is .venv/$name/install.log"
  fi
  printf '%s' "$want" > "$env/stamp"
  say ".venv/$name is ready after $((SECONDS - start)) s"
}
