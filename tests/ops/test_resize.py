"""Resized tables of positions against torch's interpolation, the published towers and scipy."""

import jax
import numpy as np
import pytest
import scipy.ndimage
import torch
from torch.nn.functional import interpolate

from tests.numbers import error
from vlm_jax.core.errors import UsageError
from vlm_jax.ops.resize import RESIZES, resize_grid

TOLERANCE, LOUD = 2e-6, 100  # measured: at most 6e-7
GRIDS = (((4, 4), (7, 7)), ((7, 7), (4, 4)), ((5, 5), (3, 9)), ((6, 6), (6, 5)), ((3, 3), (1, 2)))
WIDTH = 6


def table(grid):
  return np.random.default_rng(0).normal(size=(grid[0] * grid[1], WIDTH)).astype(np.float32)


def theirs(cells, new, how):
  """By torch or scipy: f[h, w, D] to f[h', w', D]."""
  if how == "bilinear_corners":
    zoom = [b / a for a, b in zip(cells.shape, (*new, WIDTH), strict=True)]
    return scipy.ndimage.zoom(cells, zoom, order=1)
  mode, _, kind = how.partition("_")
  maps = torch.tensor(cells).permute(2, 0, 1)[None]
  if kind == "offset":
    scale = tuple((b + 0.1) / a for a, b in zip(cells.shape, new, strict=False))
    out = interpolate(maps, scale_factor=scale, mode=mode, align_corners=False)
  else:
    out = interpolate(maps, new, mode=mode, align_corners=False, antialias=kind == "antialias")
  return out[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("how", RESIZES)
@pytest.mark.parametrize("old, new", GRIDS)
def test_values(how, old, new):
  values = table(old)
  expected = theirs(values.reshape(*old, WIDTH), new, how).reshape(-1, WIDTH)
  assert expected.shape == (new[0] * new[1], WIDTH) and expected.std() > 0.1
  assert error(resize_grid(values, old, new, how), expected) < TOLERANCE
  # Twins: every other interpolation, wherever it is another function there.
  others = [other for other in RESIZES if other != how]
  different = [other for other in others
               if error(resize_grid(values, old, new, other), expected) > LOUD * TOLERANCE]
  assert different == others or 1 in new


def test_gradient_is_torchs():
  old, new = (5, 5), (7, 4)
  values, cotangent = table(old), table(new)
  maps = torch.tensor(values.reshape(*old, WIDTH)).permute(2, 0, 1)[None].requires_grad_()
  out = interpolate(maps, new, mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
  (out.reshape(-1, WIDTH) * torch.tensor(cotangent)).sum().backward()
  expected = maps.grad[0].permute(1, 2, 0).reshape(-1, WIDTH).numpy()
  got = jax.grad(lambda x: (resize_grid(x, old, new, "bicubic") * cotangent).sum())(values)
  assert error(got, expected) < TOLERANCE


@pytest.mark.parametrize("how", RESIZES)
def test_a_grid_of_the_same_size_is_untouched_and_a_constant_stays_one(how):
  values = table((4, 3))
  assert resize_grid(values, (4, 3), (4, 3), how) is values
  ones = np.ones((12, 1), np.float32)
  np.testing.assert_allclose(resize_grid(ones, (4, 3), (9, 2), how), 1, atol=1e-6)


def test_what_cannot_be():
  with pytest.raises(UsageError, match="position_resize is 'bicubik'; did you mean 'bicubic'"):
    resize_grid(table((2, 2)), (2, 2), (3, 3), "bicubik")
  with pytest.raises(ValueError, match="no grid of 3 x 3"):
    resize_grid(table((2, 2)), (3, 3), (2, 2), "bicubic")
