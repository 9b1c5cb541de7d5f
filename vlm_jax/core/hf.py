"""Nodes of Hugging Face's config.json: fields that change their name, activations, settings.

A published module reads and writes its own node with these (`read_hf`, `write_hf` beside its KEYS).
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from vlm_jax.core.errors import UsageError

# Ours to theirs; the first of theirs is written, all are read.
ACTIVATIONS = {
  "gelu": ("gelu",),
  "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new"),
  "quick_gelu": ("quick_gelu",),
  "relu": ("relu",),
  "relu2": ("relu2",),
  "silu": ("silu", "swish"),
}


class Field(NamedTuple):
  """A field that only changes its name; `default` is what theirs means when it is absent."""

  ours: str
  theirs: str
  default: Any


def read(theirs: Mapping[str, Any], fields: Iterable[Field]) -> dict[str, Any]:
  """Our names to their values."""
  return {field.ours: theirs.get(field.theirs, field.default) for field in fields}


def write(config: Mapping[str, Any], fields: Iterable[Field]) -> dict[str, Any]:
  """Their names to our values."""
  return {field.theirs: config[field.ours] for field in fields}


def expect(theirs: Mapping[str, Any], name: str, default: Any, needed: Any) -> None:
  """Checks that their setting `name` is the only value that our module has.

  Raises:
    UsageError: it is another one.
  """
  value = theirs.get(name, default)
  if value != needed:
    raise UsageError(f"config.json: {place(theirs, name)} is {value!r}; only {needed!r} can be "
                     "imported")


def activation(theirs: Mapping[str, Any], name: str, default: str) -> str:
  """Our name of the activation that their setting `name` names.

  Raises:
    UsageError: one we do not have.
  """
  value = theirs.get(name, default)
  for ours, names in ACTIVATIONS.items():
    if value in names:
      return ours
  raise UsageError(f"config.json: {place(theirs, name)} is '{value}'; known: "
                   f"{', '.join(name for names in ACTIVATIONS.values() for name in names)}")


def place(theirs: Mapping[str, Any], name: str) -> str:
  """How an error names a setting: by its node's model_type, "llama.hidden_act"."""
  kind = theirs.get("model_type")
  return f"{kind}.{name}" if kind and name != "model_type" else name
