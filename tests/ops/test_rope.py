"""RoPE: relative, norm-preserving, half-split."""

import jax.numpy as jnp
import numpy as np

from vlm_jax.ops.rope import rotate, rotation


def test_logits_depend_on_the_distance_only():
  rng = np.random.default_rng(0)
  q, k = jnp.asarray(rng.normal(size=(2, 1, 1, 1, 16)), jnp.float32)
  at = lambda x, p: rotate(x, rotation(jnp.asarray([[p]], jnp.int32), 16, 10000.0))
  near = float((at(q, 9) * at(k, 4)).sum())
  far = float((at(q, 105) * at(k, 100)).sum())
  other = float((at(q, 105) * at(k, 101)).sum())
  assert abs(near - far) < 1e-4 and abs(near - other) > 1e-2


def test_half_split_layout_from_the_definition():
  rng = np.random.default_rng(1)
  x = rng.normal(size=(1, 3, 2, 6)).astype(np.float32)
  positions = np.array([[0, 3, 11]], np.int32)
  angle = positions[0][:, None] * 100.0 ** (-np.arange(3) / 3)
  turn = np.exp(1j * angle)[:, None]
  halves = (x[0, ..., :3] + 1j * x[0, ..., 3:]) * turn
  want = np.concatenate([halves.real, halves.imag], -1)
  got = rotate(jnp.asarray(x), rotation(jnp.asarray(positions), 6, 100.0))[0]
  np.testing.assert_allclose(got, want, atol=1e-5)
  interleaved = (x[0, ..., 0::2] + 1j * x[0, ..., 1::2]) * turn
  wrong = np.stack([interleaved.real, interleaved.imag], -1).reshape(want.shape)
  assert np.abs(np.asarray(got) - wrong).max() > 1e-2
