"""The random changes that training may make to pictures.

Each takes u8[H,W,3] and a generator and gives u8[H,W,3] of the same size; each draws a fixed number
of values, so that adding one never changes what another draws before it.
"""

from collections.abc import Callable, Sequence

import numpy as np

from vlm_jax.core.errors import UsageError, nearest


def flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Mirrors left and right, every second time."""
  return image[:, ::-1] if rng.random() < 0.5 else image


def vflip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Mirrors top and bottom, every second time."""
  return image[::-1] if rng.random() < 0.5 else image


def rot90(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Turns a square image by 0, 90, 180 or 270 degrees."""
  return np.rot90(image, int(rng.integers(4)))


def translate(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Shifts by up to a sixteenth of each side; the edge pixels fill the gap."""
  height, width = image.shape[:2]
  down = rng.integers(-(height // 16), height // 16 + 1)
  right = rng.integers(-(width // 16), width // 16 + 1)
  rows = np.clip(np.arange(height) - down, 0, height - 1)
  columns = np.clip(np.arange(width) - right, 0, width - 1)
  return image[rows][:, columns]


AUGMENTATIONS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
  function.__name__: function for function in (flip, vflip, rot90, translate)
}


def check(names: Sequence[str], field: str) -> None:
  """Raises a UsageError that names `field` when an augmentation does not exist."""
  for name in names:
    if name not in AUGMENTATIONS:
      raise UsageError(f"{field}: no augmentation '{name}'; {nearest(name, AUGMENTATIONS)}")


def apply(image: np.ndarray, names: Sequence[str], rng: np.random.Generator) -> np.ndarray:
  """Applies augmentations in order; contiguous u8[H,W,3]."""
  for name in names:
    image = AUGMENTATIONS[name](image, rng)
  return np.ascontiguousarray(image)
