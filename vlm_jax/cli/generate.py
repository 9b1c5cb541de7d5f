"""Answers one question about some pictures.

The answer appears while it is being said; with --json it comes at once, as one object. A picture
stands where the question says <image>, else before it: "is <image> larger than <image>?"
"""

import argparse
import dataclasses
import json
import time

from vlm_jax.cli import config as recipes
from vlm_jax.core.errors import UsageError

SUMMARY = "answer a question about pictures"


def arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  recipes.model(parser)
  parser.add_argument("--prompt", required=True,
                      help="the question, empty for a caption; <image> in it is the place of a "
                           "picture")
  parser.add_argument("--image", action="append", default=[], metavar="FILE",
                      help="a picture; may be repeated, in the order of the question's <image>")
  recipes.answering(parser, 32)
  parser.add_argument("--attention-map", default="", metavar="FILE.png",
                      help="draw where in the pictures every word of the answer looked")
  parser.add_argument("--attention-layers", default="", metavar="A,B,...",
                      help="layers whose mean is drawn there, from 0, -1 the last (all)")
  parser.add_argument("--json", action="store_true",
                      help="print one JSON object: text, tokens, log_prob, counts, seconds")


def run(args: argparse.Namespace) -> None:
  """Prints the answer."""
  try:
    layers = [int(text) for text in args.attention_layers.split(",") if text]
  except ValueError:
    raise UsageError(f"--attention-layers is '{args.attention_layers}'; write whole numbers with "
                     "commas between them") from None
  sampling = recipes.sampling(args)
  start = time.perf_counter()
  bundle = recipes.open_model(args)
  said = bundle.answer(args.prompt, args.image, max_tokens=args.max_tokens, sampling=sampling,
                       write=None if args.json else show, attention_map=args.attention_map,
                       attention_layers=layers)
  seconds = time.perf_counter() - start
  print(json.dumps({"step": bundle.step, **dataclasses.asdict(said), "seconds": seconds})
        if args.json else "", flush=True)


def show(text: str) -> None:
  """A piece of the answer, at once."""
  print(text, end="", flush=True)
