"""RoPE: relative, norm-preserving, and every kind as transformers computes it."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
  GlmConfig,
  Llama4VisionConfig,
  LlamaConfig,
  PixtralVisionConfig,
  Qwen2VLTextConfig,
)
from transformers.models.glm import modeling_glm as glm
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama4 import modeling_llama4 as llama4
from transformers.models.persimmon import modeling_persimmon as persimmon
from transformers.models.pixtral import modeling_pixtral as pixtral
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

from vlm_jax.ops import rope
from vlm_jax.ops.rope import rotate, rotation, sequence

TOLERANCE = 5e-5  # both sides have f32 angles of a few hundred radians


@pytest.mark.parametrize("pairs", (
  sequence(16, 1e4), sequence(8, 1e4), sequence(16, 1e4).interleaved(),
), ids=("whole", "partial", "interleaved"))
def test_logits_depend_on_the_distance_only(pairs):
  rng = np.random.default_rng(0)
  q, k = jnp.asarray(rng.normal(size=(2, 1, 1, 1, 16)), jnp.float32)
  at = lambda x, p: rotate(x, rotation(jnp.asarray([[p]], jnp.int32), pairs))
  near = float((at(q, 9) * at(k, 4)).sum())
  far = float((at(q, 105) * at(k, 100)).sum())
  other = float((at(q, 105) * at(k, 101)).sum())
  assert abs(near - far) < 1e-4 and abs(near - other) > 1e-2


@pytest.mark.parametrize("layout", (rope.HALVES, rope.INTERLEAVED))
def test_layouts_from_the_definition(layout):
  rng = np.random.default_rng(1)
  x = rng.normal(size=(1, 3, 2, 6)).astype(np.float32)
  positions = np.array([[0, 3, 11]], np.int32)
  angle = positions[0][:, None] * 100.0 ** (-np.arange(3) / 3)
  turn = np.exp(1j * angle)[:, None]
  halves = (x[0, ..., :3] + 1j * x[0, ..., 3:]) * turn
  want = {rope.HALVES: np.concatenate([halves.real, halves.imag], -1)}
  neighbours = (x[0, ..., 0::2] + 1j * x[0, ..., 1::2]) * turn
  want[rope.INTERLEAVED] = np.stack([neighbours.real, neighbours.imag], -1).reshape(3, 2, 6)
  pairs = sequence(6, 100.0)
  pairs = pairs if layout == rope.HALVES else pairs.interleaved()
  got = rotate(jnp.asarray(x), rotation(jnp.asarray(positions), pairs))[0]
  np.testing.assert_allclose(got, want.pop(layout), atol=1e-5)
  (wrong,) = want.values()
  assert np.abs(np.asarray(got) - wrong).max() > 1e-2


def drawn(kind: str, axes: int = 1, length: int = 9, width: int = 32):
  """Random q f[2,9,3,C] and positions i32[2,9(,A)] below 300, seeded by the kind."""
  rng = np.random.default_rng(len(kind))
  x = rng.normal(size=(2, length, 3, width)).astype(np.float32)
  positions = rng.integers(0, 300, (2, length, axes)).astype(np.int32)
  return x, positions if axes > 1 else positions[..., 0]


def heads_first(x):
  return torch.tensor(x).transpose(1, 2)


def theirs(module, embedding, x, positions):
  """transformers' rotation of x; its heads come before its slots."""
  cos, sin = embedding(torch.tensor(x), torch.tensor(positions).long())
  out = module.apply_rotary_pos_emb(heads_first(x), heads_first(x), cos, sin)[0]
  return out.transpose(1, 2).numpy()


def rope_config(cls, **parameters):
  """A config of heads with 32 channels."""
  return cls(hidden_size=96, num_attention_heads=3, head_dim=32, rope_parameters=parameters,
             max_position_embeddings=512)


def plain():
  x, positions = drawn("plain")
  config = rope_config(LlamaConfig, rope_type="default", rope_theta=500.0)
  return x, positions, sequence(32, 500.0), theirs(
    llama, llama.LlamaRotaryEmbedding(config), x, positions)


def linear():
  x, positions = drawn("linear")
  config = rope_config(LlamaConfig, rope_type="linear", rope_theta=500.0, factor=4.0)
  return x, positions, rope.stretched(sequence(32, 500.0), 4.0), theirs(
    llama, llama.LlamaRotaryEmbedding(config), x, positions)


def llama3():
  x, positions = drawn("llama3")
  numbers = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                 original_max_position_embeddings=128)
  config = rope_config(LlamaConfig, rope_type="llama3", rope_theta=500.0, **numbers)
  pairs = rope.stretched_llama3(sequence(32, 500.0), 8.0, 1.0, 4.0, 128)
  # All three cases of the definition are there: kept, on the ramp, stretched.
  share = pairs.frequency / sequence(32, 500.0).frequency
  assert share[0] == 1 and share[-1] == 1 / 8 and ((share > 1 / 8) & (share < 1)).any()
  return x, positions, pairs, theirs(llama, llama.LlamaRotaryEmbedding(config), x, positions)


def partial():
  """Persimmon (Fuyu) turns the first half of the channels, in halves of that half."""
  x, positions = drawn("partial")
  config = rope_config(LlamaConfig, rope_type="default", rope_theta=25000.0,
                       partial_rotary_factor=0.5)
  embedding = persimmon.PersimmonRotaryEmbedding(config)
  cos, sin = embedding(torch.tensor(x), torch.tensor(positions).long())
  turned = persimmon.apply_rotary_pos_emb(
    heads_first(x[..., :16]), heads_first(x[..., :16]), cos, sin)[0].transpose(1, 2)
  want = np.concatenate([turned.numpy(), x[..., 16:]], -1)
  return x, positions, sequence(16, 25000.0), want


def partial_interleaved():
  x, positions = drawn("partial_interleaved")
  config = rope_config(GlmConfig, rope_type="default", rope_theta=10000.0,
                       partial_rotary_factor=0.5)
  return x, positions, sequence(16, 10000.0).interleaved(), theirs(
    glm, glm.GlmRotaryEmbedding(config), x, positions)


def multimodal():
  x, positions = drawn("multimodal", 3)
  config = rope_config(Qwen2VLTextConfig, rope_type="default", rope_theta=1e4,
                       mrope_section=[4, 6, 6])
  embedding = qwen2_vl.Qwen2VLRotaryEmbedding(config)
  want = theirs(qwen2_vl, embedding, x, positions.transpose(2, 0, 1))
  return x, positions, rope.sections(32, 1e4, (4, 6, 6)), want


def tower(module, embedding, x, positions):
  """A tower's rotation: slots of all images in one row, positions [slots, 2]."""
  cos, sin = embedding(torch.tensor(x[0]), torch.tensor(positions[0]).long())
  apply = getattr(module, "apply_rotary_pos_emb_vision", None)
  if apply:
    return apply(torch.tensor(x[0]), torch.tensor(x[0]), cos, sin)[0].numpy()[None]
  q = heads_first(x[:1])
  return module.apply_rotary_pos_emb(q, q, cos, sin, unsqueeze_dim=0)[0].transpose(1, 2).numpy()


def pixtral_tower():
  x, positions = drawn("pixtral_tower", 2)
  config = PixtralVisionConfig(hidden_size=96, num_attention_heads=3, head_dim=32,
                               rope_parameters=dict(rope_type="axial", rope_theta=1e4))
  want = tower(pixtral, pixtral.PixtralVisionRotaryEmbedding(config), x, positions)
  return x[:1], positions[:1], rope.alternating(32, 1e4), want


def qwen_tower():
  x, positions = drawn("qwen_tower", 2)
  config = Qwen2VLVisionConfig(embed_dim=96, num_heads=3,
                               rope_parameters=dict(rope_type="axial", rope_theta=1e4))
  config.num_attention_heads = 3
  want = tower(qwen2_vl, qwen2_vl.Qwen2VLVisionRotaryEmbedding(config), x, positions)
  return x[:1], positions[:1], rope.axial(32, 1e4), want


def llama4_tower():
  """Columns before rows, both counted from 1, and neighbours are pairs."""
  config = Llama4VisionConfig(hidden_size=96, num_attention_heads=3, image_size=12, patch_size=4,
                              rope_parameters=dict(rope_type="default", rope_theta=1e4))
  x = drawn("llama4_tower")[0]
  turns = llama4.Llama4VisionRotaryEmbedding(config)(torch.tensor(x))[:9].reshape(1, 9, -1)
  want = llama4.apply_rotary_emb(torch.tensor(x), torch.tensor(x), turns)[0].numpy()
  rows, columns = np.divmod(np.arange(9, dtype=np.int32), 3)
  positions = np.broadcast_to(np.stack([columns, rows], -1) + 1, (2, 9, 2))
  return x, positions, rope.axial(32, 1e4).interleaved(), want


KINDS = (plain, linear, llama3, partial, partial_interleaved, multimodal, pixtral_tower, qwen_tower,
         llama4_tower)


def swapped(pairs):
  """The twin: the other layout."""
  if pairs.layout == rope.HALVES:
    return pairs.interleaved()
  return rope.Pairs(pairs.frequency, pairs.axis)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_is_what_transformers_computes(kind):
  x, positions, pairs, want = kind()
  run = lambda pairs, positions=positions: np.asarray(
    rotate(jnp.asarray(x), rotation(jnp.asarray(positions), pairs)))
  error = lambda got: np.abs(got - want).max() / np.abs(want).max()
  got = run(pairs)
  assert np.isfinite(got).all() and got.std() > 0.5 and error(got) < TOLERANCE
  assert error(run(swapped(pairs))) > 100 * TOLERANCE
  if pairs.axes > 1:  # Another twin: the positions of a slot in the wrong order.
    assert error(run(pairs, positions[..., ::-1])) > 100 * TOLERANCE


@pytest.mark.parametrize("kind,wrong", (
  (plain, linear), (plain, llama3), (qwen_tower, pixtral_tower),
))
def test_kinds_are_told_apart(kind, wrong):
  x, positions, _, want = kind()
  got = rotate(jnp.asarray(x), rotation(jnp.asarray(positions), wrong()[2]))
  assert np.abs(np.asarray(got) - want).max() > 100 * TOLERANCE * np.abs(want).max()


def test_text_in_sections_is_one_dimensional():
  x, positions = drawn("text")
  equal = jnp.asarray(np.stack([positions] * 3, -1))
  got = rotate(jnp.asarray(x), rotation(equal, rope.sections(32, 1e4, (4, 6, 6))))
  want = rotate(jnp.asarray(x), rotation(jnp.asarray(positions), sequence(32, 1e4)))
  np.testing.assert_array_equal(got, want)


def test_the_turn_is_f32_whatever_the_dtype():
  x, positions = drawn("bf16")
  low = jnp.asarray(x, jnp.bfloat16)
  got = rotate(low, rotation(jnp.asarray(positions), sequence(16, 1e4)))
  want = rotate(low.astype(jnp.float32), rotation(jnp.asarray(positions), sequence(16, 1e4)))
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


@pytest.mark.parametrize("call,message", [
  (lambda: sequence(7, 1e4), "must be even; got 7"),
  (lambda: rope.sections(32, 1e4, (4, 6)), "must have 16 pairs together"),
  (lambda: rope.axial(30, 1e4), "a multiple of 4; got 30"),
  (lambda: rotation(jnp.zeros((1, 4), jnp.int32), rope.axial(32, 1e4)), r"must be \[B,T,2\]"),
  (lambda: rotate(jnp.zeros((1, 4, 2, 8)), rotation(jnp.zeros((1, 4)), sequence(16, 1e4))),
   "heads of 16 channels, got 8"),
])
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
