"""Nested dicts and their flat form, {"llm/norm/scale": leaf}."""

from collections.abc import Mapping
from typing import Any

import jax


def flatten(tree: Any) -> dict[str, Any]:
  """A nested dict as {"a/b/c": leaf}, in the order of its sorted paths."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `flatten`."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree
