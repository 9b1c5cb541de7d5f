"""Attentional pooling: learned queries read a set of features (arXiv:2205.01917, section 3.2)."""

import flax.linen as nn
import jax.numpy as jnp
from jax.nn import initializers

from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array
from vlm_jax.nn.attention import CrossAttention, make_context
from vlm_jax.nn.linear import parameter
from vlm_jax.nn.norms import LayerNorm


def uses(path: str, queries: int, features: int) -> int:
  """To how many places a parameter is applied where Q queries attend to P features.

  Keys, values and their norm belong to features, everything else to queries.
  """
  return features if {"key", "value", "key_norm"} & set(path.split("/")) else queries


class AttentionPool(nn.Module):
  """One layer of attention of learned queries over features, both normalised, with biases.

  Nothing is added to the queries: what they were is gone behind it.

  Attributes:
    queries: how many, Q.
    width: of queries and result, D.
    heads: H; D is a multiple of it.
    eps: of both norms.
    precision: dtypes.
  """

  queries: int
  width: int
  heads: int
  eps: float
  precision: Precision

  @nn.compact
  def __call__(self, features: Array) -> Array:
    """f[..., P, D_in], every one of P seen, to f[..., Q, D]."""
    outer, x = features.shape[:-2], features.reshape(-1, *features.shape[-2:])
    rows, keys = x.shape[:2]
    norm = lambda name: LayerNorm(self.eps, self.precision, name=name)
    learned = parameter(self, "queries", initializers.normal(1.0), (self.queries, self.width),
                        (None, "norm"), self.precision.param)
    learned = norm("query_norm")(learned.astype(self.precision.compute))
    learned = jnp.broadcast_to(learned, (rows, *learned.shape))
    zeros = jnp.zeros((rows, self.queries), jnp.int32)
    context = make_context(IntervalMask(zeros, zeros + keys), None, (0, 0), keys=keys,
                           width=self.width // self.heads, dtype=self.precision.compute)
    pooled, _ = CrossAttention(
      heads=self.heads, groups=self.heads, head_dim=self.width // self.heads, bias=True,
      implementation="auto", precision=self.precision, name="attention",
    )(learned, norm("key_norm")(x), None, context)
    return pooled.reshape(*outer, self.queries, self.width)
