"""Compares an exported checkpoint with its parameters, through transformers where it is installed.

The only file of the package that may load PyTorch, and only when it is asked to.
"""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from vlm_jax.convert import systems
from vlm_jax.core import pieces
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Encoded, Tokens
from vlm_jax.core.errors import DataError
from vlm_jax.core.fusion import find_fusion, find_llm
from vlm_jax.core.layout import Layout
from vlm_jax.core.tree import flatten
from vlm_jax.core.typing import Params
from vlm_jax.data import images
from vlm_jax.data.pack import Packer

TOLERANCE = 2e-4  # max|a - b| / max|b| of the logits
WORDS, START = 9, 0  # the second opens what a decoder behind an encoder says, as in ours


def available() -> bool:
  """Whether PyTorch and transformers are installed."""
  return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def reread(directory: Path, config: ConfigDict, params: Params) -> int:
  """Reads a checkpoint back and compares every parameter bit by bit; returns their number.

  Args:
    directory: the checkpoint.
    config: of the model.
    params: of the model, arrays or `Pieces`.

  Raises:
    DataError: one differs.
  """
  ours = {path: pieces.of(leaf) for path, leaf in flatten(params).items()}
  with systems.open_pieces(directory, systems.read_config(directory, config)) as theirs:
    for path, leaf in ours.items():
      back = theirs[path]
      for start in range(0, leaf.last, leaf.rows):
        stop = min(start + leaf.rows, leaf.last)
        expected = leaf.read(start, stop).astype(back.dtype)
        if expected.tobytes() != back.read(start, stop).tobytes():
          raise DataError(f"{directory}: {path} is not what was written; the disk is at fault, or "
                          "this program")
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
  document = _document(config, image_token)
  theirs, ours = _theirs(directory, config, document, image_token), _ours(config, params, document)
  error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
  if not error < TOLERANCE:
    raise DataError(f"{directory}: logits differ from those of transformers by {error:.1e} of the "
                    f"largest, more than {TOLERANCE:.0e}; do not use this export and report it")
  return error


def _document(config: ConfigDict, image_token: int) -> Encoded:
  """A picture, wider than high, and random words, predicted but for the prompt of an encoder."""
  rng, side = np.random.default_rng(0), config.tower.image_size
  pixels = rng.integers(0, 256, (side, side + side // 2, 3)).astype(np.uint8)
  picture = images.picture(pixels, side, images.decoding(config))
  if config.connector.vocab_size:  # which are read where the strategy tells them
    length = min(WORDS, config.data.instruction_tokens)
    told = rng.integers(1, config.connector.vocab_size, length).astype(np.int32)
    picture = dataclasses.replace(picture, words=told)
  words = np.setdiff1d(np.arange(6, config.llm.vocab_size), image_token)
  ids = rng.choice(words, WORDS).astype(np.int32)
  read = WORDS // 2 if find_llm(config).KIND == "encoder-decoder" else 0
  return Encoded((picture, Tokens(ids, np.arange(WORDS) >= read)), "", "parity")


def _ours(config: ConfigDict, params: Params, document: Encoded) -> np.ndarray:
  module = find_fusion(config)
  layout: Layout = module.layout(document, config, np.random.default_rng(0))
  axes = {axis: max(size, 1) for axis, size in layout.sizes.items()}
  packer = Packer(module.fields(config), axes, 1)
  packer.add([layout])
  model = module.Model(config)
  run = jax.jit(lambda params, batch: model.apply({"params": params}, batch).logits())
  return np.asarray(run(params, from_flat(packer.build().arrays)))[0]


def _theirs(directory: Path, config: ConfigDict, document: Encoded, image_token: int
            ) -> np.ndarray:
  import torch
  import transformers

  model = transformers.AutoModelForImageTextToText.from_pretrained(
    directory, dtype=torch.float32).eval()
  picture, words = document.parts
  slots, reads = len(find_fusion(config).order(config, picture)), not words.loss.all()
  read = words.ids[~words.loss] if reads else words.ids
  tokens = np.concatenate([np.full(slots, image_token), read])[None].astype(np.int64)
  values = (np.stack(picture.squares) / 255 - np.asarray(config.tower.mean)) / np.asarray(
    config.tower.std)
  inputs = {"input_ids": torch.from_numpy(tokens),
            "pixel_values": torch.from_numpy(values.transpose(0, 3, 1, 2).astype(np.float32))}
  if reads:
    said = np.append(START, words.ids[words.loss])
    inputs["decoder_input_ids"] = torch.from_numpy(said)[None].long()
  if picture.tiles:
    inputs["pixel_values"] = inputs["pixel_values"][None]
    inputs["image_sizes"] = torch.tensor([picture.tiles.size])
  if model.config.model_type == "idefics":  # of which every token has to say that it sees it
    inputs["pixel_values"] = inputs["pixel_values"][None]
    inputs["image_attention_mask"] = torch.ones(1, tokens.shape[1], 1, dtype=torch.long)
  if model.config.model_type == "paligemma":  # which is another model without them
    inputs["token_type_ids"] = torch.arange(tokens.shape[1])[None].ge(slots).long()
  if model.config.model_type == "instructblip":
    inputs["qformer_input_ids"] = torch.from_numpy(picture.words)[None].long()
  with torch.no_grad():
    out = model(**inputs)
  return out.logits[0].float().numpy()
