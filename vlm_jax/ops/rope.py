"""Rotary position embedding (arXiv:2104.09864): every kind is a list of channel pairs.

A pair of channels turns by position * frequency. Kinds differ in the frequency of each pair, in the
position it reads when a slot has several (row and column; time, row and column), and in which two
channels are a pair. Pairs are made on the host; `rotation` and `rotate` are the same for all.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.core.typing import Array

HALVES, INTERLEAVED = "halves", "interleaved"


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
  """How every pair of channels turns; P pairs are the first 2P channels, the others stay.

  Attributes:
    frequency: f64[P], radians a position.
    axis: i32[P], which position of a slot the pair reads.
    layout: "halves", pair p is the channels (p, p + P), as in transformers' Llama; "interleaved",
      it is (2p, 2p + 1), as in Meta's checkpoints, GLM and Llama 4.
  """

  frequency: np.ndarray
  axis: np.ndarray
  layout: str = HALVES

  @property
  def axes(self) -> int:
    """A, how many positions a slot has."""
    return int(self.axis.max()) + 1

  def interleaved(self) -> "Pairs":
    """The same turns, of neighbouring channels."""
    return dataclasses.replace(self, layout=INTERLEAVED)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
  """The turns of some slots.

  Attributes:
    cos, sin: f32[B,T,P].
    layout: see `Pairs`.
  """

  cos: Array
  sin: Array
  layout: str = dataclasses.field(default=HALVES, metadata=dict(static=True))


def sequence(width: int, theta: float) -> Pairs:
  """Pairs of one position: pair c of P turns by theta ** (-c / P).

  Args:
    width: how many channels turn, even. C, or less for a partial rotation (Persimmon: C / 2).
    theta: base of the wavelengths.

  Raises:
    ValueError: an odd width.
  """
  if width % 2:
    raise ValueError(f"rope: channels turn in pairs, so width must be even; got {width}")
  pairs = width // 2
  frequency = float(theta) ** (-np.arange(pairs) / pairs)
  return Pairs(frequency, np.zeros(pairs, np.int32))


def sections(width: int, theta: float, sizes: tuple[int, ...]) -> Pairs:
  """The pairs of `sequence` dealt out in order: the first sizes[0] read position 0, and so on.

  M-RoPE of Qwen2-VL (arXiv:2409.12191, section 2.1): positions are (time, row, column), all three
  equal in text, and sizes are (16, 24, 24) of C = 128.

  Raises:
    ValueError: sizes that are not width / 2 together.
  """
  pairs = sequence(width, theta)
  if sum(sizes) != width // 2:
    raise ValueError(f"rope: sections {sizes} must have {width // 2} pairs together, half of the "
                     f"width {width}; they have {sum(sizes)}")
  return dataclasses.replace(pairs, axis=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))


def axial(width: int, theta: float, axes: int = 2) -> Pairs:
  """Every position has an equal share of the channels, and all the frequencies of such a width.

  2-D positions of patches in Qwen2-VL's tower (row, column) and, interleaved, in Llama 4's (column,
  row; both counted from 1).

  Raises:
    ValueError: a width that cannot be shared out.
  """
  if width % (2 * axes):
    raise ValueError(f"rope: {axes} positions share the width, so it must be a multiple of "
                     f"{2 * axes}; got {width}")
  share = sequence(width // axes, theta).frequency
  return Pairs(np.tile(share, axes), np.repeat(np.arange(axes, dtype=np.int32), len(share)))


def alternating(width: int, theta: float, axes: int = 2) -> Pairs:
  """Positions take turns: frequency c of `sequence` is of position c mod A; pairs of one together.

  2-D positions (row, column) of Pixtral's tower (arXiv:2410.07073, section 2).

  Raises:
    ValueError: a width that cannot be shared out.
  """
  pairs = axial(width, theta, axes)
  frequency = sequence(width, theta).frequency.reshape(-1, axes).T.reshape(-1)
  return dataclasses.replace(pairs, frequency=frequency)


def stretched(pairs: Pairs, factor: float) -> Pairs:
  """Positions divided by `factor` (arXiv:2306.15595); rope_type "linear" of transformers."""
  return dataclasses.replace(pairs, frequency=pairs.frequency / factor)


def stretched_llama3(pairs: Pairs, factor: float, low: float, high: float, length: int) -> Pairs:
  """Long waves stretched, short ones kept, a ramp between (Llama 3.1); rope_type "llama3".

  Args:
    pairs: any.
    factor: by how much long waves are stretched.
    low, high: waves longer than length / low are long, those shorter than length / high are short;
      transformers' low_freq_factor and high_freq_factor.
    length: of the context before; transformers' original_max_position_embeddings.
  """
  turns = length * pairs.frequency / (2 * math.pi)  # in one context
  kept = np.clip((turns - low) / (high - low), 0, 1)
  frequency = kept * pairs.frequency + (1 - kept) * pairs.frequency / factor
  return dataclasses.replace(pairs, frequency=frequency)


def rotation(positions: Array, pairs: Pairs) -> Rotation:
  """The turns of slots, made once for all layers: cosines are dear.

  Args:
    positions: i32[B,T], or i32[B,T,A] when pairs read several.
    pairs: see `Pairs`.

  Raises:
    ValueError: slots with fewer or more positions than the pairs read.
  """
  several = positions[..., None] if positions.ndim == 2 else positions
  if several.ndim != 3 or several.shape[-1] != pairs.axes:
    raise ValueError(f"rope: the pairs read {pairs.axes} positions a slot, so positions must be "
                     f"[B,T,{pairs.axes}]; got {positions.shape}")
  # A position of its own for each pair is a small gather; for one position it is a broadcast.
  own = several if pairs.axes == 1 else several[..., pairs.axis]
  angle = own.astype(jnp.float32) * pairs.frequency.astype(np.float32)
  return Rotation(jnp.cos(angle), jnp.sin(angle), pairs.layout)


def rotate(x: Array, by: Rotation) -> Array:
  """Turns the pairs of every head by their angles.

  Args:
    x: f[B,T,H,C], C at least 2P.
    by: the rotation of these slots.

  Returns:
    f[B,T,H,C] in x's dtype; the turn is f32.

  Raises:
    ValueError: heads narrower than the pairs.
  """
  cos, sin = by.cos[:, :, None], by.sin[:, :, None]
  width = 2 * cos.shape[-1]
  if x.shape[-1] < width:
    raise ValueError(f"rope: {width // 2} pairs need heads of {width} channels, got {x.shape[-1]}")
  turning = x[..., :width].astype(jnp.float32)
  if by.layout == HALVES:
    first, second = jnp.split(turning, 2, axis=-1)
  else:
    first, second = turning[..., 0::2], turning[..., 1::2]
  turned = (first * cos - second * sin, second * cos + first * sin)
  if by.layout == HALVES:
    y = jnp.concatenate(turned, axis=-1)
  else:
    y = jnp.stack(turned, axis=-1).reshape(turning.shape)
  return jnp.concatenate([y.astype(x.dtype), x[..., width:]], axis=-1)
