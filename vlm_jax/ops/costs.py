"""What a sequence costs a language model: visible pairs, FLOPs, key-value bytes, the largest batch.

Exact integers, under these assumptions:
- a multiplication and an addition are 2 FLOPs; the backward pass costs twice the forward pass, as
  if every parameter trained; norms, rotations, biases and the softmax are free;
- only visible pairs are computed (4 C H FLOPs each), which kernels reach but for partial blocks;
- the head is used where a token is predicted: once after the prompt, at every token of the answer;
- vision tower and connector are not counted;
- weights, keys and values take 2 bytes a number, and nothing else takes memory.
"""

import dataclasses
import math
from collections.abc import Iterable

from vlm_jax.ops.visual_tokens import Footprint

BYTES = 2  # of a number in bfloat16
BACKWARD = 3  # forward and backward, in forward passes


@dataclasses.dataclass(frozen=True)
class LLM:
  """The shape of a decoder.

  Attributes:
    depth, width, heads, kv_heads, head_dim, mlp, vocab_size: as in `config.llm`.
    context: the longest sequence it was trained for.
    mlp_matrices: 3 with a gate, else 2.
    vocab_matrices: 1 when embedding and head are tied, else 2.
  """

  depth: int
  width: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp: int
  vocab_size: int
  context: int
  mlp_matrices: int = 3
  vocab_matrices: int = 2

  @property
  def layer(self) -> int:
    """Numbers in the matrices of a layer."""
    heads = 2 * self.heads + 2 * self.kv_heads
    return self.width * (self.head_dim * heads + self.mlp_matrices * self.mlp)

  @property
  def matrices(self) -> int:
    """Numbers in all matrices: what the model weighs but for norms and biases."""
    return self.depth * self.layer + self.vocab_matrices * self.vocab_size * self.width


LLMS = {
  "vicuna-7b": LLM(32, 4096, 32, 32, 128, 11008, 32000, 4096),
  "vicuna-13b": LLM(40, 5120, 40, 40, 128, 13824, 32000, 4096),
  "gemma-2b": LLM(18, 2048, 8, 1, 256, 16384, 257152, 8192, vocab_matrices=1),
  "persimmon-8b": LLM(36, 4096, 64, 64, 64, 16384, 262144, 16384, mlp_matrices=2),
  "chameleon-7b": LLM(32, 4096, 32, 32, 128, 11008, 65536, 4096),
}


# Visible query-key pairs of one layer and head.


def causal(n: int) -> int:
  """Each of n tokens sees itself and everything before it."""
  return n * (n + 1) // 2


def full(n: int) -> int:
  """Every token sees every token."""
  return n * n


def prefix(n: int, length: int) -> int:
  """The first `length` of n tokens see each other, the rest is causal."""
  return causal(n) - causal(length) + full(length)


def image_blocks(n: int, images: Iterable[int]) -> int:
  """Causal, and the slots of an image also see the rest of their image."""
  return causal(n) + sum(full(slots) - causal(slots) for slots in images)


def cross(queries: int, keys: int) -> int:
  """Every query sees every key of another sequence."""
  return queries * keys


def visible(mask: str, n: int, length: int) -> int:
  """The pairs of a mask of `Footprint`, whose prompt (image included) has this length."""
  return {"causal": causal(n), "full": full(n), "prefix": prefix(n, min(n, length))}[mask]


def kv_bytes(tokens: int, layers: int, kv_heads: int, head_dim: int, size: int = BYTES) -> int:
  """Bytes of the keys and values of so many tokens in so many layers."""
  return 2 * tokens * layers * kv_heads * head_dim * size


# Images and text before a language model.


def runs(image: Footprint, depth: int) -> list[tuple[int, int]]:
  """[(layers, slots of all images in them), ...], in order."""
  if image.later is None:
    return [(depth, image.slots * image.count)]
  first = min(max(image.at if image.at >= 0 else depth + image.at, 0), depth)
  slots = ((first, image.slots), (depth - first, image.later))
  return [(layers, each * image.count) for layers, each in slots if layers]


def crossings(image: Footprint, depth: int) -> int:
  """Layers with cross-attention."""
  return math.ceil(depth / image.memory.every) if image.memory else 0


def _crossing(image: Footprint, llm: LLM) -> tuple[int, int]:
  """Numbers in the matrices of one cross-attention: used by every token, by every memory row."""
  if image.memory is None:
    return 0, 0
  inner = llm.heads * llm.head_dim
  token = 2 * llm.width * inner + 2 * image.memory.mlp * llm.width**2
  return token, 2 * image.memory.width * inner


def parameters(image: Footprint, llm: LLM) -> int:
  """Numbers in the matrices of the language model and of the layers a system adds to it."""
  return (llm.matrices + image.before[0] * llm.layer
          + crossings(image, llm.depth) * sum(_crossing(image, llm)))


def pairs(image: Footprint, llm: LLM, prompt: int, answer: int = 0) -> int:
  """Visible pairs of a sequence, over all layers, for one head."""
  text = prompt + answer
  total = sum(layers * visible(image.mask, slots + text, slots + prompt)
              for layers, slots in runs(image, llm.depth))
  layers, slots = image.before
  total += image.count * layers * causal(slots + prompt)  # the answer has not been said yet
  if image.memory:
    queries = image.slots * image.count + text
    total += crossings(image, llm.depth) * cross(queries, image.memory.rows)
  return total


def layer_flops(image: Footprint, llm: LLM, prompt: int, answer: int = 0) -> int:
  """FLOPs of the forward pass through all layers, without the head."""
  text = prompt + answer
  numbers = sum(layers * llm.layer * (slots + text) for layers, slots in runs(image, llm.depth))
  layers, slots = image.before
  numbers += image.count * layers * llm.layer * (slots + prompt)
  if image.memory:
    token, row = _crossing(image, llm)
    numbers += crossings(image, llm.depth) * (
      token * (image.slots * image.count + text) + row * image.memory.rows * image.count)
  return 2 * numbers + 4 * llm.heads * llm.head_dim * pairs(image, llm, prompt, answer)


def cache_bytes(image: Footprint, llm: LLM, text: int) -> int:
  """Bytes of all keys and values when images and text have been read."""
  total = sum(kv_bytes(slots + text, layers, llm.kv_heads, llm.head_dim)
              for layers, slots in runs(image, llm.depth))
  if image.memory:
    total += kv_bytes(image.memory.rows * image.count, crossings(image, llm.depth), llm.heads,
                      llm.head_dim)
  return total


def largest_batch(memory: int, weights: int, sequence: int) -> int:
  """Sequences whose keys and values fit beside the weights, all in bytes; 0: not even the weights.

  An upper bound: activations and the allocator need room, too.
  """
  return max(memory - weights, 0) // sequence


def estimate(image: Footprint, llm: LLM, prompt: int, answer: int, memory: int) -> dict[str, int]:
  """The costs of images, a prompt and an answer.

  Args:
    image: what the images are.
    llm: the language model.
    prompt, answer: their tokens; the answer is what training predicts.
    memory: bytes of the device.

  Returns:
    "slots" of all images where they have most, "memory_rows", "sequence": tokens in all where they
    are most, "pairs" (see `pairs`), "prefill_flops" of images and prompt, "train_flops" of one
    sequence in a step, "kv_bytes" of one sequence, "batch": how many of them fit.
  """
  text, head = prompt + answer, 2 * llm.width * llm.vocab_size
  slots = max(slots for _, slots in runs(image, llm.depth))
  cache = cache_bytes(image, llm, text)
  return {
    "slots": slots,
    "memory_rows": image.memory.rows * image.count if image.memory else 0,
    "sequence": slots + text,
    "pairs": pairs(image, llm, prompt, answer),
    "prefill_flops": layer_flops(image, llm, prompt) + head,
    "train_flops": BACKWARD * (layer_flops(image, llm, prompt, answer) + head * answer),
    "kv_bytes": cache,
    "batch": largest_batch(memory, BYTES * parameters(image, llm), cache),
  }
