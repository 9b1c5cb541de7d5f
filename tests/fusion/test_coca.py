"""CoCa beyond the contract: what the class token sees, what each loss reaches, sizes.

And 13: captions of pictures never seen are written and found, unless training has shuffled them.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from flax.core import meta

from tests.fusion import contrast as c
from tests.fusion import test_contract as contract
from tests.fusion import testing as t
from tests.fusion.test_contrast_learns import GRIDS, PALETTE
from vlm_jax import recipes
from vlm_jax.convert import systems
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Encoded, Pixels, Tokens
from vlm_jax.core.errors import UsageError
from vlm_jax.core.mask import draw
from vlm_jax.core.tree import flatten
from vlm_jax.evals import embed
from vlm_jax.evals.bootstrap import interval
from vlm_jax.fusion import coca
from vlm_jax.generate.decode import generate
from vlm_jax.generate.prompts import layouts, stack

COMPATS = pytest.mark.parametrize("compat", ["", "open_clip"])


def get_config(compat: str = ""):
  config = c.get_config("coca")
  config.fusion.compat = compat
  return config


def lay_out(document: Encoded, config):
  return coca.layout(document, config, np.random.default_rng(0))


@functools.cache
def compiled(config: ml_collections.FrozenConfigDict):
  """A jitted (params, flat, factors of both losses) -> (loss, Output) and the gradients."""

  def loss(params, flat, factors):
    batch = from_flat(flat)
    output = coca.Model(config).apply({"params": params}, batch)
    sums = coca.losses(output, batch, config)
    return sum(factors[name] * sums[name].sum() for name in sums), output

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def run(config, flat, params=None, **factors):
  params = t.noise_params(config) if params is None else params
  factors = {"contrast": 0.0, "lm": 0.0} | factors
  (_, output), grads = compiled(ml_collections.FrozenConfigDict(config))(params, flat, factors)
  return output, grads


@COMPATS
def test_docstring_pictures_are_the_masks(compat):
  config = t.get_config("coca")
  config.fusion.compat = compat
  drawn = [one for one in contract.pictures(coca.__doc__) if ("z" in one[0]) == bool(compat)]
  assert len(drawn) == 1
  labels, image = drawn[0]
  found = lay_out(contract.picture_document(labels), config)
  masks = from_flat({path: values for path, values in found.arrays.items()
                     if path.startswith("masks/")}).masks
  assert draw(t.joined(masks, config), labels) == image
  # As the model runs it, text and what stands behind it at once.
  both = coca.joined(*(jax.tree.map(jnp.asarray, masks[name])
                       for name in ("text", "reads", "summary")))
  assert draw(np.asarray(both.dense()), labels) == image
  # A text that fills all positions has no padding: both ways are one.
  config.llm.positions = len(labels) - 1 - bool(compat)
  full = lay_out(contract.picture_document(labels), config)
  assert full.sizes["summary"] == 1


def test_layout():
  config, docs = get_config(), c.documents(0)
  both, told, shown, long = docs[0], docs[1], docs[4], docs[3]
  of = lambda document, path: lay_out(document, config).arrays[path].tolist()
  assert of(both, "documents/captions/segment_ids") == [1]
  assert of(both, "documents/captions/images") == [0] == of(both, "documents/captions/slots")
  # No pair; a text or a picture alone can be embedded all the same.
  for lonely, image, slot in ((told, -1, 0), (shown, 0, -1)):
    assert of(lonely, "documents/captions/segment_ids") == [0]
    assert of(lonely, "documents/captions/images") == [image]
    assert of(lonely, "documents/captions/slots") == [slot]
  ids = long.parts[1].ids
  assert len(ids) == c.LENGTH + 1
  assert of(long, "streams/text/tokens") == [*ids[: c.LENGTH - 1], c.END]
  assert of(both, "streams/text/loss_weights/lm") == [1.0] * (len(both.parts[1].ids) - 1) + [0.0]
  twice = Encoded((both.parts[0], *both.parts), "pairs", "two pictures")
  assert of(twice, "documents/captions/segment_ids") == [0]
  assert of(twice, "masks/cross/hi") == [2 * t.K] * len(both.parts[1].ids)
  alone = dataclasses.replace(long, parts=long.parts[1:])
  branch = dataclasses.replace(both.parts[1], branch=1)
  for document, sentence in (
    (alone, f"has {c.LENGTH + 1} tokens but config.llm.positions is {c.LENGTH}"),
    (dataclasses.replace(both, parts=(both.parts[0], branch)), "has branches.*'caption'"),
  ):
    with pytest.raises(UsageError, match=sentence):
      lay_out(document, config)


@COMPATS
def test_the_class_token_sees_its_text_and_no_padding(compat):
  """Nor does it see another document; what was released sees one padding, and not itself."""
  config, docs = get_config(compat), [c.documents(0)[i] for i in (0, 2)]
  flat, _ = c.pack(t.lay_out(docs, config), config)
  ends = np.cumsum([len(one.parts[1].ids) for one in docs])
  text = lambda flat, params=None: np.asarray(run(config, flat, params)[0].embeddings.text)[0, :2]
  before = text(flat)
  for slot in range(ends[1]):
    other = flat | {"streams/text/tokens": flat["streams/text/tokens"].copy()}
    other["streams/text/tokens"][0, slot] = (flat["streams/text/tokens"][0, slot] + 7) % t.VOCAB
    changed = (text(other) != before).any(-1)
    assert changed.tolist() == [slot < ends[0], slot >= ends[0]]
  params = jax.tree.map(np.asarray, t.noise_params(config))
  table = params["llm"]["embed"]["embedding"].copy()
  table[0] += 1  # that of padding, which no text contains
  other = {**params, "llm": {**params["llm"], "embed": {"embedding": table}}}
  assert (text(flat, other) != before).any() == bool(compat)


def test_what_each_loss_reaches():
  config = get_config()
  flat = c.batch(config)
  reached = {}
  for name in ("contrast", "lm"):
    _, grads = run(config, flat, **{name: 1.0})
    every = {path for path in flatten(grads) if not path.endswith(t.SILENT)}
    # Also of texts without a picture and of places without a document: zeros that are projected.
    assert all(np.isfinite(leaf).all() for leaf in flatten(grads).values()), name
    reached[name] = {path for path in every if np.abs(flatten(grads)[path]).max() > 1e-7}
  of = lambda *parts: {path for path in every if path.startswith(parts)}
  silent = {path for path in every if path.endswith("head/kernel")} | of("llm/norm", "llm/second")
  # The pooler of captions is read on the way to the other one; so both losses train it.
  assert reached["contrast"] == every - silent
  assert reached["lm"] == every - of("contrast_pool", "image_projection", "text_projection",
                                     "logit_scale", "llm/class_")


def test_texts_do_not_see_pictures_and_captions_see_their_own():
  config, docs = get_config(), c.documents(0)
  flat, where = c.pack(t.lay_out(docs, config), config)
  output, _ = run(config, flat)
  values = flat["media/images/values"].copy()
  values[0, 0] = 255 - values[0, 0]
  other, _ = run(config, flat | {"media/images/values": values})
  np.testing.assert_array_equal(other.embeddings.text, output.embeddings.text)
  changed = (np.asarray(other.hidden) != np.asarray(output.hidden)).any(-1)
  np.testing.assert_array_equal(changed, (flat["streams/text/segment_ids"] == 1)
                                & (np.arange(2) == 0)[:, None])
  # Embedded alone they are what they are in a packed row.
  shown = [Encoded(docs[i].parts[:1], "pairs", str(i)) for i in (0, 2)]
  told = [Encoded(docs[i].parts[-1:], "pairs", str(i)) for i in (0, 1, 2)]
  params = t.noise_params(config)
  at = lambda part, chosen: np.stack([
    np.asarray(getattr(output.embeddings, part))[where[docs[i].key]] for i in chosen])
  assert t.error(embed.images(config, params, shown, 2), at("image", (0, 2))) < 2e-6
  assert t.error(embed.texts(config, params, told, 2), at("text", (0, 1, 2))) < 2e-6


def test_fields_that_cannot_be():
  for change, sentence in (
    ({"fusion": {"pooling": "serial"}}, "config.fusion.pooling is 'serial'"),
    ({"fusion": {"compat": "openclip"}}, "config.fusion.compat is 'openclip'; did you mean"),
    ({"tower": {"pool": "gap"}}, "config.tower.pool is 'gap'"),
    ({"llm": {"cross": "outside"}}, "config.llm.cross is 'outside'"),
    ({"llm": {"kv_heads": 2}}, "config.llm.heads is 4"),
    ({"llm": {"name": "llama"}}, "of kind 'decoder'.*needs a 'two halves'"),
  ):
    config = get_config()
    flat = c.batch(config)
    for node, fields in change.items():
      config[node].update(fields)
    with pytest.raises(UsageError, match=sentence):
      jax.eval_shape(coca.Model(config).init, jax.random.key(0), from_flat(flat))


def test_published_sizes():
  """Table 1 of the paper counts neither poolers nor projections: 383M, 787M and 2.1B."""
  for size, millions in (("base", 383), ("large", 787), ("coca", 2192)):
    shapes = systems.shapes(recipes.load(f"configs/coca.py:{size}"))
    beside = ("connector/", "contrast_pool/", "image_projection/", "text_projection/")
    count = sum(math.prod(shape) for path, shape in shapes.items() if not path.startswith(beside))
    assert round(count / 1e6) == millions, size


# 13.

PAIRS, STEPS, BATCHES = 64, 200, 24
HELD_OUT, SEEN = GRIDS[:48], GRIDS[48:]


def grid_config():
  config = c.get_config("coca", rows=4)
  config.tower.update(depth=1, width=32, heads=4, mlp=64)
  config.llm.update(depth=1, encoder_depth=1, width=32, mlp=64, positions=6)
  config.connector.update(latents=4, heads=4)
  config.fusion.width = 32
  config.data.update(images=PAIRS // 4, tokens=6 * PAIRS // 4)
  return config


def document(colors: np.ndarray, shown: np.ndarray, number: int) -> Encoded:
  """A 2 x 2 grid of four colours, and the text that names them."""
  picture = PALETTE[shown].reshape(2, 2, 3).repeat(4, 0).repeat(4, 1)
  ids = np.array([1, *(10 + colors), c.END], np.int32)
  return Encoded((Pixels(picture), Tokens(ids, np.arange(6) > 0)), "pairs", str(number))


def trained(config, shuffled: bool):
  """The parameters after STEPS; shuffled: of texts with other pictures."""
  rng, flats = np.random.default_rng(0), []
  for _ in range(BATCHES):
    told = SEEN[rng.choice(len(SEEN), PAIRS, replace=False)]
    shown = rng.permutation(told) if shuffled else told
    made = [document(*pair, number) for number, pair in enumerate(zip(told, shown, strict=True))]
    flats.append(c.pack(t.lay_out(made, config), config)[0])
  init, step, optimizer = programs(ml_collections.FrozenConfigDict(config))
  params = meta.unbox(init(flats[0]))
  state = optimizer.init(params)
  for number in range(STEPS):
    params, state = step(params, state, flats[number % BATCHES])
  return params


@functools.cache
def programs(config):
  """Initialisation and a step on the sum of both losses, 1 to 2, and the optimizer."""
  model = coca.Model(config)
  optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, 6e-3, 20, STEPS))

  def loss(params, batch):
    output = model.apply({"params": params}, batch)
    sums, weights = coca.losses(output, batch, config), coca.weights(batch, config)
    return sum(factor * sums[name].sum() / weights[name].sum()
               for name, factor in (("contrast", 1), ("lm", 2)))

  @jax.jit
  def step(params, state, flat):
    updates, state = optimizer.update(jax.grad(loss)(params, from_flat(flat)), state, params)
    return optax.apply_updates(params, updates), state

  return jax.jit(lambda flat: model.init(jax.random.key(0), from_flat(flat))["params"]), step, (
    optimizer)


def test_pictures_are_found_and_captioned():
  config, scores = grid_config(), {}
  documents = [document(grid, grid, number) for number, grid in enumerate(HELD_OUT)]
  shown = [Encoded(one.parts[:1], "pairs", one.key) for one in documents]
  told = [Encoded(one.parts[1:], "pairs", one.key) for one in documents]
  start = Tokens(np.array([1], np.int32), np.zeros(1, bool))
  asked = [Encoded((*one.parts, start), "pairs", one.key) for one in shown]
  for shuffled in (False, True):
    params = trained(config, shuffled)
    cosines = embed.images(config, params, shown, 48) @ embed.texts(config, params, told, 48).T
    found = (cosines.argmax(0) == np.arange(len(documents))).astype(float)
    prompts = stack(layouts(asked, config), config, rows=48, bucket=1)
    said = generate(config, params, prompts, max_tokens=5, stop=(c.END,))
    right = np.asarray(said.tokens)[:, 0, :4] == 10 + HELD_OUT
    scores[shuffled] = found, right.mean(), np.asarray(said.lengths)
  chance = 1 / len(documents)
  found, right, lengths = scores[False]
  print("found", found.mean(), "colours", right, "shuffled", scores[True][0].mean(),
        scores[True][1])
  assert found.mean() > 0.5 and interval(found, seed=0)[0] > chance and right > 0.9
  assert (lengths == 4).mean() > 0.9
  found, right, _ = scores[True]
  # A colour of four is right by chance.
  assert interval(found, seed=0)[0] <= chance and right < 0.45
