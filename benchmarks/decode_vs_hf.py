"""Decoding at batch 1: ours against `LlavaForConditionalGeneration.generate`, on this CPU.

Same weights (ours are exported and loaded by transformers), one image and a short question, greedy,
f32, all cores on both sides, a fixed number of new tokens without a stop. The tokens must be equal
before anything is timed. Theirs is the faster of the default cache and the static one. Two sizes:
14M parameters, and the shape of SmolLM2-135M.

Decoding reads every parameter once a token, so a second bar is the bandwidth of memory: the seconds
that reading the decoder's parameters takes, from a sum over an array of their size in the same run.

The last line is JSON; for each size, under its name:
  parameters       of the language model
  ratio            their fastest seconds a token / ours, null when contended
  bandwidth_share  seconds to read the parameters once / our seconds a token, null when contended
  fastest          which of theirs
  tokens_per_s     new tokens per second of every side
  compile          seconds of every side's first call, compilation included
  seconds, best, matmul, others, contended   see protocol.py, of a whole answer
and machine.
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import ours
import protocol
import torch
import transformers
from ml_collections import ConfigDict
from train_step_vs_hf import get_config, torch_inputs

from vlm_jax.convert import systems
from vlm_jax.core.document import Encoded, Pixels, Tokens
from vlm_jax.generate import prompts
from vlm_jax.generate.decode import generate

NEW = 64  # tokens
QUESTION = 16  # tokens
SIZES = {
  "14M": dict(vocab_size=4096, width=320, depth=10, mlp=880, heads=5, kv_heads=5),
  "135M": dict(vocab_size=49152, width=576, depth=30, mlp=1536, heads=9, kv_heads=3),
}


def config_of(size: dict) -> ConfigDict:
  """The model of the training benchmark with another language model."""
  config = get_config()
  config.llm.update(**size, tie_embeddings=True, unroll=1)
  return config


def question(config: ConfigDict) -> Encoded:
  """A random image and random tokens."""
  rng = np.random.default_rng(config.seed)
  side = config.tower.image_size
  pixels = rng.integers(0, 256, (side, side, 3)).astype(np.uint8)
  ids = rng.integers(1, config.llm.vocab_size - 1, QUESTION).astype(np.int32)
  return Encoded((Pixels(pixels), Tokens(ids, np.zeros(QUESTION, bool))), "text", "0")


def compare(size: dict) -> dict:
  """Both sides at one size."""
  config = config_of(size)
  params = ours.Trainer(config).state.params
  # With tied embeddings a fresh model repeats its last token: louder layers make it speak.
  params["llm"]["layers"] = jax.tree.map(lambda leaf: 4 * leaf, params["llm"]["layers"])
  asked = question(config)
  prompt = prompts.stack(prompts.layouts([asked], config), config, rows=1, bucket=16)
  sides: dict[str, Callable[[], list[int]]] = {
    "ours": lambda: np.asarray(
      generate(config, params, prompt, max_tokens=NEW).tokens)[0, 0].tolist(),
  }
  inputs = torch_inputs([asked], config)
  length = int(inputs["attention_mask"].sum())
  inputs = {name: values if name == "pixel_values" else values[:, :length]
            for name, values in inputs.items() if name != "labels"}
  with tempfile.TemporaryDirectory() as directory:
    systems.write(f"{directory}/model", config, params, config.llm.vocab_size - 1)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(f"{directory}/model").eval()

  def theirs(cache: str | None) -> list[int]:
    with torch.inference_mode():
      said = model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
                            cache_implementation=cache)
    return said[0, length:].tolist()

  sides |= {"default cache": lambda: theirs(None), "static cache": lambda: theirs("static")}
  said, compile_seconds = {}, {}
  for name, side in sides.items():
    compile_seconds[name] = protocol.seconds(
      lambda name=name, side=side: said.update({name: side()}))
  if len({tuple(tokens) for tokens in said.values()}) > 1:
    raise AssertionError(f"the answers differ: {said}")
  if len(set(said["ours"])) < NEW // 8:
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
          "tokens_per_s": {name: NEW / best[name] for name in sides},
          "compile": compile_seconds, **timing}


def main() -> None:
  """Runs the comparison."""
  torch.set_num_threads(os.cpu_count())
  transformers.utils.logging.disable_progress_bar()
  result = {name: compare(size) for name, size in SIZES.items()}
  rows = [[size, side, speed, row["ratio"], row["bandwidth_share"]]
          for size, row in result.items() for side, speed in row["tokens_per_s"].items()]
  contended = any(row["contended"] for row in result.values())
  protocol.report(["size", "side", "tokens/s", "ratio", "share of bandwidth"], rows,
                  {**result, "contended": contended})


if __name__ == "__main__":
  main()
