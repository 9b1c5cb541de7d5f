"""Compares an exported checkpoint with its parameters, through transformers where it is installed.

The only file of the package that may load PyTorch, and only when it is asked to.
"""

import importlib.util
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from vlm_jax.convert import llava
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Encoded, Pixels, Tokens
from vlm_jax.core.errors import DataError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.layout import Layout
from vlm_jax.core.tree import flatten
from vlm_jax.core.typing import Params
from vlm_jax.data.pack import Packer

TOLERANCE = 2e-4  # max|a - b| / max|b| of the logits
WORDS = 9


def available() -> bool:
  """Whether PyTorch and transformers are installed."""
  return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def reread(directory: Path, config: ConfigDict, params: Params) -> int:
  """Reads a LLaVA checkpoint back and compares every parameter bit by bit; returns their number.

  Raises:
    DataError: one differs.
  """
  _, back = llava.read(directory, config)
  ours, theirs = flatten(params), flatten(back)
  for path, leaf in ours.items():
    expected = np.asarray(leaf).astype(theirs[path].dtype)
    if expected.tobytes() != theirs[path].tobytes():
      raise DataError(f"{directory}: {path} is not what was written; the disk is at fault, or this "
                      "program")
  return len(ours)


def logits(directory: Path, config: ConfigDict, params: Params, image_token: int) -> float:
  """The largest difference of the logits of a picture and random words, relative to the largest.

  Args:
    directory: the checkpoint, loaded with transformers.
    config: of our model.
    params: of our model.
    image_token: their id of an image's slots.

  Raises:
    DataError: it is above the tolerance.
  """
  theirs = _theirs(directory, config, *(document := _document(config)), image_token)
  ours = _ours(config, params, *document)
  error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
  if not error < TOLERANCE:
    raise DataError(f"{directory}: logits differ from those of transformers by {error:.1e} of the "
                    f"largest, more than {TOLERANCE:.0e}; do not use this export and report it")
  return error


def _document(config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
  rng, side = np.random.default_rng(0), config.tower.image_size
  pixels = rng.integers(0, 256, (side, side, 3)).astype(np.uint8)
  return pixels, rng.integers(6, config.llm.vocab_size, WORDS).astype(np.int32)


def _ours(config: ConfigDict, params: Params, pixels: np.ndarray, ids: np.ndarray) -> np.ndarray:
  module = find_fusion(config)
  encoded = Encoded((Pixels(pixels), Tokens(ids, np.ones(len(ids), bool))), "", "parity")
  layout: Layout = module.layout(encoded, config, np.random.default_rng(0))
  axes = {axis: max(size, 1) for axis, size in layout.sizes.items()}
  packer = Packer(module.fields(config), axes, 1)
  packer.add([layout])
  model = module.Model(config)
  run = jax.jit(lambda params, batch: model.apply({"params": params}, batch).logits())
  return np.asarray(run(params, from_flat(packer.build().arrays)))[0]


def _theirs(directory: Path, config: ConfigDict, pixels: np.ndarray, ids: np.ndarray,
            image_token: int) -> np.ndarray:
  import torch
  import transformers

  model = transformers.LlavaForConditionalGeneration.from_pretrained(
    directory, dtype=torch.float32).eval()
  slots = (config.tower.image_size // config.tower.patch) ** 2
  tokens = np.concatenate([np.full(slots, image_token), ids])[None].astype(np.int64)
  values = (pixels / 255 - np.asarray(config.tower.mean)) / np.asarray(config.tower.std)
  values = values.transpose(2, 0, 1)[None].astype(np.float32)
  with torch.no_grad():
    out = model(input_ids=torch.from_numpy(tokens), pixel_values=torch.from_numpy(values))
  return out.logits[0].float().numpy()
