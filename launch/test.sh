#!/usr/bin/env bash
# Lints and tests in an environment of its own.
#
#   bash launch/test.sh              lint, the suite, and a smoke with the newest JAX
#   bash launch/test.sh --full       the suite with the tests marked `long`, programs optimized
#   bash launch/test.sh tests/core   arguments go to pytest; the smoke is left out
#
# The smoke needs a Python >= 3.12; without one a line says so, and with CI=true that is an error.

. "$(dirname "$0")/env.sh"

python=${PYTHON:-$(find_python 11 12 13)} ||
  die "no Python 3.11, 3.12 or 3.13 found; install one, or set PYTHON to its path"
make_env test test "$python" -c constraints.txt
bin=.venv/test/bin
# The environment has libtpu, which compiles for TPUs; nothing shall look for a TPU to run on.
export JAX_PLATFORMS=cpu

say "lint"
"$bin/ruff" check .
say "tests"
# A process a core: compiling, most of the time, uses one. Files stay whole, they share programs.
# One that crashes ends the run: restarted, it is waited for without end.
# XLA's older emitters compile for CPUs much sooner. The pinned version knows them; no other has to,
# and --full takes those that users get.
case " $* " in
  *" --full "*) flags=${XLA_FLAGS:-} ;;
  *) flags="--xla_cpu_use_fusion_emitters=false ${XLA_FLAGS:-}" ;;
esac
XLA_FLAGS=$flags "$bin/python" -m pytest -n auto --dist loadfile --max-worker-restart 0 "$@"

if [ $# -gt 0 ] && [ "$*" != "--full" ]; then
  exit 0
fi
# Only the ranges of setup.cfg bind here: this is what somebody gets who installs without our pins.
if python=$(find_python 12 13 14); then
  make_env smoke smoke "$python"
  say "smoke with the newest JAX: $(.venv/smoke/bin/pip list 2>/dev/null |
    awk '$1 ~ /^(jax|flax|optax|grain|orbax-checkpoint)$/ { printf "%s %s  ", $1, $2 }')"
  # tokamax needs this Python too: attention by it is tested here or nowhere.
  .venv/smoke/bin/python -m pytest tests/test_smoke.py tests/ops/test_attention.py -k "smoke or tokamax"
elif [ "${CI:-}" = true ]; then
  die "CI needs a Python >= 3.12 for the smoke with the newest JAX, and found none"
else
  say "no Python >= 3.12 here: the smoke with the newest JAX is left out"
fi
