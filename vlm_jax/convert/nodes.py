"""Which module a node of Hugging Face's config.json describes: found by its model_type.

Every published module of a floor names its MODEL_TYPES and has, beside its KEYS, two functions:

  read_hf(theirs)   their node to the fields of ours (`config.llm`, `config.tower`)
  write_hf(config)  the inverse, with its model_type
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.core import fusion
from vlm_jax.core.errors import UsageError, nearest


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
