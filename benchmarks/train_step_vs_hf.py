"""A training step of ours against `LlavaForConditionalGeneration` of transformers, on this CPU.

Same sizes, same weights (ours are exported and loaded by transformers), same padded batch, f32,
all cores on both sides: forward, backward, AdamW. The losses of the first steps must agree to 1e-4
before anything is timed. Theirs is the fastest of eager attention, sdpa, and sdpa under
torch.compile, with the fused AdamW; ours has XLA's newer matrix product for CPUs. `padded` is ours
on that batch; `packed` is ours on the same documents packed into two long rows: one step does all
the useful work of a padded step.

The last line is JSON:
  padded_ratio   seconds of their fastest step / seconds of our padded step, null when contended
  packed_ratio   seconds of their fastest step / seconds of our packed step, null when contended
  fastest        which of theirs
  tokens_per_s   useful (not padding) tokens per second of every side
  images_per_s   the same for images
  losses         the first losses of every side
  fill           share of slots that are not padding, padded and packed
  compile        seconds of every side's first step, compilation included
  seconds, best, matmul, others, contended, machine   see protocol.py
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Experimental, so only set here: our side, too, runs at its best setting.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=dot")

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import ours
import protocol
import torch
import transformers
from ml_collections import ConfigDict

from tests import torchvision_cpu
from vlm_jax.configs import base
from vlm_jax.convert import systems
from vlm_jax.core import fusion
from vlm_jax.core.document import Encoded, Pixels, Tokens
from vlm_jax.core.errors import UsageError
from vlm_jax.core.layout import Layout

torchvision_cpu.install()  # transformers reads its models when they are named

DOCUMENTS = 16  # of one image each
ROW = 256  # slots of a row
TEXT = (16, ROW - 64)  # tokens of text per document, uniform
BLOCK = 64  # slots; packed rows are whole blocks of attention
CHECKED = 3  # steps whose losses must agree


def get_config() -> ConfigDict:
  """The model, the optimizer, and a batch of one document a row."""
  config = base.get_config()
  config.fusion.update(name="concat", image_attention="causal")
  config.tower.update(width=192, depth=4, mlp=768, heads=3, patch_bias=True, post_norm=False,
                      activation="gelu_tanh", image_size=64, patch=8)
  config.llm.update(vocab_size=2048, width=256, depth=6, mlp=704, heads=4, kv_heads=2,
                    tie_embeddings=True)
  with config.data.sources.unlocked():
    config.data.sources.text = base.source(name="text")
  config.tower.unroll, config.llm.unroll = config.tower.depth, config.llm.depth  # fastest here
  config.data.update(rows=DOCUMENTS, tokens=ROW, images=1)
  config.optim.update(lr=1e-3, schedule="constant", warmup=1, clip=0.0, decay_pattern=".*")
  config.mesh.update(data=1)
  return config


def documents(config: ConfigDict) -> list[Encoded]:
  """Random documents: an image, a question without loss, an answer with."""
  rng = np.random.default_rng(config.seed)
  side, result = config.tower.image_size, []
  for number in range(DOCUMENTS):
    ids = rng.integers(1, config.llm.vocab_size - 1, rng.integers(*TEXT, endpoint=True))
    loss = np.arange(len(ids)) >= len(ids) // 2
    pixels = rng.integers(0, 256, (side, side, 3)).astype(np.uint8)
    parts = (Pixels(pixels), Tokens(ids.astype(np.int32), loss))
    result.append(Encoded(parts, "text", str(number)))
  return result


def long_rows(layouts: list[Layout]) -> ConfigDict:
  """The config with two rows, as short as they can be to hold all layouts."""
  for length in range(ROW, DOCUMENTS * ROW, BLOCK):
    config = ours.resized(get_config(), 2, length, images=DOCUMENTS // 2)
    try:
      ours.pack(layouts, config)
    except UsageError:
      continue
    return config
  raise ValueError(f"no two rows hold {DOCUMENTS // 2} documents each")


class Theirs:
  """Their train step on the padded batch; calling it makes a step and gives the loss."""

  def __init__(self, directory: str, inputs: dict, config: ConfigDict, attention: str,
               compiled: bool):
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
      directory, attn_implementation=attention)
    self.model = torch.compile(model.train()) if compiled else model.train()
    optim = config.optim
    self.optimizer = torch.optim.AdamW(
      model.parameters(), lr=optim.lr, betas=(optim.b1, optim.b2), eps=optim.eps,
      weight_decay=optim.weight_decay, fused=True)
    self.inputs = inputs

  def __call__(self) -> float:
    self.optimizer.zero_grad(set_to_none=True)
    loss = self.model(**self.inputs, use_cache=False).loss
    loss.backward()
    self.optimizer.step()
    return float(loss.detach())


def torch_inputs(docs: list[Encoded], config: ConfigDict) -> dict[str, torch.Tensor]:
  """The documents as transformers wants them: one a row, padded on the right."""
  image_token = config.llm.vocab_size - 1
  ids = torch.zeros((len(docs), ROW), dtype=torch.int64)
  attend, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
  slots = (config.tower.image_size // config.tower.patch) ** 2
  for row, doc in enumerate(docs):
    text = doc.parts[1]
    end = slots + len(text.ids)
    ids[row, :slots], attend[row, :end] = image_token, 1
    ids[row, slots:end] = torch.from_numpy(text.ids)
    labels[row, slots:end] = torch.from_numpy(np.where(text.loss, text.ids, -100))
  pixels = np.stack([image for doc in docs for image in doc.images])
  mean, std = (np.asarray(x, np.float32) for x in (config.tower.mean, config.tower.std))
  pixels = ((pixels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)
  return {"input_ids": ids, "attention_mask": attend, "labels": labels,
          "pixel_values": torch.from_numpy(np.ascontiguousarray(pixels))}


def main() -> None:
  """Runs the comparison."""
  torch.set_num_threads(os.cpu_count())
  transformers.utils.logging.disable_progress_bar()
  config = get_config()
  docs = documents(config)
  module = fusion.find_fusion(config)
  layouts = [module.layout(doc, config, np.random.default_rng(0)) for doc in docs]
  longer = long_rows(layouts)
  padded, packed = ours.Trainer(config), ours.Trainer(longer)
  padded_batch = padded.place(ours.pack(layouts, config, one_a_row=True))
  packed_batch = packed.place(ours.pack(layouts, longer))
  sides: dict[str, Callable[[], float]] = {
    "ours padded": lambda: padded.step(padded_batch),
    "ours packed": lambda: packed.step(packed_batch),
  }
  inputs = torch_inputs(docs, config)
  with tempfile.TemporaryDirectory() as directory:
    systems.write(f"{directory}/model", config, padded.state.params, config.llm.vocab_size - 1)
    for name, attention, compiled in (("eager", "eager", False), ("sdpa", "sdpa", False),
                                      ("compiled", "sdpa", True)):
      sides[name] = Theirs(f"{directory}/model", inputs, config, attention, compiled)

  compile_seconds, losses = {}, {}
  for name, step in sides.items():
    values: list[float] = []
    compile_seconds[name] = protocol.seconds(lambda step=step, to=values: to.append(step()))
    losses[name] = values + [step() for _ in range(CHECKED - 1)]
  reference = losses["eager"]
  for name, values in losses.items():
    if not np.allclose(values, reference, rtol=0, atol=1e-4):
      raise AssertionError(f"the first losses of '{name}' are {values}, of 'eager' {reference}")

  timing = protocol.measure(sides)
  useful = int(inputs["attention_mask"].sum())
  slots = {"padded": DOCUMENTS * ROW, "packed": longer.data.rows * longer.data.tokens}
  theirs = ["eager", "sdpa", "compiled"]
  padded_ratio, fastest = protocol.ratio(timing, "ours padded", theirs)
  packed_ratio, _ = protocol.ratio(timing, "ours packed", theirs)
  best = timing["best"]
  result = {
    "padded_ratio": padded_ratio, "packed_ratio": packed_ratio, "fastest": fastest,
    "tokens_per_s": {name: useful / best[name] for name in sides},
    "images_per_s": {name: DOCUMENTS / best[name] for name in sides},
    "losses": losses, "compile": compile_seconds,
    "fill": {name: useful / size for name, size in slots.items()},
    **timing,
  }
  protocol.report(
    ["side", "step ms", "useful tokens/s", "images/s", "first call s"],
    [[name, 1e3 * best[name], useful / best[name], DOCUMENTS / best[name], compile_seconds[name]]
     for name in sides],
    result,
  )


if __name__ == "__main__":
  main()
