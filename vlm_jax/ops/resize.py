"""Tables of positions resized to another grid: the interpolations that published towers mean.

They are different functions, and a checkpoint runs well with exactly one of them:

  bicubic             cubic with a = -0.75, the edge repeated, nothing averaged when shrinking:
                      CLIP, SigLIP, ViT and DINOv2 in transformers
  bicubic_offset      the same with the scale (new + 0.1) / old: the first DINOv2 (arXiv:2304.07193)
  bicubic_antialias   cubic with a = -0.5, widened when shrinking, renormalised at the edge: DINOv2
                      with registers (arXiv:2309.16588)
  bilinear_antialias  the same with a triangle: SigLIP 2 (arXiv:2502.14786, NaFlex)
  bilinear_corners    corner pixels stay at the corners: big_vision (arXiv:2106.10270)

All are separable and linear, so each axis is a matrix and the gradient is its transpose.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.typing import Array


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
  """The kernel of cubic convolution (Keys 1981, equation 15 with a free)."""
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = a * (((x - 5) * x + 8) * x - 4)
  return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _taps(old: int, where: np.ndarray, kernel: Callable[[np.ndarray], np.ndarray],
          reach: int) -> np.ndarray:
  """[new, old] weights of the 2 * reach samples around every position, the edge repeated."""
  first = np.floor(where).astype(int) - reach + 1
  matrix = np.zeros((len(where), old))
  for step in range(2 * reach):
    index = first + step
    np.add.at(matrix, (np.arange(len(where)), np.clip(index, 0, old - 1)), kernel(where - index))
  return matrix


def _triangle(x: np.ndarray) -> np.ndarray:
  return np.maximum(0.0, 1 - np.abs(x))


def _centers(new: int, scale: float) -> np.ndarray:
  """Where the centres of `new` pixels lie among the old ones, `scale` old pixels a new one."""
  return (np.arange(new) + 0.5) * scale - 0.5


def _averaged(old: int, new: int, kernel: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
  """[new, old] weights of a kernel as wide as the new pixels, what lies outside left out."""
  distance = np.arange(old) - _centers(new, old / new)[:, None]
  weights = kernel(distance / max(old / new, 1.0))
  return weights / weights.sum(1, keepdims=True)


def _corners(old: int, new: int) -> np.ndarray:
  return _taps(old, np.linspace(0, old - 1, new), _triangle, 1)


_torch_cubic, _pillow_cubic = functools.partial(_cubic, a=-0.75), functools.partial(_cubic, a=-0.5)
RESIZES: Mapping[str, Callable[[int, int], np.ndarray]] = {
  "bicubic": lambda old, new: _taps(old, _centers(new, old / new), _torch_cubic, 2),
  "bicubic_offset": lambda old, new: _taps(old, _centers(new, old / (new + 0.1)), _torch_cubic, 2),
  "bicubic_antialias": lambda old, new: _averaged(old, new, _pillow_cubic),
  "bilinear_antialias": lambda old, new: _averaged(old, new, _triangle),
  "bilinear_corners": _corners,
}


def resize_each(table: Array, old: tuple[int, int], grids: Array, cells: int, how: str) -> Array:
  """A table with a row for every cell of a grid, resized for images of different grids.

  Args:
    table: f[h * w, D] in reading order.
    old: (h, w).
    grids: i32[n, 2], the rows and columns of each image.
    cells: of the largest grid, at least rows * columns of all.
    how: "bilinear_antialias", the one with which grids differ from image to image (SigLIP 2).

  Returns:
    f[n, cells, D] in the dtype of the table: the cells of each grid in reading order, and behind
    them what means nothing.

  Raises:
    UsageError: another interpolation.
  """
  if how != "bilinear_antialias":
    raise UsageError(f"config.tower.position_resize is '{how}'; images of different grids need "
                     "'bilinear_antialias'")
  grids = jnp.maximum(grids, 1)
  row, column = jnp.divmod(jnp.arange(cells), grids[:, 1:])
  down, across = (_triangles(size, new, where) for size, new, where in (
    (old[0], grids[:, :1], row), (old[1], grids[:, 1:], column)))
  found = jnp.einsum("npi,npj,ijd->npd", down, across,
                     table.astype(jnp.float32).reshape(*old, -1),
                     precision=jax.lax.Precision.HIGHEST)
  return found.astype(table.dtype)


def _triangles(old: int, new: Array, where: Array) -> Array:
  """f32[n, cells, old], the row `where` i32[n, cells] of `_averaged` with triangles; new i32[n, 1].
  """
  scale = old / new.astype(jnp.float32)
  centre = (where + 0.5) * scale - 0.5
  distance = (jnp.arange(old) - centre[..., None]) / jnp.maximum(scale, 1.0)[..., None]
  weights = jnp.maximum(0.0, 1 - jnp.abs(distance))
  return weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-6)


def resize_grid(table: Array, old: tuple[int, int], new: tuple[int, int], how: str) -> Array:
  """Resizes a table with a row for every cell of a grid; the same grid gives the same table.

  Args:
    table: f[h * w, D] in reading order.
    old: (h, w).
    new: (h', w').
    how: a name of `RESIZES`.

  Returns:
    f[h' * w', D], computed in f32, in the dtype of the table.

  Raises:
    UsageError: no such interpolation.
    ValueError: the table has not h * w rows.
  """
  if how not in RESIZES:
    raise UsageError(f"config.tower.position_resize is '{how}'; {nearest(how, RESIZES)}")
  if table.shape[0] != old[0] * old[1]:
    raise ValueError(f"a table of {table.shape[0]} rows is no grid of {old[0]} x {old[1]}")
  if old == new:
    return table
  down, across = (RESIZES[how](a, b).astype(np.float32) for a, b in zip(old, new, strict=True))
  cells = table.astype(jnp.float32).reshape(*old, -1)
  cells = jnp.einsum("ih,jw,hwd->ijd", down, across, cells, precision=jax.lax.Precision.HIGHEST)
  return cells.reshape(new[0] * new[1], -1).astype(table.dtype)
