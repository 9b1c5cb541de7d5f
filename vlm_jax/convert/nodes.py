"""Which module a node of Hugging Face's config.json describes: found by its model_type.

Every published module of a floor names its MODEL_TYPES and has, beside its KEYS, two functions:

  read_hf(theirs)   their node to the fields of ours (`config.llm`, `config.tower`)
  write_hf(config)  the inverse, with its model_type

and perhaps UNREAD, the keys that a file may hold beside them. A directory with one module alone (a
language model, a tower) is read and written here too.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from ml_collections import ConfigDict, FrozenConfigDict

from vlm_jax.convert import safetensors_io, table
from vlm_jax.core import fusion
from vlm_jax.core.errors import DataError, UsageError, nearest
from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.precision import Precision
from vlm_jax.core.tree import flatten
from vlm_jax.core.typing import Params

EMBEDDING, HEAD = "embed/embedding", "lm_head.weight"  # of a language model; the second is theirs
SPELLINGS = ((r"^(vision|text)_model\.", ""),)  # towers alone, as transformers 4 writes them
BUFFERS = ("position_ids", "rotary_emb.inv_freq")  # constants that old files store


def modules(floor: str) -> dict[str, ModuleType]:
  """Model_type to the published module of a floor ("llm", "towers") that has it."""
  found = {}
  for name in fusion.names(floor):
    module = fusion.find(floor, name)
    found |= dict.fromkeys(getattr(module, "MODEL_TYPES", ()), module)
  return found


def read(theirs: Mapping[str, Any], floor: str, default: str = "") -> dict[str, Any]:
  """The fields of our node, `name` included.

  Args:
    theirs: their node.
    floor: where its module is.
    default: the model_type of a node that has none.

  Raises:
    UsageError: no module has this model_type, or it lacks a setting.
  """
  kind, known = theirs.get("model_type", default), modules(floor)
  if kind not in known:
    raise UsageError(f"config.json: model_type is '{kind}', which is no module of vlm_jax/{floor}; "
                     f"{nearest(kind, known)}")
  name = known[kind].__name__.rpartition(".")[2]
  return {"name": name, **known[kind].read_hf({**theirs, "model_type": kind})}


def write(config: ConfigDict, floor: str) -> dict[str, Any]:
  """Their node of ours (`config.llm`, `config.tower`).

  Raises:
    UsageError: the module is not a published one, or its fields are of no published model.
  """
  module = fusion.find(floor, config.name)
  if not hasattr(module, "write_hf"):
    known = sorted({other.__name__.rpartition(".")[2] for other in modules(floor).values()})
    raise UsageError(f"config: '{config.name}' of vlm_jax/{floor} has no model_type of Hugging "
                     f"Face's; these can be written: {', '.join(known)}")
  return module.write_hf(config)


def read_node(directory: str | os.PathLike, floor: str) -> tuple[dict[str, Any], Params]:
  """Reads a checkpoint of one module, e.g. a LlamaForCausalLM.

  Args:
    directory: holds config.json and safetensors weights.
    floor: where the module is, "llm" or "towers".

  Returns:
    The fields of its config node (`config.llm`), `name` included, and its parameters as numpy
    arrays in the file's dtypes.

  Raises:
    DataError: a file is missing or damaged, keys are missing or unexpected, shapes are wrong.
    UsageError: config.json is of no module of the floor, or asks for what it does not have.
  """
  fields = read(safetensors_io.read_json(Path(directory) / "config.json"), floor)
  with safetensors_io.Reader(directory) as reader:
    tied = HEAD if fields.get("tie_embeddings") else None
    unread = getattr(fusion.find(floor, fields["name"]), "UNREAD", ())
    return fields, load(reader, entries(fields, floor), tied, table.renamer(SPELLINGS), unread)


def write_node(
  directory: str | os.PathLike,
  floor: str,
  config: ConfigDict,
  params: Params,
  more: Mapping[str, Any] | None = None,
  shard_bytes: int = safetensors_io.SHARD_BYTES,
) -> None:
  """Writes a checkpoint of one module that transformers loads.

  Args:
    directory: made if missing; must not hold a checkpoint.
    floor: where the module is.
    config: its node, e.g. `config.llm`.
    params: its parameters, without metadata boxes; dtypes are kept.
    more: what else config.json says, e.g. max_position_embeddings.
    shard_bytes: largest weight file.

  Raises:
    UsageError: the directory holds a checkpoint, or the module is no published one.
    DiskError: it cannot be written.
  """
  dtype = np.dtype(jax.tree.leaves(params)[0].dtype)
  theirs = {**write(config, floor), "dtype": dtype.name, **(more or {})}
  tensors = table.export(params, entries(config, floor))
  directory = safetensors_io.new_directory(directory)
  safetensors_io.write(directory, tensors, shard_bytes)
  safetensors_io.write_json(directory / "config.json", theirs)


def _decode(model: Any) -> Any:
  slots = jnp.zeros((1, 1), jnp.int32)
  return model(model.embed(slots), slots, IntervalMask(slots, slots))


def _encode_and_decode(model: Any) -> Any:
  slots = jnp.zeros((1, 1), jnp.int32)
  mask = IntervalMask(slots, slots)
  memory = model.encode(model.embed(slots, slots, "encoder"), slots, mask)
  return model(model.embed(slots, slots, "decoder"), slots, memory, mask, mask)


CALLS = {  # a call of everything in a language model, by its KIND
  "decoder": _decode,
  "encoder-decoder": _encode_and_decode,
  "text tower": lambda model: model(jnp.zeros((1, model.config.positions), jnp.int32)),
}


def entries(config: Mapping[str, Any], floor: str) -> list[table.Entry]:
  """Every tensor of a checkpoint of one module, whose config node has at least its own fields."""
  module = fusion.find(floor, config["name"])
  node = FrozenConfigDict({**config, "remat": "none", "unroll": 1})
  attention = FrozenConfigDict({"implementation": "auto", "block_q": 0, "block_k": 0})
  model = module.Model(node, attention, Precision())

  def init() -> Params:
    if floor == "towers":
      run = lambda model: model(jnp.zeros((1, 1, node.image_size, node.image_size, 3), jnp.uint8))
    else:
      run = CALLS[module.KIND]
    return meta.unbox(model.init(jax.random.key(0), method=run))["params"]

  shapes = {path: leaf.shape for path, leaf in flatten(jax.eval_shape(init)).items()}
  return table.entries([("", "", module.KEYS)], shapes)


def load(
  source: table.Source,
  expected: list[table.Entry],
  tied: str | None = None,
  rename: Callable[[str], str] = lambda key: key,
  unread: tuple[str, ...] = (),
  dtype: np.dtype | None = None,
  read: Callable[..., Any] = table.load,
) -> Any:
  """The parameters of a checkpoint with a language model in it.

  Args:
    source: their tensors.
    expected: from `table.entries`.
    tied: the canonical key of a head that is tied to the embedding, which files may hold or not.
    rename: their key in this file to its canonical spelling.
    unread: canonical keys that the model is known not to read.
    dtype: of the parameters; None: the file's.
    read: `table.load`, or `table.open_pieces` to read them later.

  Returns:
    What `read` does.

  Raises:
    DataError: as `table.load`, or a head that is said to be tied and differs from the embedding.
  """
  params = read(source, expected, rename, lambda key: (
    key.endswith(BUFFERS) or key in unread or key == tied), dtype)
  key = next((entry.key for entry in expected if entry.path.endswith(EMBEDDING)), None)
  names = {rename(name): name for name in source.shapes}
  if tied in names and not np.array_equal(source[names[tied]], source[names[key]]):
    raise DataError(f"weights: {names[tied]} differs from the embedding although config.json ties "
                    "them; set tie_word_embeddings to false in config.json")
  return params
