#!/usr/bin/env bash
# Trains published pieces, EfficientNet-Lite0 and SmolLM2-135M, to one LLaVA, and measures it.
#
#   bash launch/llava_smollm2.sh          both stages and the evaluation
#   bash launch/llava_smollm2.sh debug    the same path in a minute, numbers mean nothing
#
# Makes .venv/quickstart (once), fetches the weights and prepares the data (once), trains the
# connector, then connector and adapters, below runs/, and ends with one line of JSON on standard
# output. Interrupted, the same command continues.

. "$(dirname "$0")/env.sh"

case "${1:-}" in
  "") words="" runs=runs/llava_smollm2 ;;
  debug) words=",debug" runs=runs/llava_smollm2-debug ;;
  *) die "'$1' is no argument; use 'debug' or none" ;;
esac
python=${PYTHON:-$(find_python 11 12 13)} ||
  die "no Python 3.11, 3.12 or 3.13 found; install one, or set PYTHON to its path"
make_env quickstart quickstart "$python" -c constraints.txt
vlm_jax=.venv/quickstart/bin/vlm-jax
recipe=configs/llava_smollm2.py

"$vlm_jax" data prepare --config="$recipe:connector$words" >&2
"$vlm_jax" train --config="$recipe:connector$words" --workdir="$runs/connector" >&2
"$vlm_jax" train --config="$recipe:lora$words" --workdir="$runs/lora" \
  --config.connector.init="$runs/connector" >&2
exec .venv/quickstart/bin/python - "$runs" <<'PYTHON'
import json
import sys
from pathlib import Path

from vlm_jax.evals import run
from vlm_jax.train import trackers

runs = Path(sys.argv[1])
newest = max((runs / "lora" / "evals").glob("*.json"), key=lambda path: int(path.stem))
evals = run.read(newest)[1]
line = {}
for stage in ("connector", "lora"):
  total, last = 0.0, 0
  for row in trackers.read(runs / stage / "timing.jsonl"):
    total += row.get("compile_seconds", 0) + row.get("step_seconds", 0) * (row["step"] - last)
    last = row["step"]
  line[f"{stage}_seconds"] = round(total, 1)
for name in ("easy_vqa", "openmoji"):
  found = evals[name]
  line |= {name: found["accuracy"], f"{name}_interval": [found["low"], found["high"]],
           f"{name}_blind": found["controls"]["none"]["accuracy"]}
print(json.dumps(line | {"workdir": str(runs / "lora")}))
PYTHON
