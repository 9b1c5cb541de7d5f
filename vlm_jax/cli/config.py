"""Recipes and flags: `--config=configs/quickstart.py:debug --config.train.steps=100`.

A recipe is a Python file with `get_config(arg)`; it is code, and runs. Fields are changed by flags
of their dotted name, converted to the type the field has.
"""

import argparse
import ast
import importlib.util
import traceback
from pathlib import Path

from ml_collections import ConfigDict

from vlm_jax.configs import base
from vlm_jax.core.errors import UsageError, UserError, nearest

FOLDER = Path(base.__file__).parent
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def argument(parser: argparse.ArgumentParser, required: bool = True) -> None:
  """Adds `--config`; the parser collects `--config.FIELD=VALUE` by itself."""
  parser.add_argument(
    "--config", required=required, metavar="FILE.py[:ARG]",
    help="recipe, with the argument of its get_config; change a field with --config.FIELD=VALUE")


def read(args: argparse.Namespace) -> ConfigDict:
  """The config of `args.config` with `args.overrides` applied, locked."""
  config = load(args.config)
  override(config, args.overrides)
  return config.lock()


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
           if recipe.name != "base.py"]
  raise UsageError(f"--config: no file '{path}'; {nearest(path, known)}")


def load(spec: str) -> ConfigDict:
  """Runs the recipe "path/to/file.py:arg" and checks that it added no field.

  Raises:
    UsageError: no such file, the recipe fails, or it sets a field that does not exist.
  """
  path, colon, arg = spec.rpartition(":")
  if not colon or not path.endswith(".py"):
    path, arg = spec, ""
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


def override(config: ConfigDict, overrides: list[tuple[str, str]]) -> None:
  """Sets fields from text, in order.

  Args:
    config: changed in place.
    overrides: [("train.steps", "100"), ...].

  Raises:
    UsageError: an unknown field (with the nearest name), a group of fields, or the wrong type.
  """
  for field, text in overrides:
    node = config
    *groups, name = field.split(".")
    for depth, group in enumerate(groups):
      node = child(node, group, ".".join(groups[:depth]))
      if not isinstance(node, ConfigDict):
        raise UsageError(f"--config.{field}: config.{'.'.join(groups[: depth + 1])} is a "
                         f"{type(node).__name__}, it has no fields")
    old = child(node, name, ".".join(groups))
    if isinstance(old, ConfigDict):
      raise UsageError(f"--config.{field} is a group of fields; set one of them: "
                       f"{', '.join(sorted(old.keys()))}")
    node[name] = convert(field, old, text)


def child(node: ConfigDict, name: str, prefix: str):
  """The value called `name` of a group; an unknown name is a UsageError with the nearest one."""
  if name not in node:
    where = f"config.{prefix}" if prefix else "config"
    raise UsageError(f"{where} has no field '{name}'; {nearest(name, node.keys())}")
  return node[name]


def convert(field: str, old, text: str):
  """`text` as the type of `old`: bool, int, float, str or tuple; else a UsageError."""
  try:
    if isinstance(old, bool):
      return BOOLEANS[text.lower()]
    if isinstance(old, int | float):
      return type(old)(text)
    if isinstance(old, tuple | list):
      try:
        value = ast.literal_eval(text) if text else ()
      except (ValueError, SyntaxError):
        value = tuple(part.strip() for part in text.split(","))  # names without quotes
      return tuple(value) if isinstance(value, tuple | list) else (value,)
    return text
  except (KeyError, ValueError):
    kind = type(old).__name__
    raise UsageError(f"--config.{field} must be a value of type {kind} (as now: {old}), "
                     f"got '{text}'") from None
