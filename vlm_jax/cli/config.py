"""Recipes and flags: `--config=configs/quickstart.py:debug --config.train.steps=100`.

The file is `vlm_jax.recipes`' to run. Fields are changed by flags of their dotted name, converted
to the type the field has.
"""

import argparse
import ast
from typing import Any

from ml_collections import ConfigDict

import vlm_jax
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.recipes import load

MODELS = ("run directory, RUN/checkpoints/STEP, recipe FILE.py:ARG, or directory of a Hugging Face "
          "checkpoint")  # what `vlm_jax.load` takes
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def argument(parser: argparse.ArgumentParser, required: bool = True) -> None:
  """Adds `--config`; the parser collects `--config.FIELD=VALUE` by itself."""
  parser.add_argument(
    "--config", required=required, metavar="FILE.py[:ARG]",
    help="recipe, with the argument of its get_config; change a field with --config.FIELD=VALUE")


def model(parser: argparse.ArgumentParser, kinds: str = MODELS) -> None:
  """Adds the flags that name a model to use, of the `kinds` that the command takes."""
  parser.add_argument("--workdir", required=True, help=kinds)
  parser.add_argument("--step", type=int, help="step of the run's checkpoint (default: the newest)")
  parser.add_argument("--root", help="prepared data, if it is not where the config says")
  parser.add_argument("--allow-outside", action="store_true",
                      help="let the frozen config of a run name modules outside vlm_jax; they run "
                           "code")


def answering(parser: argparse.ArgumentParser, most: int) -> None:
  """Adds the flags that say how answers are chosen, and how long they are, `most` by default."""
  parser.add_argument("--max-tokens", type=int, default=most,
                      help=f"an answer is cut there ({most})")
  parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (0)")
  parser.add_argument("--top-p", type=float, default=1.0,
                      help="draw from the most likely tokens with this probability together (1)")
  parser.add_argument("--seed", type=int, default=0, help="of the draws (0)")


def sampling(args: argparse.Namespace) -> Any:
  """The `generate.sampling.Sampling` that the flags of `answering` name."""
  from vlm_jax.generate.sampling import Sampling

  return Sampling(args.temperature, args.top_p, args.seed)


def open_model(args: argparse.Namespace) -> Any:
  """The `vlm_jax.Bundle` that the flags of `model` name."""
  return vlm_jax.load(args.workdir, step=args.step, root=args.root, outside=args.allow_outside)


def read(args: argparse.Namespace) -> ConfigDict:
  """The config of `args.config` with `args.overrides` applied, locked."""
  config = load(args.config)
  override(config, args.overrides)
  return config.lock()


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
