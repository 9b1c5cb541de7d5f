"""The notebooks run from their first cell to their last, and are what their sources say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
COLABS = ROOT / "colabs"
# What is shortened: parameters of the notebooks, `NAME = value  # @param`.
SHORT = {
  "01_quickstart": {"RECIPE": '"configs/quickstart.py:debug"'},
  "02_your_data": {"STEPS": "3"},
  "03_real_weights": {"STEPS": "3"},
}
# A process of its own, in which transformers may import torchvision.
RUN = """
import runpy
from tests import torchvision_cpu
torchvision_cpu.install()
runpy.run_path("notebook.py", run_name="__main__")
"""


def test_every_notebook_is_here():
  assert {path.stem for path in COLABS.glob("*.py")} == set(SHORT)


@pytest.mark.parametrize("name", SHORT)
def test_the_notebook_is_made_of_its_source(name):
  """`jupytext --to ipynb colabs/*.py` makes them again."""
  source = jupytext.read(COLABS / f"{name}.py")
  notebook = nbformat.read(COLABS / f"{name}.ipynb", as_version=4)
  cells = lambda book: [(cell.cell_type, cell.source) for cell in book.cells]
  assert cells(notebook) == cells(source)
  assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.parametrize("name", SHORT)
def test_runs(name, root, tmp_path):
  text = (COLABS / f"{name}.py").read_text()
  for parameter, value in SHORT[name].items():
    text, count = re.subn(rf"^{parameter} = .*?(?=  # @param)", f"{parameter} = {value}", text,
                          flags=re.MULTILINE)
    assert count == 1, f"{name} has no parameter {parameter}"
  (tmp_path / "notebook.py").write_text(text)
  if name == "01_quickstart":
    (tmp_path / "data").symlink_to(root)
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run([sys.executable, "-c", RUN], cwd=tmp_path, text=True, check=False,
                        capture_output=True, env=environment)
  assert done.returncode == 0, done.stderr[-3000:]
  assert "expected minutes" in done.stdout
  expected = {"01_quickstart": r"\(should be", "02_your_data": "perplexity per token of what",
              # Three that say the same: the run, transformers, and programs without either.
              "03_real_weights": r"transformers said (\[\d.*\])\nthe same tokens: True\n(.*\n)*"
                                 r"the programs said \1\n"}[name]
  assert re.search(expected, done.stdout), done.stdout[-2000:]
  assert Path(tmp_path / "picture.png").exists()
