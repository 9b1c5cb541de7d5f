"""The two forms of SimVLM's prefix language model on easy-VQA, at equal parameters.

`decoder_only` is `fusion/prefix_lm.py` on a decoder, `encoder_decoder` is `fusion/simvlm.py`. Both
have the same convolutional stem, the same kind of blocks (RMSNorm, SwiGLU, no biases), the same
documents in every step (checked before training), optimiser and number of steps. The width of the
decoder's feed-forward block makes the parameters equal within 2% (checked too), and it has as many
layers as both sides of the other together. What differs is the form: two stacks with
cross-attention against one, learned positions and the 2-D bias of image places against rotary ones,
and captions, of which the first reads a random part and the second predicts every word.

    python benchmarks/simvlm_forms.py [--steps=1400] [--limit=0] [--data=data]

`--limit` asks about so many test pictures, 0: all. The last line is JSON with the keys
  parameters   of each form
  ratio        encoder_decoder's parameters / decoder_only's
  easy_vqa     test accuracy of each form, every question alone
  interval     their 95% intervals, test pictures drawn again with replacement
  shuffled     the same model shown another test picture
  none         shown no picture
  text_ppl     perplexity of the text's test split. Only the suffix is predicted, and both forms
               draw the same cuts, so these are the same tokens
  loss         of the last logged step
  seconds      wall clock of each training with its evaluation, compilation included
  steps
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

from ml_collections import ConfigDict

from vlm_jax.cli import config as recipes
from vlm_jax.core.fusion import find_fusion
from vlm_jax.data import pipeline, prepare
from vlm_jax.evals import run as evals
from vlm_jax.train import state as states
from vlm_jax.train.loop import train

DEPTH = 2  # layers of each side of the encoder-decoder; the decoder alone has twice as many
CLOSE = 0.02
CHECKED = 10  # steps whose documents are compared


def form(name: str, mlp: int, args: argparse.Namespace) -> ConfigDict:
  """The config of a form."""
  config = recipes.load("configs/quickstart.py")
  config.data.root = args.data
  del config.data.sources.openmoji, config.evals.openmoji, config.evals.openmoji_captions
  config.train.update(steps=args.steps, log_every=min(100, args.steps),
                      checkpoint_every=args.steps)
  config.optim.warmup = min(100, args.steps)
  for entry in config.evals.values():
    entry.limit = args.limit
  config.tower.update(name="resnet", width=16, depths=(1, 1, 1), norm="group", unroll=1)
  config.connector.name = "linear"
  config.llm.update(width=96, heads=3, kv_heads=3, mlp=mlp)
  # Pictures end a step: both forms have room for the text of nine cycles.
  config.data.tokens = 1408
  if name == "decoder_only":
    config.fusion.name = "prefix_lm"
    config.llm.update(name="llama", depth=2 * DEPTH, unroll=2 * DEPTH)
  else:
    config.fusion.name = "simvlm"
    config.llm.update(name="encoder_decoder", norm="rms", feed_forward="gated", depth=DEPTH,
                      encoder_depth=DEPTH, unroll=DEPTH, positions=128)
    config.data.decoder_tokens = 768
  return config


def parameters(config: ConfigDict) -> int:
  """How many a model of this config has."""
  _, leaves = states.initializer(find_fusion(config), config)
  return sum(math.prod(leaf.shape) for leaf in leaves.values())


def forms(args: argparse.Namespace) -> dict[str, ConfigDict]:
  """Both configs, parameters made equal.

  Raises:
    SystemExit: they cannot be made equal, or would not see the same documents.
  """
  made = {"encoder_decoder": form("encoder_decoder", 256, args)}
  want = parameters(made["encoder_decoder"])
  sizes = {mlp: parameters(form("decoder_only", mlp, args)) for mlp in range(160, 520, 8)}
  mlp = min(sizes, key=lambda mlp: abs(sizes[mlp] - want))
  if abs(sizes[mlp] / want - 1) > CLOSE:
    raise SystemExit(f"nearest: {sizes[mlp]:,} and {want:,} parameters, more than 2% apart")
  made["decoder_only"] = form("decoder_only", mlp, args)
  loaders = [pipeline.make(config) for config in made.values()]
  for step in range(CHECKED):
    seen = [next(loader)[1]["documents"] for loader in loaders]
    if seen[0] != seen[1]:
      raise SystemExit(f"step {step + 1} would hold {seen[0]} and {seen[1]} documents")
  for loader in loaders:
    loader.close()
  return made


def main() -> None:
  """Trains and evaluates both, prints a table and the JSON line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--steps", type=int, default=1400)
  parser.add_argument("--limit", type=int, default=0)
  parser.add_argument("--data", default="data")
  args = parser.parse_args()
  words = recipes.load("configs/quickstart.py").llm.vocab_size
  prepare.prepare(args.data, ["easy_vqa", "openmoji", "pydoc"], words)
  rows, seconds, made = {}, {}, forms(args)
  with tempfile.TemporaryDirectory() as folder:
    for name, config in made.items():
      workdir, start = Path(folder) / name, time.perf_counter()
      rows[name] = train(config.lock(), workdir, evaluate=evals.in_loop(config, workdir))
      seconds[name] = round(time.perf_counter() - start, 1)
  of = lambda key: {name: row[key] for name, row in rows.items()}
  vqa = "eval/easy_vqa/"
  sizes = {name: parameters(config) for name, config in made.items()}
  result = {
    "parameters": sizes,
    "ratio": sizes["encoder_decoder"] / sizes["decoder_only"],
    "easy_vqa": of(f"{vqa}accuracy"),
    "interval": {name: [row[f"{vqa}low"], row[f"{vqa}high"]] for name, row in rows.items()},
    "shuffled": of(f"{vqa}shuffled/accuracy"),
    "none": of(f"{vqa}none/accuracy"),
    "text_ppl": of("eval/text/perplexity"),
    "loss": of("loss"),
    "seconds": seconds,
    "steps": args.steps,
  }
  for key, value in result.items():
    print(f"{key:12s} {value}")
  print(json.dumps(result), flush=True)


if __name__ == "__main__":
  main()
