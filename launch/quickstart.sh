#!/usr/bin/env bash
# Trains and measures a small vision-language model on real data, from nothing.
#
#   bash launch/quickstart.sh                        the whole run
#   bash launch/quickstart.sh debug                  the same path in a minute, numbers mean nothing
#   bash launch/quickstart.sh configs/llava.py:debug another recipe
#
# Makes .venv/quickstart (once), prepares the data below data/ (once), trains below runs/, and ends
# with one line of JSON on standard output. Interrupted, the same command continues.

. "$(dirname "$0")/env.sh"

python=${PYTHON:-$(find_python 11 12 13)} ||
  die "no Python 3.11, 3.12 or 3.13 found; install one, or set PYTHON to its path"
make_env quickstart quickstart "$python" -c constraints.txt
exec .venv/quickstart/bin/vlm-jax quickstart "$@"
