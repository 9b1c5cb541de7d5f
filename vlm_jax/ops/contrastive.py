"""Losses that compare N pictures with N texts, of which those of equal index are pairs.

Every device of a mesh holds n pictures and n texts. The texts go round the devices; at each stop
n x n logits are made, used and forgotten, and made again in the backward pass. So no device holds
the embeddings of the others or more than n^2 logits, and the result is that of the whole matrix
(arXiv:2303.15343, section 3.1, whose loss is the sigmoid one).

Pictures and texts that are absent take no part. A text that equals the one of another pair is not
a negative of that pair's picture: it would be pushed away from what it describes.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vlm_jax.core.mesh import spec
from vlm_jax.core.typing import Array

NONE = -1e30  # the logit of two that are not compared: exp(NONE) is 0, and no sum overflows


class Pairs(NamedTuple):
  """N pairs.

  Attributes:
    image: f32[N,E] of unit length; or f32[N,K,E], of which the one nearest to a text counts
      (BLIP-2, arXiv:2301.12597, section 3.2).
    text: f32[N,E] of unit length.
    there: bool[N], pairs that exist.
    digests: i32[N,2], equal where texts are.
  """

  image: Array
  text: Array
  there: Array
  digests: Array


class _Ring(NamedTuple):
  """The mesh axes that rows lie on and how many devices these are; () and 1: a single one."""

  axes: tuple[str, ...]
  ways: int

  def pass_on(self, tree):
    """Hands every array to the next device."""
    if self.ways == 1:
      return tree
    order = [(device, (device + 1) % self.ways) for device in range(self.ways)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axes, order), tree)

  def loop(self, body: Callable, carry):
    """Applies a body ways - 1 times; its activations are computed again in the backward pass."""
    if self.ways == 1:
      return carry
    step = jax.checkpoint(lambda carry, _: (body(carry), None), prevent_cse=False)
    return jax.lax.scan(step, carry, length=self.ways - 1)[0]


class _Choice(NamedTuple):
  """What a cross-entropy needs of n choices: of the logits log-sum-exp, sum and number."""

  norm: Array
  total: Array
  count: Array

  def also(self, more: "_Choice") -> "_Choice":
    """Of these candidates and others."""
    return _Choice(jnp.logaddexp(self.norm, more.norm), self.total + more.total,
                   self.count + more.count)

  def loss(self, own: Array, smoothing: float) -> Array:
    """f32[n], the cross-entropy with 1 - s on the own candidate and s spread over all."""
    mean = self.total / jnp.maximum(self.count, 1)
    return self.norm - (1 - smoothing) * own - smoothing * mean


def softmax_losses(pairs: Pairs, scale: Array, smoothing: float = 0.0) -> Array:
  """Every picture chooses its text among all and every text its picture (arXiv:2103.00020, 2.3).

  Args:
    pairs: over the rows of the whole mesh of `jax.set_mesh`, if there is one.
    scale: f32[], multiplies the cosines.
    smoothing: s of label smoothing, spread over all that a picture or a text may choose.

  Returns:
    f32[N], half the sum of both cross-entropies of a pair, exactly 0 where it is absent. Their sum
    over the number of pairs is the published loss.
  """
  return _on_mesh(functools.partial(_softmax, smoothing=smoothing), pairs, scale)


def sigmoid_losses(pairs: Pairs, scale: Array, bias: Array) -> Array:
  """Every picture and text are a pair or not, each decided alone (arXiv:2303.15343, section 3).

  The paper prints -t x.y + b in the exponent; its algorithm and its code have -(t x.y + b), as
  here.

  Args:
    pairs: as in `softmax_losses`.
    scale, bias: f32[], the logit is scale * cosine + bias.

  Returns:
    f32[N], for a picture the sum over all texts of -log sigmoid(z * logit), z = 1 for its own and
    -1 for others; exactly 0 where the pair is absent. Their sum over the number of pairs is the
    published loss.
  """
  return _on_mesh(_sigmoid, pairs, scale, bias)


def _on_mesh(local: Callable, pairs: Pairs, *scalars: Array) -> Array:
  """local(ring, pairs, *scalars) on each device's pairs."""
  mesh = jax.sharding.get_abstract_mesh()
  rows = None
  if not mesh.empty and not mesh.manual_axes:
    rows = spec(("batch",), pairs.there.shape, mesh)[0]
  if rows is None:
    return local(_Ring((), 1), pairs, *scalars)
  row = PartitionSpec(rows)
  ring = _Ring(rows, math.prod(mesh.shape[axis] for axis in rows))
  return jax.shard_map(
    functools.partial(local, ring),
    mesh=mesh,
    in_specs=(Pairs(row, row, row, row), *(PartitionSpec() for _ in scalars)),
    out_specs=row,
    check_vma=False,  # a device's sums vary over the ring, which a scan's carry does not say
  )(pairs, *scalars)


def _softmax(ring: _Ring, pairs: Pairs, scale: Array, *, smoothing: float) -> Array:
  seen = _compared(pairs, pairs) & ~_namesakes(pairs, pairs) | _diagonal(pairs)
  similar = cosines(pairs.image, pairs.text)

  def choices(similar, seen):
    logits = scale * similar
    shown, kept = jnp.where(seen, logits, NONE), jnp.where(seen, logits, 0)
    return [_Choice(jax.nn.logsumexp(shown, axis=axis), kept.sum(axis), seen.sum(axis))
            for axis in (1, 0)]

  def meet(carry):
    images, visitors, texts = carry
    visitors, texts = ring.pass_on((visitors, texts))
    seen = _compared(pairs, visitors) & ~_namesakes(pairs, visitors)
    rows, columns = choices(cosines(pairs.image, visitors.text), seen)
    return images.also(rows), visitors, texts.also(columns)

  images, texts = choices(similar, seen)
  images, _, texts = ring.loop(meet, (images, _texts(pairs), texts))
  texts = ring.pass_on(texts)  # home again, after a whole round
  own = scale * jnp.diagonal(similar)
  both = images.loss(own, smoothing) + texts.loss(own, smoothing)
  return jnp.where(pairs.there, both / 2, 0)


def _sigmoid(ring: _Ring, pairs: Pairs, scale: Array, bias: Array) -> Array:
  logits = scale * cosines(pairs.image, pairs.text) + bias
  own = _diagonal(pairs)
  seen = _compared(pairs, pairs) & ~_namesakes(pairs, pairs) | own
  # -log sigmoid(x) = softplus(-x)
  sums = jnp.where(seen, jax.nn.softplus(jnp.where(own, -logits, logits)), 0).sum(1)

  def meet(carry):
    sums, visitors = carry
    visitors = ring.pass_on(visitors)
    seen = _compared(pairs, visitors) & ~_namesakes(pairs, visitors)
    logits = scale * cosines(pairs.image, visitors.text) + bias
    return sums + jnp.where(seen, jax.nn.softplus(logits), 0).sum(1), visitors

  return ring.loop(meet, (sums, _texts(pairs)))[0]


def _texts(pairs: Pairs) -> Pairs:
  """What goes round; pictures stay."""
  return pairs._replace(image=None)


def cosines(image: Array, text: Array) -> Array:
  """f32[n,m] of pictures f32[n,E] or f32[n,K,E] (the nearest of K) and texts f32[m,E]."""
  product = jnp.matmul(image, text.T, precision=jax.lax.Precision.HIGHEST)
  return product if image.ndim == 2 else product.max(axis=1)


def strangers(pairs: Pairs) -> Array:
  """bool[N,N], pictures and texts that both exist, are no pair and have no text in common."""
  return _compared(pairs, pairs) & ~_namesakes(pairs, pairs)


def _compared(pairs: Pairs, others: Pairs) -> Array:
  """bool[n,n], both exist."""
  return pairs.there[:, None] & others.there


def _namesakes(pairs: Pairs, others: Pairs) -> Array:
  """bool[n,n], the texts of both are equal."""
  return (pairs.digests[:, None] == others.digests).all(-1)


def _diagonal(pairs: Pairs) -> Array:
  """bool[n,n], the pairs that exist."""
  return jnp.diag(pairs.there)
