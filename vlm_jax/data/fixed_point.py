"""Resizing 8-bit pixels as torch does on a CPU: 16-bit weights, rows first, rounded in between.

`torch.nn.functional.interpolate(antialias=True)` of uint8 tensors, which torchvision's resize
calls, rounds the weights of an axis to so many bits that the largest of them fits into 16, sums in
whole numbers, and rounds and clips to 8 bits after either axis (UpSampleKernel.cpp of
github.com/pytorch/pytorch).
"""

import functools
from collections.abc import Callable

import numpy as np


def _triangle(x: np.ndarray) -> np.ndarray:
  return np.maximum(0.0, 1 - np.abs(x))


def _cubic(x: np.ndarray) -> np.ndarray:
  """Keys' kernel with a = -0.5."""
  x = np.abs(x)
  return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1,
                  np.where(x < 2, -0.5 * (((x - 5) * x + 8) * x - 4), 0.0))


# Name to the kernel and how many pixels it reaches to either side.
FILTERS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
  "bilinear": (_triangle, 1.0), "bicubic": (_cubic, 2.0)}


def resize(pixels: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
  """Resizes u8[H,W,C] to u8[height,width,C].

  Args:
    pixels: the image.
    size: (width, height).
    name: of `FILTERS`.
  """
  for axis, new in ((1, size[0]), (0, size[1])):
    if new != pixels.shape[axis]:
      pixels = _along(pixels, axis, *_weights(pixels.shape[axis], new, name))
  return pixels


def _along(pixels: np.ndarray, axis: int, first: np.ndarray, weights: np.ndarray, bits: int
           ) -> np.ndarray:
  """One axis, a tap at a time: row i of `weights` is for the pixels from first[i] on."""
  lines = np.moveaxis(pixels, axis, 0)
  total = np.full((len(first), *lines.shape[1:]), 1 << (bits - 1), np.int32)
  for tap in range(weights.shape[1]):
    index = np.minimum(first + tap, len(lines) - 1)  # where the weight is 0
    total += weights[:, tap].reshape(-1, 1, 1) * lines[index]
  return np.moveaxis(np.clip(total >> bits, 0, 255).astype(np.uint8), 0, axis)


@functools.lru_cache(maxsize=512)
def _weights(old: int, new: int, name: str) -> tuple[np.ndarray, np.ndarray, int]:
  """First pixel i64[new], weights i32[new, taps] and their fractional bits."""
  kernel, reach = FILTERS[name]
  scale = old / new
  support, wide = reach * max(scale, 1.0), max(scale, 1.0)
  centre = scale * (np.arange(new) + 0.5)
  first = np.maximum((centre - support + 0.5).astype(int), 0)
  taps = np.minimum((centre + support + 0.5).astype(int), old) - first
  steps = np.arange(taps.max())
  weights = kernel((steps + first[:, None] - centre[:, None] + 0.5) / wide)
  weights = np.where(steps < taps[:, None], weights, 0.0)
  weights /= weights.sum(1, keepdims=True)
  bits = 0
  while bits < 22 and int(0.5 + weights.max() * (1 << (bits + 1))) < 1 << 15:
    bits += 1
  scaled = weights * (1 << bits)
  return first, np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int32), bits
