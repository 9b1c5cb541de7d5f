"""Shows what training would make of your own files, before you start it.

    vlm-jax data check my.json --image-root=images
    vlm-jax data check --config=my.py

Counts, histograms, every record that would be dropped and why, the exact text that is learned in a
few documents, and the steps of an epoch. The format is guessed from the file unless --format names
it. Without --tokenizer (or a prepared one in the config's data.root) a token is a byte. The exit
code is 65 when more records are bad than config.data.bad_limit lets pass.
"""

import argparse

from vlm_jax.cli import config as recipes
from vlm_jax.core import errors
from vlm_jax.core.errors import UsageError

SUMMARY = "what training would make of your own files"


def arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument("file", nargs="?", metavar="FILE",
                      help="your file; also 'shard-{000..012}.tar' or '*.parquet'")
  parser.add_argument("--format", default="", help="module in vlm_jax/data/sources (guessed)")
  parser.add_argument("--image-root", default="", metavar="FOLDER",
                      help="folder that images are named in (default: the file's)")
  parser.add_argument("--annotations", default="", metavar="FILE", help="vqav2: the answers")
  parser.add_argument("--form", default="", help="how the format writes documents")
  parser.add_argument("--split", default="train", help="split, for data sets of TFDS (train)")
  parser.add_argument("--tokenizer", default="", metavar="FILE", help="tokenizer.json")
  parser.add_argument("--examples", type=int, default=3, help="documents to write out (3)")
  parser.add_argument("--limit", type=int, default=0, help="records to read (0: all)")
  recipes.argument(parser, required=False)


def run(args: argparse.Namespace) -> int:
  """Prints the description of the file, or of every source of the recipe."""
  if not args.file and not args.config:
    raise UsageError("data check needs a FILE, or --config with a recipe whose sources to check")
  if args.examples < 0 or args.limit < 0:
    raise UsageError("--examples and --limit must be at least 0")
  from vlm_jax.configs import base

  config = recipes.read(args) if args.config else base.get_config()
  from vlm_jax.data import check

  with config.unlocked():
    config.data.tokenizer = args.tokenizer or config.data.tokenizer
    if args.file:
      name = args.format or check.guess(args.file)
      config.data.sources = type(config)()
      config.data.sources.own = base.source(
        name=name, path=args.file, image_root=args.image_root, annotations=args.annotations,
        form=args.form, split=args.split)
  code = errors.OK
  for name in sorted(config.data.sources):
    text, dropped = check.check(config, name, args.examples, args.limit)
    print(text)
    if dropped > config.data.bad_limit:
      print(f"training would stop: {dropped:.1%} of the records are bad, more than "
            f"config.data.bad_limit={config.data.bad_limit}")
      code = errors.DATA
  return code
