"""Adapters (LoRA, arXiv:2106.09685): merged into their weights, and as files of PEFT.

PEFT keeps them in `adapter_config.json` and `adapter_model.safetensors`: lora_A [rank, in] and
lora_B [out, rank] under the names that transformers 5 gives the modules of a published system in
memory. Those of a language model alone are read, too, into the one inside a system.
"""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.convert import llava, safetensors_io, systems, table
from vlm_jax.core import hf, pieces
from vlm_jax.core.adapters import A, Adapters, B, adapters, is_adapter
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.core.pieces import Pieces
from vlm_jax.core.tree import flatten, unflatten
from vlm_jax.core.typing import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# The names of files (`llava.SPELLINGS` leads to them) to those of modules in memory; those of two
# towers are the same.
MEMORY = (
  (r"^language_model\.model\.", "model.language_model."),
  (r"^vision_tower\.vision_model\.", "model.vision_tower."),
  (r"^multi_modal_projector\.", "model.multi_modal_projector."),
)
ALONE = ((r"^model\.(?=layers\.)", llava.LLM + "model."),)  # a language model's own names
# What PEFT can also do and these adapters cannot: its fields, with the values that mean no.
WITHOUT = (
  ("use_dora", False, False), ("use_rslora", False, False), ("bias", "none", "none"),
  ("rank_pattern", {}, {}), ("alpha_pattern", {}, {}), ("modules_to_save", None, None),
  ("layers_to_transform", None, None), ("fan_in_fan_out", False, False),
)


def merge(params: Params, config: ConfigDict) -> tuple[Params, ConfigDict]:
  """Adds every adapter to its kernel, W + (alpha / rank) A B, in f32 and rounded once.

  Args:
    params: of a model with adapters, or without: then nothing changes; arrays or `Pieces`.
    config: of that model.

  Returns:
    The parameters without adapters, and the config without them.
  """
  lora, flat = adapters(config), flatten(params)
  merged = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
  for path in flat:
    if path.endswith(f"/{A}"):
      kernel, other = path.removesuffix(A) + "kernel", path.removesuffix(A) + B
      total = _merged(flat[kernel], flat[path], flat[other], lora.scale)
      merged[kernel] = total if isinstance(flat[kernel], Pieces) else total.whole()
  config = config.copy_and_resolve_references()
  config.lora.rank, config.lora.init = 0, ""
  return unflatten(merged), config


def _merged(kernel: Any, a: Any, b: Any, scale: float) -> Pieces:
  """A kernel with its adapter added, piece by piece; all three arrays or `Pieces`."""
  kernel, a, b = map(pieces.of, (kernel, a, b))
  stacked = len(a.shape) + len(b.shape) - 2 > len(kernel.shape)

  def read(start: int, stop: int) -> np.ndarray:
    part = kernel.read(start, stop)
    update = product(a.read(start, stop), b.read(start, stop) if stacked else b.whole(), part.shape)
    return (part.astype(np.float32) + np.float32(scale) * update).astype(kernel.dtype)

  return Pieces(kernel.shape, kernel.dtype, read, kernel.rows)


def product(a: np.ndarray, b: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """A B as f32 in the shape of the kernel; all three may be stacked over layers.

  Args:
    a: [(layers,) *ins, rank].
    b: [(layers,) rank, *outs].
    shape: of the kernel, [(layers,) *ins, *outs].
  """
  stacked = a.ndim + b.ndim - 2 - len(shape)  # 1 or 0
  lead, rank = shape[:stacked], a.shape[-1]
  a = a.astype(np.float32).reshape(*lead, -1, rank)
  return (a @ b.astype(np.float32).reshape(*lead, rank, -1)).reshape(shape)


def write(directory: str | os.PathLike, config: ConfigDict, params: Params) -> None:
  """Writes the adapters of a system for `PeftModel.from_pretrained` on its base model.

  Args:
    directory: made if missing; must not hold adapters.
    config: of the model.
    params: of the model; only the adapters are read.

  Raises:
    UsageError: there are no adapters, the directory has some, or the model is of no published
      system.
    DiskError: it cannot be written.
  """
  lora = adapters(config)
  if not lora.rank:
    raise UsageError("config.lora.rank is 0, so there are no adapters to write; use --to=hf")
  base = config.copy_and_resolve_references()
  base.lora.rank = 0
  systems.converter(base).write_config(base, image_token=0)  # refuses what their model cannot be
  flat = {path: leaf for path, leaf in flatten(params).items() if is_adapter(path)}
  found = entries(config, {path: leaf.shape for path, leaf in flat.items()})
  rename = table.renamer(MEMORY)
  tensors = {PREFIX + rename(key): tensor
             for key, tensor in table.export(unflatten(flat), found).items()}
  directory = safetensors_io.new_directory(directory)
  safetensors_io.write_file(directory / WEIGHTS, tensors)
  modules = {re.sub(r"\.lora_[AB]\.weight$", "", key.removeprefix(PREFIX)) for key in tensors}
  safetensors_io.write_json(directory / CONFIG, _config(lora, sorted(modules)))


def read(directory: str | os.PathLike, config: ConfigDict) -> dict[str, np.ndarray]:
  """The adapters of a PEFT directory for a system, or for its language model alone, by our paths.

  Args:
    directory: holds adapter_config.json and adapter_model.safetensors.
    config: of the model; its rank, alpha and targets must be those of the file.

  Raises:
    UsageError: the config's adapters are others, or PEFT's are of a kind that is not known.
    DataError: a file is damaged, keys are missing or unexpected, shapes are wrong.
  """
  directory, lora = Path(directory), adapters(config)
  theirs = safetensors_io.read_json(directory / CONFIG)
  hf.expect(theirs, "peft_type", "LORA", "LORA")
  for name, default, needed in WITHOUT:
    if theirs.get(name) or name == "bias":
      hf.expect(theirs, name, default, needed)
  for field, name in (("rank", "r"), ("alpha", "lora_alpha")):
    ours, value = getattr(lora, field), theirs.get(name, 8)
    if float(value) != float(ours):
      raise UsageError(f"config.lora.{field} is {ours} but {directory / CONFIG} says {value}; set "
                       f"config.lora.{field}={value}")
  shapes = {path: shape for path, shape in systems.shapes(config).items() if is_adapter(path)}
  spell = table.renamer(((rf"^{re.escape(PREFIX)}", ""), *ALONE, *llava.SPELLINGS))
  with safetensors_io.Reader(directory / WEIGHTS) as reader:
    try:
      return flatten(table.load(reader, entries(config, shapes), spell))
    except DataError as error:
      raise DataError(f"{directory}: {error}, or config.lora.targets are other layers") from error


def entries(config: ConfigDict, shapes: dict[str, tuple[int, ...]]) -> list[table.Entry]:
  """The tensors of the adapters with these shapes, under the names of files.

  Raises:
    UsageError: one is at a layer that is no linear layer there (the patches' convolution).
  """
  parts, known = [], set()
  for ours, theirs, keys in systems.converter(config).parts(config):
    rows = [row for row in keys if row[2] in ("in", "out") and row[0].endswith("/kernel")]
    known |= {ours + row[0].removesuffix("/kernel") for row in rows}
    parts.append((ours, theirs, tuple(
      (path.removesuffix("kernel") + leaf, key.removesuffix("weight") + f"{name}.weight", op)
      for path, key, _ in rows for leaf, name, op in ((A, "lora_A", "out"), (B, "lora_B", "in")))))
  layers = {path.rpartition("/")[0] for path in shapes}
  if other := sorted(layers - known):
    raise UsageError(f"config.lora.targets: {other[0]} is not a linear layer in PEFT's model; take "
                     "it out of the targets, or merge with --to=hf")
  return table.entries(parts, shapes)


def _config(lora: Adapters, modules: list[str]) -> dict[str, Any]:
  return {
    "peft_type": "LORA", "task_type": None, "r": lora.rank, "lora_alpha": lora.alpha,
    "lora_dropout": lora.dropout, "target_modules": modules, "inference_mode": True,
    **{name: default for name, default, _ in WITHOUT},
  }
