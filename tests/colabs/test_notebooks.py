"""The notebooks run from their first cell to their last, and are what their sources say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

from tests.data.conftest import ROOT, root  # noqa: F401 (the prepared data, a fixture)

COLABS = ROOT / "colabs"
# What is shortened: parameters of the notebooks, `NAME = value  # @param`.
SHORT = {
  "01_quickstart": {"RECIPE": '"configs/quickstart.py:debug"'},
  "02_your_data": {"STEPS": "3"},
}


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
def test_runs(name, root, tmp_path):  # noqa: F811
  text = (COLABS / f"{name}.py").read_text()
  for parameter, value in SHORT[name].items():
    text, count = re.subn(rf"^{parameter} = .*?(?=  # @param)", f"{parameter} = {value}", text,
                          flags=re.MULTILINE)
    assert count == 1, f"{name} has no parameter {parameter}"
  (tmp_path / "notebook.py").write_text(text)
  if name == "01_quickstart":
    (tmp_path / "data").symlink_to(root)
  done = subprocess.run([sys.executable, "notebook.py"], cwd=tmp_path, text=True, check=False,
                        capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
  assert done.returncode == 0, done.stderr[-3000:]
  assert "expected minutes" in done.stdout
  expected = {"01_quickstart": "(should be", "02_your_data": "perplexity per token of what"}[name]
  assert expected in done.stdout, done.stdout[-2000:]
  assert Path(tmp_path / "picture.png").exists()
