"""Run by test_memory.py in a process of its own: converts there and back, and watches its memory.

Prints JSON: bytes of the parameters, then how far the peak of resident memory was above what a
conversion of nothing much needs, after the import, the export, and an import that holds everything.
"""

import filecmp
import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from tests.convert import tiny_llava
from vlm_jax.cli import main as cli
from vlm_jax.convert import hf_text, safetensors_io, systems, table
from vlm_jax.core import pieces
from vlm_jax.core.pieces import Pieces
from vlm_jax.core.tree import unflatten
from vlm_jax.data.tokenizer import load as load_tokenizer

KIND = np.dtype(np.float32)


def peak():
  """Bytes: the most that was ever resident, mapped files included."""
  lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
  return int(lines["VmHWM"].split()[0]) * 1024


def noise(shape, seed):
  read = lambda start, stop: np.random.default_rng((seed, start)).random(
    (stop - start, *shape[1:]), np.float32)
  return Pieces(shape, KIND, read, pieces.rows(shape, KIND))


def write(folder, depth):
  """A checkpoint of `depth` layers of 67 MB, and the recipe to import it with; its size."""
  config = tiny_llava.get_config(tiny_llava.write_tokenizer(folder))
  config.llm.update(width=1024, mlp=4096, heads=16, kv_heads=16, depth=depth)
  params = {path: noise(shape, seed)
            for seed, (path, shape) in enumerate(systems.shapes(config).items())}
  systems.write(folder / "theirs", config, unflatten(params), image_token=5)
  hf_text.write(folder / "theirs", config, load_tokenizer(config.data.tokenizer))
  (folder / "recipe.py").write_text("from tests.convert.tiny_llava import get_config\n")
  return sum(leaf.nbytes for leaf in params.values())


def convert(folder, source, out, *flags):
  assert cli.main(["convert", str(folder / source), f"--out={folder / out}", *flags]) == 0


def there_and_back(folder):
  """The peaks after the import and after the export."""
  recipe = f"--config={folder / 'recipe.py'}"
  convert(folder, "theirs", "run", "--from=hf", "--check", recipe)
  peaks = [peak()]
  convert(folder, "run", "ours", "--to=hf")
  name = safetensors_io.SINGLE
  assert filecmp.cmp(folder / "theirs" / name, folder / "ours" / name, shallow=False)
  return [*peaks, peak()]


def main(folder):
  for name, depth in (("little", 1), ("much", 9)):
    (folder / name).mkdir()
    size = write(folder / name, depth)
  least = there_and_back(folder / "little")[-1]
  peaks = there_and_back(folder / "much")
  table.open_pieces = lambda *rest: {  # a reader that holds what it reads
    path: pieces.of(leaf) for path, leaf in table.flatten(table.load(*rest)).items()}
  recipe = f"--config={folder / 'much' / 'recipe.py'}"
  convert(folder / "much", "theirs", "held", "--from=hf", recipe)
  print(json.dumps([size, *(each - least for each in (*peaks, peak()))]))


if __name__ == "__main__":
  main(Path(sys.argv[1]))
