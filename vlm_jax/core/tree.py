"""Nested dicts and their flat form, {"llm/norm/scale": leaf}."""

from collections.abc import Iterable, Mapping
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


def unite(trees: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
  """One nested dict with the keys of all: the position in the data of all hosts from those of each.

  Where two have the same leaf, the later one's is kept.
  """
  whole: dict[str, Any] = {}
  for tree in trees:
    for key, value in tree.items():
      both = isinstance(value, dict) and isinstance(whole.get(key), dict)
      whole[key] = unite([whole[key], value]) if both else value
  return whole
