"""LLaVA, Flamingo and BLIP-2 of the same published pieces, data and number of steps, in one table.

Trains configs/llava_smollm2.py, configs/blip2_smollm2.py (each a connector, then connector and
adapters) and configs/flamingo_smollm2.py (one stage, of as many steps as the others' two) and
evaluates them; then all three answer one question about a picture of noise, in turn.

    python benchmarks/families.py [--runs=runs] [--debug]

A training that was cut off goes on where it was, and what is done is read: launch/llava_smollm2.sh
trains LLaVA's where this looks for it. `--debug` takes the recipes' sizes of that name, whose
numbers mean nothing. No side is another's reference: what is compared is what a strategy costs and
learns.

The last line is JSON; for each family, under its name:
  image_tokens      slots that a picture takes in the text
  image_rows        rows of a picture that the language model reads, in its text or beside it
  trainable         parameters that train in the last stage
  steps             of all stages together
  train_seconds     of all stages, without compilation and evaluation
  step_seconds      of the last stage, mean of the log's rows behind step 10
  flops             of a step of the last stage, both ways, see `vlm-jax plan`
  cache_bytes       keys and values kept while the question is answered, picture and answer included
  tokens_per_s      new tokens a second of the timed answers, null when contended
  easy_vqa, openmoji                 accuracy
  easy_vqa_low, easy_vqa_high, ...   its 95% interval
  easy_vqa_none, openmoji_none       accuracy without the picture
and seconds, best, matmul, others, contended (see protocol.py, of a whole answer) and machine.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
import protocol
from ml_collections import FrozenConfigDict

import vlm_jax
from vlm_jax import recipes
from vlm_jax.bundle import Bundle
from vlm_jax.cli import main as cli
from vlm_jax.cli import plan
from vlm_jax.configs.llava_smollm2 import STEPS
from vlm_jax.core.document import Encoded, Tokens
from vlm_jax.core.fusion import find_fusion
from vlm_jax.evals import run as evals
from vlm_jax.generate import decode, prompts
from vlm_jax.report import page
from vlm_jax.report import run as reports
from vlm_jax.train.loop import train

STAGES = {"llava": tuple(STEPS), "flamingo": ("",), "blip2": tuple(STEPS)}
NEW = 64  # tokens
QUESTION = 16  # tokens
ASKED = ("easy_vqa", "openmoji")


def trained(family: str, args: argparse.Namespace) -> list[Path]:
  """Trains what is not trained yet; the run directories of its stages."""
  done: list[Path] = []
  for stage in STAGES[family]:
    words = ",".join(filter(None, (stage, "debug" if args.debug else "")))
    recipe = f"configs/{family}_smollm2.py:{words}"
    if code := cli.main(["data", "prepare", f"--config={recipe}"]):
      raise SystemExit(code)
    config = recipes.load(recipe)
    if done:
      config.connector.init = str(done[-1])
    workdir = Path(args.runs) / f"{family}_smollm2{'-debug' * args.debug}" / (stage or "bridge")
    train(config.lock(), workdir, evaluate=evals.in_loop(config, workdir))
    done.append(workdir)
  return done


def question(bundle: Bundle) -> Encoded:
  """A picture of noise and random words: every family reads the same."""
  config, rng = bundle.config, np.random.default_rng(0)
  side = config.tower.image_size
  picture = bundle.processor(rng.integers(0, 256, (side, side, 3)).astype(np.uint8))
  ids = rng.integers(1, config.llm.vocab_size - 1, QUESTION).astype(np.int32)
  return Encoded((picture, Tokens(ids, np.zeros(QUESTION, bool))),
                 min(config.data.sources), "0")


def asked(bundle: Bundle) -> tuple[decode.Prompts, int]:
  """The prompt of the timed answer, and the bytes of its keys and values."""
  config = bundle.config
  prompt = prompts.stack(prompts.layouts([question(bundle)], config), config, rows=1, bucket=8)
  frozen = FrozenConfigDict(config)
  _, saying = jax.eval_shape(
    lambda params, flat: decode.begin(frozen, params, flat, prompt.ends, np.zeros(0, np.int32),
                                      np.zeros(1, np.uint32), None, np.float32(1), NEW),
    bundle.params, prompt.flat)
  kept = (saying.cache.k, saying.cache.v, saying.cache.memory)
  return prompt, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


def row(workdirs: list[Path], bundle: Bundle, cache_bytes: int) -> dict[str, Any]:
  """What is known of a family without timing it here."""
  runs = [reports.read(path) for path in workdirs]
  last, config = runs[-1], bundle.config
  found = plan.make(config)
  steps = [entry["step_seconds"] for entry in last.timing
           if "step_seconds" in entry and entry["step"] > 10]
  scores = {name: page.newest(last)[name][1] for name in ASKED}
  return {
    "image_tokens": int(prompts.layouts([question(bundle)], config)[0].sizes[
      find_fusion(config).STREAM]) - QUESTION,
    "image_rows": found["image_slots"],
    "trainable": found["modules"]["total"]["trainable"],
    "steps": sum(run.config.train.steps for run in runs),
    "train_seconds": round(sum(map(page.train_seconds, runs)), 1),
    "step_seconds": float(np.mean(steps)) if steps else None,
    "flops": found["flops"]["total"],
    "cache_bytes": cache_bytes,
    **{name: found["accuracy"] for name, found in scores.items()},
    **{f"{name}_{key}": found[key] for name, found in scores.items() for key in ("low", "high")},
    **{f"{name}_none": found["controls"]["none"]["accuracy"] for name, found in scores.items()},
  }


def main() -> None:
  """Trains, evaluates and times all three."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--runs", default="runs")
  parser.add_argument("--debug", action="store_true")
  args = parser.parse_args()
  result, sides = {}, {}
  for family in STAGES:
    workdirs = trained(family, args)
    bundle = vlm_jax.load(workdirs[-1])
    prompt, size = asked(bundle)
    result[family] = row(workdirs, bundle, size)
    sides[family] = lambda bundle=bundle, prompt=prompt: jax.block_until_ready(
      decode.generate(bundle.config, bundle.params, prompt, max_tokens=NEW))
  timing = protocol.measure(sides)
  for family, entry in result.items():
    entry["tokens_per_s"] = None if timing["contended"] else NEW / timing["best"][family]
  protocol.report(["", *result],
                  [[name, *(entry[name] for entry in result.values())] for name in result["llava"]],
                  {**result, **timing})


if __name__ == "__main__":
  main()
