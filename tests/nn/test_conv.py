"""The two forms of a depthwise convolution are one: values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.nn import conv

TOLERANCE = 2e-6  # measured 4e-7


def error(got, expected) -> float:
  return float(max(np.abs(np.asarray(a) - b).max() / np.abs(b).max()
                   for a, b in zip(got, map(np.asarray, expected), strict=True)))


@pytest.mark.parametrize("stride,side", [(1, 6), (2, 6), (2, 7)])
def test_shifted_is_convolved(stride, side):
  rng = np.random.default_rng(0)
  x, kernel = (jnp.asarray(rng.standard_normal(shape), jnp.float32)
               for shape in ((2, side, side + 2, 5), (3, 3, 1, 5)))

  @functools.partial(jax.jit, static_argnums=0)
  def run(form):
    both = []
    for padding in ("SAME", (1, 1)):
      pads = padding if isinstance(padding, str) else (padding, padding)
      y, back = jax.vjp(lambda x, w, pads=pads: form(x, w, stride=stride, pad=pads), x, kernel)
      both.append((y, *back(jnp.cos(y))))
    return both

  ours, theirs = run(conv.shifted), run(conv.convolved)
  for a, b in zip(ours, theirs, strict=True):
    assert error(a, b) < TOLERANCE
  if stride == 2 and side == 6:  # where the paddings differ they must not be mistaken
    assert error(ours[0], theirs[1]) > 100 * TOLERANCE
