"""The console script: finds the subcommand, and turns every error into a sentence and a code.

Nothing heavy is imported here or at the top of a subcommand's file, so `--help` and a wrong flag
answer at once.
"""

import argparse
import errno
import importlib
import os
import sys
import traceback

import vlm_jax
from vlm_jax.core import errors
from vlm_jax.core.errors import DiskError, UsageError, UserError, nearest

# Subcommand to the module that offers SUMMARY, arguments(parser) and run(args) -> exit code.
COMMANDS = {
  "train": "vlm_jax.cli.train",
  "evaluate": "vlm_jax.cli.evaluate",
  "generate": "vlm_jax.cli.generate",
  "chat": "vlm_jax.cli.chat",
  "predict": "vlm_jax.cli.predict",
  "convert": "vlm_jax.cli.convert",
  "score": "vlm_jax.cli.score",
  "compare": "vlm_jax.cli.compare",
  "report": "vlm_jax.cli.report",
  "plan": "vlm_jax.cli.plan",
  "data prepare": "vlm_jax.cli.data_prepare",
  "data check": "vlm_jax.cli.data_check",
  "data inspect": "vlm_jax.cli.data_inspect",
  "ckpt ls": "vlm_jax.cli.ckpt_ls",
  "ckpt inspect": "vlm_jax.cli.ckpt_inspect",
  "ckpt verify": "vlm_jax.cli.ckpt_verify",
  "ckpt diff": "vlm_jax.cli.ckpt_diff",
  "ckpt average": "vlm_jax.cli.ckpt_average",
  "ckpt prune": "vlm_jax.cli.ckpt_prune",
  "quickstart": "vlm_jax.cli.quickstart",
}
EXIT_CODES = f"""exit codes:
  {errors.OK:<4} done
  {errors.USAGE:<4} wrong flag, unknown field, wrong type, a workdir of another config
  {errors.DATA:<4} data missing, damaged or too much of it bad
  {errors.BUG:<4} a bug of vlm_jax (--debug shows the traceback)
  {errors.DISK:<4} a directory that is read-only, missing or full
  {errors.RETRY:<4} something else must finish first, e.g. another process holds the workdir
  {errors.NUMERICS:<4} loss or gradient is not finite
  {errors.INTERRUPTED:<4} Ctrl-C; training finished its step (or batch of an evaluation) and saved
  {errors.TERMINATED:<4} SIGTERM; the same"""
EXAMPLES = """examples:
  vlm-jax data prepare --config=configs/quickstart.py
  vlm-jax train --config=configs/llava.py:debug --config.train.steps=100 --workdir=runs/first
  vlm-jax plan --config=configs/quickstart.py
  vlm-jax COMMAND --help"""
DISK_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR,
               errno.EEXIST, errno.EISDIR}


class Parser(argparse.ArgumentParser):
  """An argument parser whose errors are UsageErrors with the nearest flag."""

  def error(self, message: str):
    raise UsageError(f"{message}; see `{self.prog} --help`")

  def parse(self, argv: list[str]) -> argparse.Namespace:
    """Parses everything; `--config.FIELD` flags come back as `args.overrides`, [(field, text)].

    Raises:
      UsageError: an unknown flag (with the nearest known one) or a missing value.
    """
    argv, overrides = split_overrides(argv)
    flags = [option for action in self._actions for option in action.option_strings]
    if overrides and "--config" not in flags:
      raise UsageError(f"--config.{overrides[0][0]}: `{self.prog}` takes no config")
    for token in argv:  # before argparse, which would first complain about what is missing
      flag = token.split("=")[0]
      if token.startswith("--") and flag not in flags:
        raise UsageError(f"{self.prog} has no flag '{flag}'; {nearest(flag, flags)}")
    args, unknown = self.parse_known_args(argv)
    if unknown:
      raise UsageError(f"'{unknown[0]}' is one argument too many; see `{self.prog} --help`")
    args.overrides = overrides
    return args


def split_overrides(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
  """Takes `--config.a.b=value` and `--config.a.b value` out of the arguments."""
  rest, overrides = [], []
  tokens = iter(argv)
  for token in tokens:
    if not token.startswith("--config."):
      rest.append(token)
      continue
    field, equals, value = token.removeprefix("--config.").partition("=")
    if not equals:
      value = next(tokens, None)
      if value is None:
        raise UsageError(f"{token} needs a value: {token}=VALUE")
    overrides.append((field, value))
  return rest, overrides


def find_command(argv: list[str]) -> tuple[str, list[str]]:
  """Splits off the subcommand: ("data prepare", the arguments after it).

  Raises:
    UsageError: no such command; names the nearest.
  """
  words = [token for token in argv[:2] if not token.startswith("-")]
  for size in (2, 1):
    name = " ".join(words[:size])
    if len(words) >= size and name in COMMANDS:
      return name, argv[size:]
  group = [name for name in COMMANDS if words and name.split()[0] == words[0]]
  asked = " ".join(words) if group else " ".join(words[:1])
  raise UsageError(f"no command '{asked}'; {nearest(asked, group or COMMANDS)}")


def top_help() -> str:
  """The text of `vlm-jax --help`: commands, examples, exit codes."""
  lines = [f"  {name:<14}{importlib.import_module(module).SUMMARY}"
           for name, module in COMMANDS.items()]
  commands = "\n".join(lines)
  return (f"usage: vlm-jax COMMAND [flags]\n\n{vlm_jax.__doc__}\n\ncommands:\n{commands}\n\n"
          f"flags of every command:\n  --help        what the command takes\n"
          f"  --debug       show the traceback of an error\n\n{EXAMPLES}\n\n{EXIT_CODES}")


def run(argv: list[str]) -> int:
  """Runs one command line and returns its exit code; errors are raised."""
  if not argv or argv[0] in ("-h", "--help", "help"):
    print(top_help())
    return errors.OK if argv else errors.USAGE
  if argv[0] == "--version":
    print(f"vlm-jax {vlm_jax.__version__}")
    return errors.OK
  name, rest = find_command([token for token in argv if token != "--debug"])
  module = importlib.import_module(COMMANDS[name])
  parser = Parser(
    prog=f"vlm-jax {name}", description=module.__doc__, allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog="Exit codes: see `vlm-jax --help`. --debug shows the traceback of an error.",
  )
  module.arguments(parser)
  return module.run(parser.parse(rest)) or errors.OK


def explain(error: BaseException) -> tuple[str, int]:
  """The sentence and the exit code of anything that a command can raise."""
  if isinstance(error, KeyboardInterrupt):
    return "interrupted", errors.INTERRUPTED
  if isinstance(error, OSError) and error.errno in DISK_ERRNOS and error.filename:
    error = DiskError(f"{error.filename}: {error.strerror}; make room or permission there, or "
                      "choose another directory")
  if isinstance(error, UserError):
    return str(error), error.code
  return (f"internal error, {type(error).__name__}: {error} (a bug of vlm_jax: run again with "
          "--debug and report the traceback)"), errors.BUG


def main(argv: list[str] | None = None) -> int:
  """Runs the command line `argv` (default: sys.argv) and returns the exit code."""
  argv = sys.argv[1:] if argv is None else list(argv)
  try:
    code = run(argv)
    sys.stdout.flush()
    return code
  except BrokenPipeError:  # the reader of a pipe, e.g. `head`, has enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return errors.OK
  except (Exception, KeyboardInterrupt) as error:
    if "--debug" in argv:
      traceback.print_exc()
    sentence, code = explain(error)
    print(f"vlm-jax: {' '.join(sentence.split())}", file=sys.stderr)
    return code
