"""The quickstart's result over three seeds, and what each half of the mix owes to the other.

Trains the mix with three seeds, and with the first seed the pictures alone, the text alone and the
questions as one causal chat; equal steps for each. Run on an idle machine it takes the training
time of the quickstart about five times.

The last line is JSON with the keys
  easy_vqa          test accuracy of the mix, one number a seed
  easy_vqa_lowest   the lowest of them (bar 0.97)
  shuffled_highest  the highest accuracy of the mix with another test picture (bar 0.62)
  image_only        test accuracy of the pictures alone, first seed (the mix within 0.01 of it)
  conversation      test accuracy when trained on conversations, first seed
  openmoji          accuracy of four-way choices among held-out families, one number a seed
  openmoji_low      the lowest lower end of their 95% intervals (bar: above 0.30, where a blind
                    model's interval ends)
  text_ppl_mixed, text_ppl_text_only   perplexity per token of the text's test split, first seed
  text_ratio        text_ppl_mixed / text_ppl_text_only (bar 1.10)
  seconds           wall clock of each training with its evaluation
"""

import json
import tempfile
import time
from pathlib import Path

from vlm_jax.cli import config as recipes
from vlm_jax.data import prepare
from vlm_jax.evals import run as evals
from vlm_jax.train.loop import train

SEEDS = (0, 1, 2)
SOURCES = ["easy_vqa", "openmoji", "pydoc"]
CONTROLS = ("image_only", "text_only", "conversation")


def one(arg: str, seed: int, folder: Path) -> dict:
  """Trains one recipe from nothing; returns its last metrics and its seconds."""
  config = recipes.load(f"configs/quickstart.py:{arg}")
  config.seed = seed
  prepare.prepare(config.data.root, SOURCES, config.llm.vocab_size)
  workdir = folder / f"{arg or 'mixed'}-{seed}"
  start = time.perf_counter()
  row = train(config.lock(), workdir, evaluate=evals.in_loop(config, workdir))
  return row | {"seconds": time.perf_counter() - start}


def main() -> None:
  """Runs everything, prints a table and the JSON line."""
  with tempfile.TemporaryDirectory() as name:
    mixed = [one("", seed, Path(name)) for seed in SEEDS]
    control = {arg: one(arg, SEEDS[0], Path(name)) for arg in CONTROLS}
  vqa, text = "eval/easy_vqa/accuracy", "eval/text/perplexity"
  result = {
    "easy_vqa": [row[vqa] for row in mixed],
    "easy_vqa_lowest": min(row[vqa] for row in mixed),
    "shuffled_highest": max(row["eval/easy_vqa/shuffled/accuracy"] for row in mixed),
    "image_only": control["image_only"][vqa],
    "conversation": control["conversation"][vqa],
    "openmoji": [row["eval/openmoji/accuracy"] for row in mixed],
    "openmoji_low": min(row["eval/openmoji/low"] for row in mixed),
    "text_ppl_mixed": mixed[0][text],
    "text_ppl_text_only": control["text_only"][text],
    "text_ratio": mixed[0][text] / control["text_only"][text],
    "seconds": [round(row["seconds"], 1) for row in (*mixed, *control.values())],
  }
  for key, value in result.items():
    print(f"{key:20s} {value}")
  print(json.dumps(result), flush=True)


if __name__ == "__main__":
  main()
