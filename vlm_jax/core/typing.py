"""The letters used for dimensions everywhere: docstrings, comments, einsums.

  B batch (packed rows)      T query or text length    S key length
  N images per row           P patches per image       K media tokens (slots) per image
  R rows of the media table  H heads                   G key/value groups
  D model width              F mlp width               C head width
  V vocabulary

`f[B,T,D]` is a floating array of that shape, `i32[B,T]` an int32 one, `u8`, `bool` alike.
"""

from typing import Any, TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array | np.ndarray
Params: TypeAlias = dict[str, Any]  # nested dict of arrays, the `params` collection
