"""The vocabulary projection and its log-likelihoods, a piece of the logits at a time.

Slots and columns of the head are cut into chunks; only the logits of one chunk of each exist. The
forward pass keeps the log-sum-exp of every slot (online, as in arXiv:1805.02867), the backward pass
computes the logits again. Saving no logits costs one more matrix product than the full matrix does,
and less than writing that matrix and reading it back.

Gradients are formed only when the cotangent of every slot is known, so any function of the results
may be differentiated, not only the sum of the losses.

Sharded over devices, each one works on its own rows and its own columns with a loop as long as its
own rows need; what crosses devices are three numbers a slot, and the sums of the gradients.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from vlm_jax.core.mesh import spec
from vlm_jax.core.typing import Array

MASKED = -1e30  # finite: a slot that no chunk has visited must not make a NaN


@dataclasses.dataclass(frozen=True)
class Form:
  """What is static about a call.

  Attributes:
    soft_cap: logits are soft_cap * tanh(logits / soft_cap) (arXiv:2408.00118, section 2), or None.
    smoothing: the share of every target that is spread over the vocabulary (arXiv:1512.00567,
      section 7), 0 <= smoothing < 1.
    slots: of one row in a chunk; T is a multiple of it.
    columns: of the head in a chunk, at most.
  """

  soft_cap: float | None
  smoothing: float
  slots: int
  columns: int


@dataclasses.dataclass(frozen=True)
class Placement:
  """How rows and the vocabulary lie on the mesh of `jax.set_mesh`; None: on every device.

  Attributes:
    rows: mesh axes of the first axis of hidden.
    vocabulary: mesh axis of the head's columns.
    ways: over how many devices the rows are spread.
  """

  rows: tuple[str, ...] | None = None
  vocabulary: str | None = None
  ways: int = 1


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Learned:
  """Whether anybody asks for the gradient of the head: it is a third of the backward pass."""

  head: bool


def placement(hidden: tuple[int, ...], head: tuple[int, ...]) -> Placement:
  """Where arrays of these shapes [B,T,D] and [D,V] lie, by the rules of `core.mesh`."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return Placement()
  rows = spec(("batch", None, None), hidden, mesh)[0]
  ways = 1 if rows is None else functools.reduce(lambda n, axis: n * mesh.shape[axis], rows, 1)
  return Placement(rows, spec((None, "vocab"), head, mesh)[1], ways)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def log_likelihoods(
  hidden: Array, head: Array, targets: Array, counts: Array, form: Form
) -> tuple[Array, Array]:
  """log p(target), smoothed, and log Z of the first slots of every row.

  Args:
    hidden: f[B,T,D]; products are in its dtype, sums and all the rest in f32.
    head: f[D,V].
    targets: i32[B,T].
    counts: i32[B], how many slots of each row are asked for; what stands behind them is not.
    form: see `Form`.

  Returns:
    f32[B,T] (1 - s) log p(target) + s * mean over v of log p(v), and f32[B,T] log Z, the
    log-sum-exp of the slot's logits. Both are differentiable.
  """
  place = placement(hidden.shape, head.shape)
  run = functools.partial(_local_forward, form=form, place=place)
  rows = PartitionSpec(place.rows)
  return _spread(run, place, (rows, rows))(hidden, head, targets, counts)


def _forward(hidden, head, targets, counts, form):
  arrays = tuple(x.value for x in (hidden, head, targets, counts))
  values, norms = log_likelihoods(*arrays, form)
  return (values, norms), (*arrays, norms, _Learned(head.perturbed))


def _backward(form, residuals, grads):
  hidden, head, targets, counts, norms, learned = residuals
  grads = (jnp.zeros(norms.shape, norms.dtype) if isinstance(grad, SymbolicZero) else grad
           for grad in grads)
  place = placement(hidden.shape, head.shape)
  run = functools.partial(_local_backward, form=form, place=place, learned=learned.head)
  out = (PartitionSpec(place.rows), PartitionSpec(None, place.vocabulary) if learned.head else None)
  grad_hidden, grad_head = _spread(run, place, out)(hidden, head, targets, counts, norms, *grads)
  return grad_hidden, grad_head, None, None


log_likelihoods.defvjp(_forward, _backward, symbolic_zeros=True)


def _spread(run, place: Placement, out_specs):
  """`run` on every device's own rows and columns; its second argument is the head."""
  if place.rows is None and place.vocabulary is None:
    return run

  def spread(hidden, head, *others):
    rows = PartitionSpec(place.rows)
    specs = (rows, PartitionSpec(None, place.vocabulary)) + (rows,) * len(others)
    # Sums over devices are written out below; nothing is left for the type checker to infer.
    mapped = jax.shard_map(run, in_specs=specs, out_specs=out_specs, check_vma=False)
    return mapped(hidden, head, *others)

  return spread


def _cut(x: Array, number: Array, size: int) -> Array:
  """Chunk `number` of x [B,T,...] along T."""
  return lax.dynamic_slice_in_dim(x, number * size, size, axis=1)


def _put(x: Array, part: Array, number: Array, size: int) -> Array:
  """x with chunk `number` replaced."""
  return lax.dynamic_update_slice_in_dim(x, part, number * size, axis=1)


def _width(head: Array, form: Form) -> tuple[int, int]:
  """Into how many chunks the head's columns are cut, and how many columns each has."""
  number = -(-head.shape[1] // form.columns)
  return number, -(-head.shape[1] // number)


def _columns(head: Array, number: Array, width: int, place: Placement) -> tuple[Array, Array]:
  """Where chunk `number` of the head's columns starts, and the tokens i32[v] they stand for.

  The last chunk starts early enough to be as wide as the others: columns that an earlier chunk has
  had are token -1 in it.
  """
  start = jnp.minimum(number * width, head.shape[1] - width)
  column = start + jnp.arange(width, dtype=jnp.int32)
  shard = 0 if place.vocabulary is None else lax.axis_index(place.vocabulary)
  return start, jnp.where(column < number * width, -1, column + shard * head.shape[1])


def _logits(hidden: Array, head: Array, soft_cap: float | None) -> Array:
  logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
  return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def _chunks(counts: Array, form: Form) -> Array:
  """How many chunks of slots the fullest row has."""
  return -(-counts.max() // form.slots)


def _local_forward(hidden, head, targets, counts, *, form: Form, place: Placement):
  """`log_likelihoods` of one device's rows; 0 behind the chunks that the fullest row needs."""
  weights = head.astype(hidden.dtype)
  number, width = _width(head, form)

  def slots(i, carry):
    part, target = _cut(hidden, i, form.slots), _cut(targets, i, form.slots)

    def columns(j, sums):
      top, total, picked, summed = sums
      start, token = _columns(head, j, width, place)
      logits = _logits(part, lax.dynamic_slice_in_dim(weights, start, width, 1), form.soft_cap)
      new = token >= 0
      above = jnp.maximum(top, jnp.where(new, logits, MASKED).max(-1))
      more = jnp.where(new, jnp.exp(logits - above[..., None]), 0).sum(-1)
      picked += jnp.where(token == target[..., None], logits, 0).sum(-1)
      if form.smoothing:
        summed += jnp.where(new, logits, 0).sum(-1)
      return above, total * jnp.exp(top - above) + more, picked, summed

    zero = jnp.zeros(target.shape, jnp.float32)
    sums = lax.fori_loop(0, number, columns, (zero + MASKED, zero, zero, zero))
    return tuple(_put(x, y, i, form.slots) for x, y in zip(carry, sums, strict=True))

  zero = jnp.zeros(targets.shape, jnp.float32)
  start = (zero + MASKED, zero, zero, zero)
  top, total, picked, summed = lax.fori_loop(0, _chunks(counts, form), slots, start)
  vocabulary = head.shape[1]
  if place.vocabulary is not None:
    highest = lax.pmax(top, place.vocabulary)
    local = (total * jnp.exp(top - highest), picked, summed)
    total, picked, summed = lax.psum(local, place.vocabulary)
    top, vocabulary = highest, vocabulary * lax.axis_size(place.vocabulary)
  visited = total > 0
  norm = jnp.where(visited, top + jnp.log(jnp.where(visited, total, 1)), 0)
  if form.smoothing:
    picked = (1 - form.smoothing) * picked + form.smoothing / vocabulary * summed
  return picked - norm, norm


def _local_backward(hidden, head, targets, counts, norms, grad_values, grad_norms, *, form: Form,
                    place: Placement, learned: bool):
  """The gradients of one device's rows and columns, summed over the devices that share them.

  The second is None unless the head is `learned`.
  """
  weights = head.astype(hidden.dtype)
  number, width = _width(head, form)
  shards = 1 if place.vocabulary is None else lax.axis_size(place.vocabulary)
  spread = form.smoothing / (head.shape[1] * shards)
  # Z appears in both results: -log Z in the first.
  grad_norms = grad_norms - grad_values

  def slots(i, carry):
    grad_hidden, grad_head = carry
    part, target, norm, above, above_norm = (
      _cut(x, i, form.slots) for x in (hidden, targets, norms, grad_values, grad_norms)
    )

    def columns(j, carry):
      grad_part, grad_head = carry
      start, token = _columns(head, j, width, place)
      chunk = lax.dynamic_slice_in_dim(weights, start, width, 1)
      logits = _logits(part, chunk, form.soft_cap)
      target_share = (1 - form.smoothing) * (token == target[..., None]) + spread
      grad = jnp.exp(logits - norm[..., None]) * above_norm[..., None]
      grad += target_share * above[..., None]
      if form.soft_cap is not None:
        grad *= 1 - jnp.square(logits / form.soft_cap)
      grad = jnp.where(token >= 0, grad, 0).astype(chunk.dtype)
      product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
      grad_part += product("btv,dv->btd", grad, chunk)
      if not learned:
        return grad_part, None
      before = lax.dynamic_slice_in_dim(grad_head, start, width, 1)
      after = before + product("btd,btv->dv", part, grad)
      return grad_part, lax.dynamic_update_slice_in_dim(grad_head, after, start, 1)

    zero = jnp.zeros(part.shape, jnp.float32)
    grad_part, grad_head = lax.fori_loop(0, number, columns, (zero, grad_head))
    return _put(grad_hidden, grad_part, i, form.slots), grad_head

  zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
  start = (zeros(hidden), zeros(head) if learned else None)
  grad_hidden, grad_head = lax.fori_loop(0, _chunks(counts, form), slots, start)
  if place.vocabulary is not None:
    grad_hidden = lax.psum(grad_hidden, place.vocabulary)
  if not learned:
    return grad_hidden.astype(hidden.dtype), None
  if place.rows is not None:
    grad_head = lax.psum(grad_head, place.rows)
  return grad_hidden.astype(hidden.dtype), grad_head.astype(head.dtype)
