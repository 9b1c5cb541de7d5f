"""The rules of the house (who may import whom, how big a file may be) hold in every file."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_jax.configs import base
from vlm_jax.core import fusion
from vlm_jax.core.errors import UsageError

PACKAGE = Path(fusion.__file__).parent.parent
FILES = sorted(PACKAGE.rglob("*.py"))
# Floors from the ground up; on one floor, imports go to the left only.
FLOORS = [
  ["core"],
  ["ops", "data"],
  ["nn"],
  ["towers", "connectors", "llm"],
  ["fusion"],
  ["convert", "generate", "evals", "train"],
  ["configs", "recipes", "runs", "bundle", "report", "quickstart", "cli"],
]
LINEN = {"nn", "towers", "connectors", "llm", "fusion"}
FORBIDDEN = {"torch", "torchvision", "transformers", "pickle", "dill", "joblib"}
PARITY = "convert/parity.py"  # `vlm-jax convert --check` alone compares with what is installed
MAX_LINES, MAX_FUNCTION = 420, 75
LOOP, MAX_LOOP = "train/loop.py", 300


def home(path: Path) -> str:
  """The folder (or file) directly below the package that a file belongs to."""
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rank(name: str) -> tuple[int, int]:
  for floor, names in enumerate(FLOORS):
    if name in names:
      return floor, names.index(name)
  raise AssertionError(f"vlm_jax/{name} is on no floor: add it to FLOORS")


def imports(tree: ast.AST) -> list[str]:
  """Full names of all that a file imports, also inside functions and by importlib on a literal."""
  names = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "relative imports hide which floor is meant"
      names += [f"{node.module}.{alias.name}" for alias in node.names]
    elif (isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module"
          and node.args and isinstance(node.args[0], ast.Constant)):
      names.append(node.args[0].value)
  return names


def violations(source: str, name: str) -> list[str]:
  """What a file of vlm_jax/`name` imports that it must not."""
  found = []
  for imported in imports(ast.parse(source)):
    parts = imported.split(".")
    if parts[0] in FORBIDDEN:
      found.append(f"imports {imported}: not outside tests and benchmarks")
    if imported.startswith("flax.linen") and name not in LINEN:
      found.append(f"imports {imported}: only floors 2 to 4 do")
    if parts[0] == "flax" and parts[1:2] == ["nnx"]:
      found.append(f"imports {imported}: Linen is the only module system")
    if parts[0] != "vlm_jax" or parts[1:2] in ([], ["__version__"]) or parts[1] == name:
      continue
    if rank(parts[1]) > rank(name):
      found.append(f"imports {imported}: up, or to the right on the same floor")
  return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file(path):
  source = path.read_text()
  tree = ast.parse(source)
  name = home(path)
  if name not in ("__init__", "__main__"):
    found = violations(source, name)
    if str(path.relative_to(PACKAGE)) == PARITY:
      found = [line for line in found if not line.startswith(("imports torch", "imports transfor"))]
      assert "import torch" not in "".join(source.partition("\ndef ")[:1]), "only inside functions"
    assert not found
  assert ast.get_docstring(tree) or not source.strip(), "no module docstring"
  lines = source.splitlines()
  limit = MAX_LOOP if str(path.relative_to(PACKAGE)) == LOOP else MAX_LINES
  assert len(lines) <= limit, f"{len(lines)} lines: split the file"
  marks = [number for number, line in enumerate(lines, 1) if "TODO" in line or "FIXME" in line]
  assert not marks, f"unfinished business in lines {marks}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_things_have_docstrings_and_functions_are_short(path):
  tree = ast.parse(path.read_text())
  definitions = (ast.FunctionDef, ast.ClassDef)
  for node in tree.body:
    if isinstance(node, definitions) and not node.name.startswith("_"):
      assert ast.get_docstring(node), f"{node.name} has no docstring"
  for node in ast.walk(tree):
    if isinstance(node, ast.FunctionDef):
      length = node.end_lineno - node.lineno + 1
      assert length <= MAX_FUNCTION, f"{node.name} has {length} lines"


@pytest.mark.parametrize("source,name", [
  ("from vlm_jax.train import loop", "core"),
  ("from vlm_jax.data import pack", "ops"),
  ("def f():\n  import vlm_jax.cli.main", "fusion"),
  ("import flax.linen as nn", "train"),
  ("from flax import linen", "data"),
  ("import torch.nn", "convert"),
  ("from flax import nnx", "nn"),
  ("from vlm_jax.llm import llama", "towers"),
  ("import importlib\nimportlib.import_module('vlm_jax.evals')", "generate"),
])
def test_a_broken_rule_is_found(source, name):
  assert violations(source, name)


def test_allowed_imports_pass():
  source = "import jax\nfrom vlm_jax.core import mask\nfrom vlm_jax.ops import rope\nimport flax"
  assert not violations(source, "train")


def modules(floor: str) -> list[str]:
  package = importlib.import_module(f"vlm_jax.{floor}")
  return [info.name for info in pkgutil.iter_modules(package.__path__)
          if not info.name.startswith("_")]


FOUND = [("fusion", "fusion"), ("tower", "towers"), ("connector", "connectors"), ("llm", "llm")]
OFFERS = {
  "fusion": ("Model", "STAGES", "STREAM", "axes", "fields", "rows", "order", "layout", "losses",
             "weights"),
  "tower": ("Model", "grid"),
  "connector": ("Model", "slots"),
  "llm": ("Model", "KIND", "RUNS", "supports"),
}


@pytest.mark.parametrize("kind,floor,name",
                         [(kind, floor, name) for kind, floor in FOUND for name in modules(floor)])
def test_every_module_loads_by_name(kind, floor, name):
  config = base.get_config()
  config[kind].name = name
  module = getattr(fusion, f"find_{kind}")(config)
  assert module.__name__ == f"vlm_jax.{floor}.{name}"
  missing = [offer for offer in OFFERS[kind] if not hasattr(module, offer)]
  assert not missing, f"vlm_jax/{floor}/{name}.py does not offer {missing}"


@pytest.mark.parametrize("kind,floor", FOUND)
def test_unknown_name_lists_what_exists(kind, floor):
  config = base.get_config()
  known = modules(floor)[0]
  config[kind].name = known + "x"
  with pytest.raises(UsageError, match=f"did you mean '{known}'"):
    getattr(fusion, f"find_{kind}")(config)


def test_a_frozen_config_cannot_leave_the_package():
  config = base.get_config()
  config.fusion.name, config.outside = "os.path", False
  with pytest.raises(UsageError, match="outside vlm_jax"):
    fusion.find_fusion(config)


def test_torch_is_never_loaded_by_the_package():
  names = [f"vlm_jax.{module}" for module in ("cli.main", "train", "data", "fusion")]
  code = (f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
          "print([name for name in ('torch', 'transformers', 'jax') if name in sys.modules])")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
                        check=True)
  assert done.stdout.strip() == "[]", "importing the command line must not load heavy packages"


def test_the_readme_lists_every_system_with_an_honest_status():
  text = (PACKAGE.parent / "README.md").read_text()
  table = text.split("## Systems")[1].split("## ")[0]
  rows = [[cell.strip() for cell in line.strip("| ").split("|")]
          for line in table.splitlines() if line.startswith("| ") and line[2].isdigit()]
  assert [row[0] for row in rows] == [str(number) for number in range(1, 48)]
  for row in rows:
    where = [name.strip(" `") for name in row[4].split(",")] if len(row) > 4 and row[4] else []
    assert row[3].split()[0] in ("planned", "works", "parity"), row
    assert bool(where) == (row[3] != "planned"), row
    missing = [name for name in where if not (PACKAGE / name).is_file()]
    assert not missing, f"{row[1]}: {missing}"
