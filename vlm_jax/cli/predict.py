"""Answers a file of prompts with a model, into a file of predictions.

--data is one of
  *.jsonl  lines of {"id", "prompt", "image"}; "image" is a file name, a list, or missing
           (POPE's {"question_id", "text", "image"} is read too); or conversations in the form of
           OpenAI's {"messages"} or LLaVA's {"conversations"}, whose last question is answered
  *.json   a list of such, VQA v2 questions, or a COCO caption file (with --prompt, or a bare
           caption)
  *.tsv    MMBench: options are listed, the model answers with a letter
The same command continues a file that was interrupted; answered ids are not asked again.
"""

import argparse
import json

from vlm_jax.cli import config as recipes

SUMMARY = "answer a file of prompts, into JSON lines"


def arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  recipes.model(parser)
  parser.add_argument("--data", required=True, metavar="FILE", help="what is asked")
  parser.add_argument("--out", required=True, metavar="FILE.jsonl", help="predictions, continued")
  parser.add_argument("--images", metavar="DIR",
                      help="folder of the pictures (default: that of --data); for VQA v2 also a "
                           "pattern such as val2014/COCO_val2014_{:012d}.jpg")
  parser.add_argument("--prompt", default="", help="asked where the file has no question")
  parser.add_argument("--batch", type=int, default=32, help="prompts generated together (32)")
  parser.add_argument("--max-tokens", type=int, default=32, help="an answer is cut there (32)")
  parser.add_argument("--json", action="store_true", help="a JSON object a batch")


def run(args: argparse.Namespace) -> None:
  """Writes the predictions, a line of progress a batch."""
  from vlm_jax.evals.requests import read_requests

  requests = read_requests(args.data, images=args.images, prompt=args.prompt)
  bundle = recipes.open_model(args)
  from vlm_jax.evals.predict import predict

  def report(progress: dict) -> None:
    if args.json:
      print(json.dumps(progress), flush=True)
    else:
      print("{done:,} of {total:,} answered, {bad:,} unreadable, {per_second:.1f}/s"
            .format(**progress), flush=True)

  last = predict(bundle.config, bundle.params, requests, args.out, step=bundle.step,
                 batch=args.batch, max_tokens=args.max_tokens, report=report)
  if args.json:
    print(json.dumps({**last, "step": bundle.step, "out": args.out}))
  else:
    print(f"{args.out}: {last['done']:,} predictions of checkpoint {bundle.step}, {last['bad']:,} "
          "of them unreadable requests")
