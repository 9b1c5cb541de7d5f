"""How the next token is chosen from logits: greedy, temperature, nucleus (arXiv:1904.09751)."""

import dataclasses

import jax
import jax.numpy as jnp

from vlm_jax.core.errors import UsageError
from vlm_jax.core.typing import Array


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How to choose tokens.

  Attributes:
    temperature: divides the logits; 0 takes the most likely token.
    top_p: only the most likely tokens that together reach this probability are drawn from.
    seed: of the draws; each answer has its own stream, whatever it is batched with.
  """

  temperature: float = 0.0
  top_p: float = 1.0
  seed: int = 0

  def __post_init__(self):
    if not self.temperature >= 0:
      raise UsageError(f"--temperature is {self.temperature}; use 0 (greedy) or more")
    if not 0 < self.top_p <= 1:
      raise UsageError(f"--top-p is {self.top_p}; use a probability above 0 and up to 1")


GREEDY = Sampling()


def nucleus(logits: Array, top_p: Array) -> Array:
  """Logits with -inf outside the smallest set of tokens that reaches probability `top_p`.

  Args:
    logits: f32[...,V].
    top_p: f32[], in (0, 1]. The most likely token always stays.
  """
  order = jnp.argsort(-logits, axis=-1)
  probability = jax.nn.softmax(jnp.take_along_axis(logits, order, -1), axis=-1)
  before = jnp.cumsum(probability, axis=-1) - probability
  kept = jnp.take_along_axis((before < top_p) | (top_p >= 1), jnp.argsort(order, axis=-1), -1)
  return jnp.where(kept, logits, -jnp.inf)


def choose(
  logits: Array, keys: Array, temperature: Array | None, top_p: Array
) -> tuple[Array, Array]:
  """Chooses one token for each distribution.

  Args:
    logits: f32[...,V].
    keys: PRNG keys [...].
    temperature: f32[] above 0; None takes the most likely token, and compiles no sorting.
    top_p: f32[].

  Returns:
    Tokens i32[...] and their log-probability f32[...] under the model itself (temperature 1).
  """
  if temperature is None:
    tokens = jnp.argmax(logits, axis=-1)
  else:
    kept = nucleus(logits / temperature, top_p)
    flat = jax.vmap(jax.random.categorical)(keys.reshape(-1), kept.reshape(-1, kept.shape[-1]))
    tokens = flat.reshape(logits.shape[:-1])
  log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
  return tokens.astype(jnp.int32), log_probs
