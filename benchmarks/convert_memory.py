"""What `vlm-jax convert` needs to import a LLaVA-1.5 7B and to export it again: seconds and memory.

  python benchmarks/convert_memory.py [--small] [--folder=DIR]

The source is a checkpoint in bf16 whose files have holes for data, so it is there at once; what is
read, hashed and written is all of it. Each conversion is a process of its own; the peak is the
largest resident memory of that process (VmHWM, so Linux only), files mapped into memory included.
Bar: 4 GiB for 14 GB of parameters. `--small` is 0.1B parameters in a few seconds. Needs free space
for twice the parameters, which is checked first; leaves nothing behind.

The last line is JSON with the keys
  parameters_gb                    size of the parameters in the source
  import_seconds, import_peak_gb   checkpoint to run with --check: every array is read back
  export_seconds, export_peak_gb   run to checkpoint, every array verified first
  bare_peak_gb                     of a process that imports the same modules and converts nothing
"""

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from ml_collections import ConfigDict

from vlm_jax.configs import llava_1_5
from vlm_jax.convert import safetensors_io, systems, table
from vlm_jax.core.pieces import Pieces
from vlm_jax.core.tree import unflatten
from vlm_jax.data import tokenizer

ROOT = Path(__file__).resolve().parents[1]
IMAGE = 31_999
HALF = np.dtype(ml_dtypes.bfloat16)
CODE = """
import sys
from vlm_jax.cli.main import main
import orbax.checkpoint, vlm_jax.convert.parity, vlm_jax.train.loop, vlm_jax.train.checkpoint_tools
code = main(sys.argv[1:]) if sys.argv[1:] else 0
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024)
sys.exit(code)
"""


def shape(small: bool) -> ConfigDict:
  """The recipe of the model."""
  config = llava_1_5.get_config("7b")
  if small:
    config.tower.update(width=256, depth=6, mlp=1024, heads=4)
    config.llm.update(width=768, depth=10, mlp=2048, heads=12, kv_heads=12, head_dim=64)
  return config


def write_source(directory: Path, config: ConfigDict) -> int:
  """Writes the checkpoint of a model whose parameters are holes; returns their bytes."""
  nothing = lambda start, stop: np.zeros(0)
  params = {path: Pieces(size, HALF, nothing, 1) for path, size in systems.shapes(config).items()}
  header, end = {}, 0
  for key, tensor in table.export(unflatten(params), systems.entries(config)).items():
    header[key] = {"dtype": "BF16", "shape": list(tensor.shape),
                   "data_offsets": [end, end + tensor.nbytes]}
    end += tensor.nbytes
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with open(directory / safetensors_io.SINGLE, "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(8 + len(text) + end)
  theirs = systems.converter(config).write_config(config, IMAGE)
  safetensors_io.write_json(directory / "config.json", theirs)
  tokenizer.train(["what is this? a red circle"] * 3, 270).save(str(directory / "tokenizer.json"))
  return end


def convert(*flags: str) -> tuple[float, float]:
  """Seconds and peak GB of one `vlm-jax convert`; without flags of a process that does nothing."""
  began = time.perf_counter()
  done = subprocess.run(
    [sys.executable, "-c", CODE, *(("convert", *flags) if flags else ())], cwd=ROOT, text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, check=True)
  return time.perf_counter() - began, int(done.stdout.splitlines()[-1]) / 1e9


def main() -> None:
  """Imports, exports and prints both."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--small", action="store_true", help="0.1B parameters instead of 7B")
  parser.add_argument("--folder", help="where to write (default: the folder for temporary files)")
  args = parser.parse_args()
  config = shape(args.small)
  size = 2 * sum(int(np.prod(each)) for each in systems.shapes(config).values())
  with tempfile.TemporaryDirectory(dir=args.folder) as name:
    folder = Path(name)
    if (free := shutil.disk_usage(folder).free) < 2 * size:
      sys.exit(f"{folder} has {free / 1e9:.1f} GB free and {2 * size / 1e9:.1f} GB may be needed; "
               "name another --folder, or use --small")
    (folder / "theirs").mkdir()
    result = {"parameters_gb": write_source(folder / "theirs", config) / 1e9}
    _, result["bare_peak_gb"] = convert()
    result["import_seconds"], result["import_peak_gb"] = convert(
      str(folder / "theirs"), "--from=hf", f"--out={folder / 'run'}", "--check",
      "--config=configs/llava_1_5.py")
    shutil.rmtree(folder / "theirs")
    # Not --check: where transformers is installed, it would load the model to compare logits.
    result["export_seconds"], result["export_peak_gb"] = convert(
      str(folder / "run"), "--to=hf", f"--out={folder / 'ours'}")
  for key, value in result.items():
    print(f"{key:16s} {value:8.2f}")
  print(json.dumps(result), flush=True)


if __name__ == "__main__":
  main()
