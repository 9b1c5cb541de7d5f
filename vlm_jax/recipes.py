"""Recipes: Python files with `get_config(arg)`, found in a checkout and in an installed wheel.

A recipe is code, and runs. It may set the fields of `configs/base.py` and no others.
"""

import importlib.util
import traceback
from pathlib import Path

from ml_collections import ConfigDict

from vlm_jax.configs import base
from vlm_jax.core.errors import UsageError, UserError, nearest

FOLDER = Path(base.__file__).parent
NO_RECIPES = ("base.py", "older.py")


def find_recipe(path: str) -> Path:
  """A recipe's file: the path itself, or `configs/NAME.py` inside the installed package.

  Raises:
    UsageError: there is no such file; names the nearest recipe.
  """
  file = Path(path)
  if file.is_file():
    return file
  inside = FOLDER / Path(*file.parts[1:]) if file.parts[:1] == ("configs",) else None
  if inside is not None and inside.is_file():
    return inside
  known = [f"configs/{recipe.name}" for recipe in FOLDER.glob("[!_]*.py")
           if recipe.name not in NO_RECIPES]
  raise UsageError(f"--config: no file '{path}'; {nearest(path, known)}")


def split(spec: str) -> tuple[str, str]:
  """File and argument of "path/to/file.py:arg"; the argument may have colons of its own."""
  path, colon, arg = spec.partition(".py:")
  return (f"{path}.py", arg) if colon else (spec, "")


def load(spec: str) -> ConfigDict:
  """Runs the recipe "path/to/file.py:arg" and checks that it added no field.

  Raises:
    UsageError: no such file, the recipe fails, or it sets a field that does not exist.
  """
  path, arg = split(spec)
  file = find_recipe(path)
  try:
    module_spec = importlib.util.spec_from_file_location("vlm_jax_recipe", file)
    if module_spec is None or module_spec.loader is None:
      raise UsageError(f"--config: '{path}' is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
      raise UsageError(f"--config: {path} has no function get_config(arg)")
    config = module.get_config(arg)
  except UserError:
    raise
  except Exception as error:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == str(file)]
    where = getattr(error, "lineno", None) or (lines[-1] if lines else "?")
    raise UsageError(f"--config: {path} line {where}: {type(error).__name__}: {error}") from error
  check(config, path)
  return config


def check(config: ConfigDict, path: str) -> None:
  """Refuses fields that `configs/base.py` does not have: nobody would ever read them."""
  models = base.entries()

  def walk(node: ConfigDict, model: ConfigDict, prefix: str) -> None:
    if prefix == "fusion.objectives":
      return
    for name, value in node.items(preserve_field_references=False):
      field = f"{prefix}.{name}" if prefix else name
      if prefix in models:
        walk(value, models[prefix], field)
      elif name not in model:
        raise UsageError(f"--config: {path} sets config.{field}, which does not exist; "
                         f"{nearest(name, model.keys())}")
      elif isinstance(value, ConfigDict):
        walk(value, model[name], field)

  walk(config, base.get_config(), "")
