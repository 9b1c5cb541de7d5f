"""Run by test_program.py in a process of its own, in which nothing but JAX can be imported.

Runs what the README.md of every exported directory says, with the arrays of its `inputs.npz`, and
writes what came out to its `outputs.npz`.
"""

import os
import sys
from pathlib import Path

ABSENT = ("vlm_jax", "flax", "orbax", "transformers", "torch", "tokenizers", "ml_collections")


class Absent:
  """A finder before all others that says none of them is there."""

  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in ABSENT:
      raise ModuleNotFoundError(f"{name} is not here")


def code_of(page, given):
  """The Python of a README.md, reading our inputs and keeping what it would forget."""
  code = page.split("```python\n")[1].split("```")[0]
  for name in set(given) - {"words"}:
    line = next(line for line in code.splitlines() if line.startswith(f"{name} = "))
    code = code.replace(line, f"{name} = given[{name!r}]")
  code = code.replace("+ [] +", "+ given['words'].tolist() +")
  return code.replace("print(", "result = (").replace("state = ", "state = kept[len(kept)] = ")


def run(folder):
  given = dict(np.load(folder / "inputs.npz"))
  names = {"given": given, "kept": {}}
  os.chdir(folder)
  exec(code_of((folder / "README.md").read_text(), given), names)
  out = {"result": np.asarray(names["result"])}
  if names["kept"]:
    out["logits"] = np.stack([each[0][0] for each in names["kept"].values()])
    params = names["params"]
    path = next(path for path in params if path.startswith("llm/") and path.endswith("norm/scale"))
    twin = params | {path: params[path] * 1.5}
    pixels = (given["pixels"],) if "pixels" in given else ()
    length = np.array([len(names["prompt"])], np.int32)
    out["twin"] = names["prefill"](twin, *pixels, names["tokens"], length)[0][0]
  np.savez(folder / "outputs.npz", **out)


if __name__ == "__main__":
  sys.meta_path.insert(0, Absent())
  import numpy as np

  for each in sys.argv[1:]:
    run(Path(each).absolute())
  assert not [name for name in ABSENT if name in sys.modules]
