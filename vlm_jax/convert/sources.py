"""Opens weights of any known format by their path, and finds one module's tensors among them.

A file may hold a whole system: the tensors of a tower are then below a prefix, which is found, not
told. What is below it must be the module's exactly.
"""

import collections
import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.convert import (
  big_vision,
  blip2,
  gguf,
  gguf_llama,
  lavis,
  llava,
  nodes,
  npz,
  open_clip,
  pth,
  safetensors_io,
  table,
)
from vlm_jax.core import fusion
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.core.tree import flatten

READERS: dict[str, Callable[[Path], Any]] = {
  "": safetensors_io.Reader, ".safetensors": safetensors_io.Reader, ".npz": npz.Reader,
  ".gguf": gguf.Reader, ".pth": pth.Reader, ".pt": pth.Reader, ".bin": pth.Reader,
}
FLOORS = {"tower": "towers", "connector": "connectors", "llm": "llm"}


class View:
  """Some tensors of a source under other names; see `table.Source`."""

  def __init__(self, source: table.Source, names: Mapping[str, str]):
    """`names` are ours to the source's."""
    self._source, self._names = source, names
    self.shapes = {name: source.shapes[key] for name, key in names.items()}

  def __getitem__(self, key: str) -> np.ndarray:
    return self._source[self._names[key]]


@contextlib.contextmanager
def open_source(path: str | os.PathLike) -> Iterator[table.Source]:
  """The tensors of a safetensors directory or of a .safetensors, .npz, .gguf or .pth file.

  Raises:
    UsageError: there is nothing, or a file of another kind.
    DataError: it is damaged.
  """
  path = Path(path)
  if not path.exists():
    raise UsageError(f"{path} does not exist; give the file or directory of the weights")
  suffix = "" if path.is_dir() else path.suffix
  if suffix not in READERS or path.is_file() and not suffix:
    raise UsageError(f"{path}: weights are read from a directory of safetensors or a file named "
                     f"{', '.join(filter(None, READERS))}")
  with READERS[suffix](path) as reader:
    if isinstance(reader, gguf.Reader):
      yield gguf_llama.Source(reader)
    else:
      yield lavis.View(reader) if lavis.is_written_in(reader.shapes) else reader


def load_npz(path: str | os.PathLike, config: ConfigDict, shapes: Mapping[str, table.Shape],
             dtype: np.dtype) -> dict[str, np.ndarray]:
  """All parameters of a system that big_vision wrote: its modules', and what is no module's.

  Args:
    path: of an .npz, `config.fusion.init`.
    config: the whole config.
    shapes: path to shape, of every parameter.
    dtype: of the parameters.

  Returns:
    Path to array.

  Raises:
    UsageError, DataError: as `load_node`.
  """
  found: dict[str, np.ndarray] = {}
  for node in FLOORS:
    mine = {key.partition("/")[2]: shape for key, shape in shapes.items()
            if key.startswith(f"{node}/")}
    if mine:
      arrays = load_node(path, node, config, mine, dtype, "fusion")
      found |= {f"{node}/{key}": array for key, array in arrays.items()}
  name, rest = config.fusion.name, {key: shape for key, shape in shapes.items() if key not in found}
  keys = big_vision.SYSTEMS.get(name, ())
  if set(rest) - {path for path, _, _ in keys}:
    raise UsageError(f"config.fusion.init={path}: no .npz of a '{name}' is known; name the weights "
                     "of its modules (config.tower.init, config.llm.init)")
  try:
    with open_source(path) as source:
      view = View(source, {key: key for _, key, _ in keys if key in source.shapes})
      return found | flatten(table.load(view, table.entries((("", "", keys),), rest), dtype=dtype))
  except DataError as error:
    raise DataError(f"config.fusion.init={path}: {error}") from error


def load_pth(path: str | os.PathLike, config: ConfigDict, shapes: Mapping[str, table.Shape],
             dtype: np.dtype) -> dict[str, np.ndarray]:
  """The parameters of a BLIP-2 that LAVIS wrote, as far as the file has them.

  Args:
    path: of a .pth, `config.fusion.init`.
    config, shapes, dtype: as in `load_npz`.

  Returns:
    Path to array. Where the file lacks what its stage does not train, `config.tower.init` or
    `config.llm.init` must name it; a second stage that begins draws its projection.

  Raises:
    UsageError: the strategy is no BLIP-2, or what is lacking is not named.
    DataError: the tensors are not those of the model.
  """
  field, name = f"config.fusion.init={path}", config.fusion.name
  if name not in blip2.FUSIONS:
    raise UsageError(f"{field}: of .pth files those of LAVIS are known, whose models are "
                     f"{', '.join(blip2.FUSIONS)}, and config.fusion.name is '{name}'; name the "
                     "weights of its modules (config.tower.init, config.llm.init)")
  try:
    with open_source(path) as source:
      if not isinstance(source, lavis.View):
        raise DataError("weights: no key begins with 'Qformer.', so LAVIS did not write them")
      lavis.check_tied(source)
      rows = table.entries((*blip2.parts(config), ("", "", lavis.KEYS)), shapes)
      for node, pattern in lavis.APART.items():
        mine = {row.key.partition("[")[0] for row in rows if pattern.fullmatch(row.path)}
        if mine & source.shapes.keys():
          continue
        if mine and node != "connector" and not config[node].init:
          raise UsageError(f"{field} has no {node}, which its stage did not train; name the "
                           f"weights of it by config.{node}.init")
        rows = [row for row in rows if not pattern.fullmatch(row.path)]
      copies = getattr(fusion.find_llm(config), "UNREAD", ())
      left = (*filter(lavis.FIRST.fullmatch, source.shapes), *(blip2.LLM + key for key in copies))
      tied = blip2.HEAD if config.llm.tie_embeddings else None
      return flatten(nodes.load(source, rows, tied, unread=left, dtype=dtype))
  except DataError as error:
    raise DataError(f"{field}: {error}") from error


def load_node(path: str | os.PathLike, node: str, config: ConfigDict,
              shapes: Mapping[str, table.Shape], dtype: np.dtype, field: str = ""
              ) -> dict[str, np.ndarray]:
  """The parameters of one module from weights that hold it.

  Args:
    path: see `open_source`.
    node: "tower", "connector" or "llm".
    config: the whole config.
    shapes: path below the node to shape, of every parameter.
    dtype: of the parameters.
    field: the node whose `init` names the path, "": this one's.

  Returns:
    Path below the node to array.

  Raises:
    UsageError: as `open_source`, or the module has no key table.
    DataError: the tensors are not exactly those of the module; names the field.
  """
  name = config[node].name
  module = fusion.find(FLOORS[node], name, outside=config.outside)
  try:
    with open_source(path) as source:
      keys = getattr(module, "KEYS", ())
      if Path(path).suffix == ".npz":
        keys = big_vision.TABLES.get(name, ())
      elif open_clip.is_written_in(source.shapes):
        keys = open_clip.TABLES.get(name, ())
      if set(shapes) - {path for path, _, _ in keys}:
        raise UsageError(f"config.{field or node}.init: '{name}' with these fields has no table of "
                         "keys, so no weights of another program are known for it")
      view = find(source, keys, shapes)
      if node == "llm":
        _check_vocabulary(view, keys, config)
      left, more = unread(keys, shapes), getattr(module, "UNREAD", ())
      beside = lambda key: key in more
      if isinstance(source, lavis.View) and node == "tower":
        shapes, beside = lavis.tower(view, shapes, config.tower.depth)
      entries = table.entries((("", "", keys),), shapes)
      return flatten(table.load(view, entries, unread=lambda key: left(key) or beside(key),
                                dtype=dtype))
  except DataError as error:
    raise DataError(f"config.{field or node}.init={path}: {error}") from error


def find(source: table.Source, keys: table.Keys, shapes: Mapping[str, table.Shape]) -> View:
  """The tensors below the prefix that has most of a table's keys, without it.

  Raises:
    DataError: there is none, or two are equally good.
  """
  rename = table.renamer(_spellings(source))
  spelled = {rename(key): key for key in source.shapes}
  if len(spelled) < len(source.shapes):
    twice = sorted(set(source.shapes) - set(spelled.values()))
    raise DataError(f"weights: '{twice[0]}' and '{spelled[rename(twice[0])]}' are two spellings of "
                    "one tensor; remove one of them")
  expected = {entry.key for entry in table.entries((("", "", keys),), shapes)}
  counts: collections.Counter[str] = collections.Counter()
  for key in spelled:
    starts = [0, *(match.end() for match in re.finditer(r"[./]", key))]
    counts.update(key[:start] for start in starts if key[start:] in expected)
  ranked = counts.most_common(2)
  if len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
    raise DataError(f"weights: '{ranked[0][0]}' and '{ranked[1][0]}' both begin "
                    f"{ranked[0][1]} keys of the module; give a file that holds it once")
  if not ranked:
    raise DataError(f"weights: no key ends like one of the module's, e.g. '{keys[0][1]}'; the "
                    f"first are {table.name_keys(sorted(spelled)[:3])}")
  prefix = ranked[0][0]
  names = {key.removeprefix(prefix): theirs for key, theirs in spelled.items()
           if key.startswith(prefix)}
  return View(source, names)


def _spellings(source: table.Source) -> tuple[tuple[str, str], ...]:
  # A text model's own lm_head is where it belongs; that of a LLaVA in memory is not.
  system = any("language_model." in key for key in source.shapes)
  return (*big_vision.SPELLINGS, *(llava.SPELLINGS if system else ()))


def unread(keys: table.Keys, shapes: Mapping[str, table.Shape]) -> Callable[[str], bool]:
  """Which keys may be left over: those of parameters that the config does not make, and constants.

  Args:
    keys: of the module.
    shapes: of its parameters.
  """
  if keys is big_vision.LINEAR:  # the head of a tower, whose layers lie beside it
    return lambda key: True
  number = "\0"  # what no key has
  numbered = lambda key: re.escape(table.LAYER.sub(number, key)).replace(number, r"\d+")
  known = [re.compile(numbered(key)) for path, key, _ in keys if path not in shapes]
  known.append(big_vision.UNREAD)
  beside = open_clip.unread(keys)
  return lambda key: (key.endswith(nodes.BUFFERS) or beside(key)
                      or any(row.fullmatch(key) for row in known))


def _check_vocabulary(view: View, keys: table.Keys, config: ConfigDict) -> None:
  """Says which field is wrong where a padded vocabulary or a tied head would only be a shape."""
  named, llm = {ours: theirs for ours, theirs, _ in keys}, config.llm
  embedding, head = named.get("embed/embedding"), named.get("head/kernel")
  shape = view.shapes.get(embedding)
  if shape and shape[0] != llm.vocab_size:
    raise DataError(f"weights: {embedding} has {shape[0]} rows, expected {llm.vocab_size}; set "
                    f"config.llm.vocab_size={shape[0]} (it may be more than the tokenizer's)")
  if not shape or not head:
    return
  if not llm.tie_embeddings and head not in view.shapes:
    raise DataError(f"weights: {head} is missing, expected [{llm.vocab_size}, {llm.width}]; if the "
                    "checkpoint ties it to the embedding, set config.llm.tie_embeddings=True")
  if llm.tie_embeddings and head in view.shapes and not np.array_equal(
      view[head], view[embedding]):
    raise DataError(f"weights: {head} differs from {embedding}, expected the same; set "
                    "config.llm.tie_embeddings=False")
