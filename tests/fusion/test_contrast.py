"""The contract of strategies that compare pictures with texts; numbers as in test_contract.py.

Their embeddings keep the promises that logits keep elsewhere. 3, 4 and 9 do not apply (there is no
stream, mask or cache), and their loss is one of the whole batch: exempt from 1, 2 and 7, it equals
one computed from all embeddings, and accumulates over cached ones.
"""

import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.fusion import contrast as c
from tests.fusion import testing as t
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Encoded
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import embeddings_of, find_fusion
from vlm_jax.core.mesh import make_mesh
from vlm_jax.core.tree import flatten
from vlm_jax.fusion import clip
from vlm_jax.ops.contrastive import Pairs, softmax_losses
from vlm_jax.train import accumulate
from vlm_jax.train import state as states
from vlm_jax.train.optimizer import make_optimizer
from vlm_jax.train.step import Numbers, make_step, place

TOLERANCE = 2e-6
LOUD = 100
names = pytest.mark.parametrize("name", c.NAMES)


@functools.cache
def compiled(name: str):
  """A jitted (params, flat) -> ((loss, Embeddings), gradients)."""
  config = c.get_config(name)
  module = find_fusion(config)

  def loss(params, flat):
    packed = from_flat(flat)
    output = module.Model(config).apply({"params": params}, packed)
    return c.total(output, packed, config), embeddings_of(output)

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def params_of(name: str):
  return t.noise_params(c.get_config(name))


def outputs(name, flat):
  (loss, output), grads = compiled(name)(params_of(name), flat)
  return float(loss), jax.tree.map(np.asarray, output), grads


@names
def test_packed_is_alone_and_others_do_not_change(name):  # 1, 2
  config, docs = c.get_config(name), c.documents(0)
  layouts = t.lay_out(docs, config)
  flat, where = c.pack(layouts, config)
  assert {row for row, _ in where.values()} == {0, 1}
  _, out, _ = outputs(name, flat)
  for layout, document in zip(layouts, docs, strict=True):
    _, single, _ = outputs(name, c.pack([layout], config)[0])
    for part, there in (("image", document.images), ("text", len(document.parts) > bool(
        document.images))):
      got, expected = getattr(out, part)[where[layout.key]], getattr(single, part)[0, 0]
      assert not there or np.allclose(np.linalg.norm(got, axis=-1), 1, rtol=1e-5)
      assert not there or t.error(got, expected) < TOLERANCE
      # Twin: the embedding of another document.
      others = [getattr(out, part)[at] for key, at in where.items() if key != layout.key]
      assert not there or min(t.error(other, expected) for other in others) > LOUD * TOLERANCE
  changed = [dataclasses.replace(docs[2], parts=c.documents(9)[2].parts) if i == 2 else document
             for i, document in enumerate(docs)]
  _, other, _ = outputs(name, c.pack(t.lay_out(changed, config), config)[0])
  for key, at in where.items():
    same = all(np.array_equal(getattr(out, part)[at], getattr(other, part)[at])
               for part in ("image", "text"))
    assert same == (key != docs[2].key)


def test_layout_cuts_pads_and_refuses():
  config = c.get_config("clip")
  docs = c.documents(0)
  one = lambda document: clip.layout(document, config, np.random.default_rng(0)).arrays
  short, long = one(docs[0]), one(docs[3])
  path = "documents/captions/tokens"
  assert short[path][0].tolist() == [*docs[0].parts[1].ids, *[0] * 5]
  assert len(docs[3].parts[1].ids) == c.LENGTH + 1
  assert long[path][0].tolist() == [*docs[3].parts[1].ids[: c.LENGTH - 1], c.END]
  assert one(docs[1])["media/images/segment_ids"] == 0 == one(docs[4])[
    "documents/captions/segment_ids"]
  twice = Encoded((*docs[0].parts, docs[2].parts[1]), "pairs", "twice")
  with pytest.raises(UsageError, match="1 pictures and 2 texts.*form of source 'pairs'"):
    one(twice)
  digests = lambda document: one(document)["documents/captions/digests"].tolist()
  assert digests(docs[0]) == digests(docs[0]) != digests(docs[2])


@names
def test_rows_of_one_kind(name):  # 6
  config, docs = c.get_config(name), c.documents(0)
  for kept in ([docs[1]], [docs[4]], [docs[1], docs[4]]):
    loss, _, grads = outputs(name, c.pack(t.lay_out(kept, config), config)[0])
    assert loss == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
  module = find_fusion(config)
  empty = t.batches.empty(*(f(config) for f in (module.fields, module.axes)), 2)
  loss, _, grads = outputs(name, empty)
  assert loss == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", c.PAIRS)
def test_the_loss_is_that_of_all_pairs(name):
  """Written out in numpy from the embeddings of pairs alone, two of which say the same."""
  config, docs = c.get_config(name), c.documents(0)
  docs[5] = dataclasses.replace(docs[5], parts=(docs[5].parts[0], docs[2].parts[1]))
  flat, where = c.pack(t.lay_out(docs, config), config)
  loss, out, _ = outputs(name, flat)
  full = [document for document in docs if len(document.parts) == 2]
  at = tuple(np.array([where[document.key] for document in full]).T)
  logits = out.scale * out.image[at].astype(np.float64) @ out.text[at].T
  logits += 0 if out.bias is None else out.bias
  equal = np.zeros(logits.shape, bool)
  equal[1, 3] = equal[3, 1] = True
  own = np.eye(len(full), dtype=bool)
  if out.bias is None:
    logits = np.where(equal, -np.inf, logits)
    norm = np.log(np.exp(logits).sum(0)) + np.log(np.exp(logits).sum(1))
    expected = norm / 2 - np.diag(logits)
  else:
    expected = np.where(equal, 0, np.log1p(np.exp(np.where(own, -logits, logits)))).sum(1)
  sources = np.array([document.source == "words" for document in full])
  mean = expected[sources].mean() + expected[~sources].mean()
  assert loss == pytest.approx(mean, rel=1e-5)
  assert abs(outputs(name, flat | {"documents/captions/digests": np.arange(16).reshape(2, 4, 2)
                                   .astype(np.int32)})[0] - mean) > LOUD * 1e-5


def first_step(config, module, parts: int) -> tuple[dict, Numbers]:
  """What one step from noise reports, and the first moments, which are the gradient."""
  config.train.accumulation = parts
  mesh = make_mesh(config)
  _, leaves = states.initializer(module, config)
  optimizer = make_optimizer(config, module.STAGES, leaves)
  abstract = states.abstract_state(leaves, optimizer.init, mesh)
  params = jax.tree.map(jnp.array, t.noise_params(config))
  state = states.State(jnp.zeros((), jnp.int32), params, optimizer.init(params))
  shapes = states.abstract_batch(module, config, mesh)
  step = make_step(config, module, optimizer, mesh, abstract).lower(abstract, shapes)
  state, numbers = step.compile()(state, place(c.batch(config, 0), mesh))
  moments = flatten(jax.device_get(state.opt_state[1].mu))
  # Only rounding makes the gradient of a bias of keys.
  return {path: leaf for path, leaf in moments.items() if not path.endswith(t.SILENT)}, numbers


@pytest.mark.parametrize("name", ["siglip", "coca"])
def test_accumulation_is_one_big_batch(name):  # 7
  config = c.get_config(name, rows=4)
  if name == "coca":  # a sum over rows beside what compares them
    config.fusion.objectives = ConfigDict({"contrast": 1.0, "lm": 2.0})
  config.optim.clip = 0.0
  config.tower.depth = config.llm.depth = 1
  module = find_fusion(config)
  big, numbers = first_step(config, module, 1)
  small, split = first_step(config, module, 2)
  # A second pooler hardly moves at first: of a gradient that small, rounding is a large share.
  least = 0.01 * max(np.abs(leaf).max() for leaf in big.values())
  for path, leaf in big.items():
    assert np.abs(small[path] - leaf).max() < 2e-5 * max(np.abs(leaf).max(), least), path
  np.testing.assert_allclose(split.total, numbers.total, rtol=1e-6)
  for objective, losses in numbers.losses.items():
    np.testing.assert_allclose(split.losses[objective], losses, rtol=1e-6)
  # The sum of what micro-batches lose by themselves is another loss; the next test has that twin.


def test_cached_embeddings_give_the_whole_gradient_of_a_softmax():  # 7
  """And that of a sum over rows beside it."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params, data = {"a": draw(5, 3), "scale": jnp.float32(1.3)}, (draw(12, 5), draw(12, 5))
  embed = lambda params, micro: (*(clip.unit(x @ params["a"]) for x in micro), params["scale"] * 2)
  added = lambda params, micro: jnp.sum(jnp.square(micro[0] @ params["a"])) / 7
  forward = lambda params, micro: (embed(params, micro), added(params, micro), added(params, micro))

  def loss(output):
    image, text, scale = output
    every = jnp.ones(len(image), bool)
    digests = jnp.stack([jnp.arange(len(image))] * 2, axis=-1)
    losses = softmax_losses(Pairs(image, text, every, digests), scale)
    return losses.sum(), losses.sum()

  whole = lambda params, data: loss(embed(params, data))[0] + added(params, data)
  grad = jax.jit(jax.grad(whole))
  expected = grad(params, data)
  cut = lambda x: x.reshape(3, 4, *x.shape[1:])
  join = lambda x: x.reshape(12, *x.shape[2:])
  run = lambda params, micros: accumulate.cached(forward, loss, params, micros, 3, join, cut)
  (value, more), got = jax.jit(run)(params, jax.tree.map(cut, data))
  assert value == pytest.approx(float(loss(embed(params, data))[0]), rel=1e-6)
  assert more == pytest.approx(float(added(params, data)), rel=1e-6)
  assert t.error(got, expected) < 1e-5
  parts = [grad(params, tuple(cut(x)[at] for x in data)) for at in range(3)]
  assert t.error(jax.tree.map(lambda *leaves: sum(leaves), *parts), expected) > LOUD * 1e-5


@pytest.mark.parametrize("meshes, oks", [
  pytest.param((), 2, id="one"),
  # As many programs for eight devices as meshes, optimized with --full.
  pytest.param(("--all",), 9, id="all", marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
def test_eight_devices_are_one(meshes, oks):  # 8
  script = Path(__file__).with_name("contrast_devices.py")
  command = [sys.executable, str(script), *meshes]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  assert done.stdout.count("ok") == oks, done.stdout


@names
def test_gradients_reach_the_stage(name):  # 12
  config = c.get_config(name)
  _, _, grads = outputs(name, c.batch(config))
  reached = {path: bool(np.any(leaf)) for path, leaf in flatten(grads).items()}
  unreached = [path for path, there in reached.items() if not there]
  others = t.STRATEGIES[name].captions
  assert all(path.startswith(others) or path.endswith(t.SILENT) for path in unreached)
  for stage in find_fusion(config).STAGES:
    trained = {path.split("/")[0] for path in reached
               if any(re.fullmatch(pattern, path) for pattern in stage.trainable)}
    assert trained == set(grads) - ({"tower", "image_projection"} if stage.name == "lit" else set())


def test_the_scale_stays_at_a_hundred_and_comes_down():
  scale = lambda x: jnp.exp(clip.at_most(x, clip.CEILING))
  np.testing.assert_allclose(scale(jnp.float32(9.0)), 100, rtol=1e-6)
  gradient = lambda x, sign: float(jax.grad(lambda x: sign * scale(x))(jnp.float32(x)))
  assert gradient(9.0, 1.0) == pytest.approx(100, rel=1e-5)  # a smaller one would lose less
  assert gradient(9.0, -1.0) == 0  # a larger one would, but there is none
  assert gradient(1.0, -1.0) == pytest.approx(-np.e, rel=1e-5)


def test_a_vector_of_zeros_stays_one_with_gradient_zero():
  x = jnp.asarray([[0.0, 0.0], [3.0, 4.0]])
  np.testing.assert_allclose(clip.unit(x), [[0, 0], [0.6, 0.8]], rtol=1e-6)
  grads = jax.grad(lambda x: jnp.sum(clip.unit(x)[1]))(x)
  np.testing.assert_allclose(grads, [[0, 0], [0.032, -0.024]], rtol=1e-5)


def test_towers_that_do_not_fit():
  for change, sentence in (
    ({"tower": {"pool": "none"}}, "config.tower.pool is 'none'"),
    ({"llm": {"name": "llama"}}, "of kind 'decoder'.*needs a 'text tower'"),
    ({"llm": {"pool": "first"}}, "config.llm.pool is 'first'"),
  ):
    config = c.get_config("clip")
    flat = c.batch(config)
    for node, fields in change.items():
      config[node].update(fields)
    with pytest.raises(UsageError, match=sentence):
      jax.eval_shape(clip.Model(config).init, jax.random.key(0), from_flat(flat))
