"""Digests of arrays and of JSON values: whether something is still what it was."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlm_jax.core import pieces
from vlm_jax.core.pieces import Pieces


def of_json(value: Any) -> str:
  """The digest of a JSON value; the order of keys does not count."""
  text = json.dumps(value, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def of_arrays(tree: Any) -> dict[str, dict[str, Any]]:
  """Path to {"shape", "dtype", "digest"} of every array of a tree.

  An array may be spread over hosts, or be `Pieces`, of which one at a time is in memory.
  """
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
  leaves = [leaf for _, leaf in flat]
  # Collectives must run in one order on all hosts; pieces are read for want of memory.
  if jax.process_count() > 1 or any(isinstance(leaf, Pieces) for leaf in leaves):
    return dict(zip(names, map(_entry, leaves), strict=True))
  with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter
    return dict(zip(names, pool.map(_entry, leaves), strict=True))


def _entry(leaf: Any) -> dict[str, Any]:
  shape, dtype = list(leaf.shape), str(np.dtype(leaf.dtype))
  digest = hashlib.blake2b(f"{shape} {dtype}".encode(), digest_size=16)
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    # One at a time, so that a gather never holds more than one leaf.
    leaf = np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
  for piece in pieces.of(leaf):
    digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
  return {"shape": shape, "dtype": dtype, "digest": digest.hexdigest()}
