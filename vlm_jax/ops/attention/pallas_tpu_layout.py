"""What the TPU kernels walk over and keep on the chip: active pairs, block sizes, memory.

A kernel's grid has one step for each active pair of a query block and a key block, of all rows of
the batch together; the list of these pairs is prefetched to the scalar memory (SMEM), where the
index maps read it. So empty blocks cost nothing and short rows do not wait for long ones.
"""

import dataclasses

import jax
import jax.numpy as jnp

from vlm_jax.core.typing import Array
from vlm_jax.ops.attention.plan import EMPTY, FULL

LANES = 128
# Bits of a list entry: the pair is the first or the last of its run, or needs no mask.
STARTS, ENDS, WHOLE = 1, 2, 4
FLAG_BITS = 3
SMEM_BYTES = 2**20  # of a core, v5e to v6e
VMEM_BYTES = 2**25  # half of a v5p's, a quarter of a v5e's or v6e's: the limit we compile with
SPARE = 0.9  # the share of them that is used


@dataclasses.dataclass(frozen=True)
class Pairs:
  """How a list entry holds (batch row, run, member) in bits; one run is one output block.

  Attributes:
    runs, members: numbers of blocks; forward and dq run over query blocks, dkv over key blocks.
  """

  runs: int
  members: int

  def compact(self, kinds: Array) -> tuple[Array, Array]:
    """The active pairs in order, run by run.

    Args:
      kinds: i8[B,runs,members], of the plan.

    Returns:
      i32[B * runs * members], the active ones first, and their number i32[].
    """
    batch = kinds.shape[0]
    active = kinds != EMPTY
    count = jnp.cumsum(active, axis=-1, dtype=jnp.int32)
    row, run, member = (
      jax.lax.broadcasted_iota(jnp.int32, (batch, self.runs, self.members), axis)
      for axis in range(3)
    )
    entry = (((row << self._bits(self.runs)) | run) << self._bits(self.members)) | member
    flags = jnp.where(count == 1, STARTS, 0) | jnp.where(count == count[..., -1:], ENDS, 0)
    flags |= jnp.where(kinds == FULL, WHOLE, 0)
    entry = (entry << FLAG_BITS) | flags
    # Entries grow with (row, run, member), so sorting compacts: no scatter, which is slow on a TPU.
    entry = jnp.sort(jnp.where(active, entry, jnp.iinfo(jnp.int32).max).reshape(-1))
    number = active.sum(dtype=jnp.int32)
    # With no pair at all one step runs: it starts and ends no run and so changes nothing.
    return jnp.where(jnp.arange(entry.size) < number, entry, 0), jnp.maximum(number, 1)

  def fits(self, batch: int) -> bool:
    """Whether an entry has room for its bits."""
    bits = (self._bits(batch), self._bits(self.runs), self._bits(self.members), FLAG_BITS)
    return sum(bits) < 31

  def row(self, entry: Array) -> Array:
    """The batch row of a list entry."""
    return entry >> (FLAG_BITS + self._bits(self.members) + self._bits(self.runs))

  def run(self, entry: Array) -> Array:
    """The block that is written."""
    return (entry >> (FLAG_BITS + self._bits(self.members))) & (2 ** self._bits(self.runs) - 1)

  def member(self, entry: Array) -> Array:
    """The block that is met."""
    return (entry >> FLAG_BITS) & (2 ** self._bits(self.members) - 1)

  @staticmethod
  def _bits(number: int) -> int:
    return (number - 1).bit_length()


def smem_bytes(batch: int, blocks_q: int, blocks_k: int) -> int:
  """Scalar memory of the prefetched list, in bytes: one int32 for each block of the plan.

  A row of 8k takes 1 KiB in blocks of 512 x 512; in blocks of 1024 x 1024 one of 32k takes 4 KiB
  and one of 128k 64 KiB. So 14 rows of 128k on one device fit; past that `declines` says so.
  """
  return 4 * batch * blocks_q * blocks_k


def vmem_bytes(block_q: int, block_k: int, width: int, dtype) -> int:
  """Vector memory of the largest kernel, dkv, in bytes; an upper bound of what the compiler takes.

  It does not grow with the length, only with the blocks: bf16 of width 128 takes 7.5 MiB in blocks
  of 512 x 512 (8k) and 15.1 MiB in blocks of 1024 x 1024 (32k and 128k).
  """
  size, wide = jnp.dtype(dtype).itemsize, -(-width // LANES) * LANES
  moved = 2 * (2 * block_q + 4 * block_k) * wide * size  # two buffers of q, above; k, v, dk, dv
  kept = (2 * wide + 5 * LANES) * max(block_q, block_k) * 4
  rows = 2 * 8 * 4 * (6 * block_q + 3 * block_k)
  logits = 4 * chunk_of(max(block_q, block_k)) * max(block_q, block_k) * 4
  return moved + kept + rows + logits


def chunk_of(block: int) -> int:
  """Queries (in dkv, keys) of a block that a kernel computes at a time."""
  return next((size for size in (512, 384, 256) if block % size == 0), min(block, LANES))


def block_sizes(
  length: int, num_keys: int, width: int, dtype, device_kind: str = "TPU v5 lite"
) -> tuple[int, int]:
  """Sizes (block_q, block_k) to plan with, for `make_plan`.

  Small blocks waste steps, each a few hundred cycles beside the thousand that 512 x 512 pairs take;
  large ones compute more pairs that nobody sees. Documents are longer in longer rows, a v6e takes
  two thirds of a v5e's cycles for a block, and the list of pairs must stay short: so both get
  blocks of 1024.

  Args:
    length, num_keys: T and S.
    width: C.
    dtype: of q, k and v.
    device_kind: of the device, as JAX names it.

  Returns:
    Multiples of 128: 512 or 1024, less where T or S is shorter.
  """
  # In f32, or with wide heads, 512 x 512 pairs are work enough for a step.
  light = jnp.dtype(dtype).itemsize < 4 and width <= LANES
  long = max(length, num_keys) > 2**14 or "v5" not in device_kind
  largest = 1024 if (light and long) or max(length, num_keys) > 2**16 else 512
  fit = lambda n: min(largest, -(-n // LANES) * LANES)
  return fit(length), fit(num_keys)
