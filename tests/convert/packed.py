"""What parity tests share that run a published model once, and ours on the same documents packed.

Not named conftest or test_*: import it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tests.numbers import error
from vlm_jax.core.batch import from_flat
from vlm_jax.core.fusion import find_fusion
from vlm_jax.data.pack import Packer
from vlm_jax.generate.prompts import layouts


class Packed:
  """Has `config`, `documents` and their `logits`, f32[t,V] of every document."""

  def batch(self, config=None):
    """The packed rows, and (row, start, size) of every document."""
    config = config or self.config
    module = find_fusion(config)
    packer = Packer(module.fields(config), module.axes(config), config.data.rows)
    assert packer.add(layouts(self.documents, config))
    packed, where = packer.build(), {}
    for row, content in enumerate(packed.rows):
      start = 0
      for layout in content:
        where[layout.key] = row, start, layout.sizes["text"]
        start += layout.sizes["text"]
    assert max(map(len, packed.rows)) > 1
    batch = from_flat(jax.tree.map(jnp.asarray, packed.arrays))
    return batch, [where[key] for key in sorted(where)]

  def error(self, logits, where) -> float:
    """max|a - b| / max|b| over the documents."""
    return max(error(np.asarray(logits)[row, start : start + size], theirs)
               for (row, start, size), theirs in zip(where, self.logits, strict=True))
