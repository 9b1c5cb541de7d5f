"""What is particular to Flamingo: its mask, its gates, what is frozen and what is saved."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from tests.fusion import testing as t
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Encoded, Tokens
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_fusion, find_llm
from vlm_jax.core.mask import IntervalMask, causal
from vlm_jax.core.tree import flatten
from vlm_jax.data import inspect
from vlm_jax.fusion import flamingo
from vlm_jax.nn import stack

# "Look at <image1>. Now see <image2>. What changed?", and the image that every token reads.
WORKED = "Look at <image> . Now see <image> . What changed ?".split()
READS = [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2]


def page(words: list[str], source: str = "pairs", key: str = "page") -> Encoded:
  """A document of a token a word, all predicted, and an image where a word says so."""
  rng, parts = np.random.default_rng(3), []
  for number, word in enumerate(words, 1):
    picture = word == "<image>"
    parts.append(t.pixels(rng) if picture else Tokens(
      np.array([number], np.int32), np.array([True])))
  return Encoded(tuple(parts), source, key)


def config_of(**bridge):
  config = t.get_config("flamingo", "last")
  config.bridge.update(bridge)
  return config


def media_of(layout) -> IntervalMask:
  return IntervalMask(layout.arrays["masks/media/lo"], layout.arrays["masks/media/hi"])


def lay_out(document, config, seed=0):
  return flamingo.layout(document, config, np.random.default_rng(seed))


def test_the_worked_example():
  config = config_of()
  layout = lay_out(page(WORKED), config)
  expected = np.zeros((11, 2 * t.K), bool)
  for slot, image in enumerate(READS):
    expected[slot, (image - 1) * t.K : image * t.K] = image > 0
  np.testing.assert_array_equal(media_of(layout).dense(2 * t.K), expected)
  assert expected.sum(1).tolist() == [0, 0] + [t.K] * 9
  # 11 slots of text, of which an image is one: none of its rows is among them.
  assert layout.sizes["text"] == 11 and layout.sizes["table"] == 2 * t.K
  assert (layout.arrays["streams/text/tokens"] == t.VOCAB).tolist() == [
    word == "<image>" for word in WORKED]
  weight = layout.arrays["streams/text/loss_weights/lm"]
  assert weight.tolist() == [1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0]  # an image is not predicted
  assert layout.arrays["streams/text/targets"].max() < t.VOCAB


def test_the_interleaved_example():
  """T1 T2 I1 I2 I3 T3 T4 I4: three rows of image A, one of image B, to which no text is behind."""
  layout = lay_out(page(["T1", "T2", "<image>", "T3", "T4", "<image>"]), config_of())
  text = np.array([0, 1, 3, 4])  # without the slots of images
  a, b = np.split(media_of(layout).dense(2 * t.K)[text], 2, axis=1)
  assert a.all(1).tolist() == a.any(1).tolist() == [False, False, True, True]
  assert not b.any()
  np.testing.assert_array_equal(
    causal(6).dense()[np.ix_(text, text)], np.tril(np.ones((4, 4), bool)))


def test_the_picture_of_a_row_shows_the_table():
  config = config_of()
  image = np.asarray(inspect.draw_rows(config, flat_of(config, [page(WORKED)]), 1))
  text, left = config.data.tokens, 12 + config.data.tokens + 16  # two panels, 16 apart
  assert image.shape[:2] == (12 + text + 24, left + 12 + 4 * t.K)
  seen = (image[12 : 12 + 11, left + 12 : left + 12 + 2 * t.K] == inspect.SEEN).all(-1)
  np.testing.assert_array_equal(seen, media_of(lay_out(page(WORKED), config)).dense(2 * t.K))
  blue = (image[0, left + 12 :] == inspect.COLOURS["image"]).all(-1)
  assert blue.tolist() == [True] * 2 * t.K + [False] * 2 * t.K


def test_the_next_image():
  pictures = np.array([word == "<image>" for word in WORKED])
  assert flamingo.images_read(pictures).tolist() == READS
  assert flamingo.images_read(pictures, True).tolist() == [1, 1, 1, 2, 2, 2, 2, 0, 0, 0, 0]
  config = config_of()
  config.fusion.next_image = 0.5
  drawn = lambda source: np.mean([media_of(lay_out(page(WORKED, source), config, seed)).hi[0] > 0
                                  for seed in range(400)])
  assert drawn("pairs") == 0  # not a page
  config.data.sources.pairs.form = flamingo.PAGE
  assert abs(drawn("pairs") - 0.5) < 0.1


def test_text_before_the_first_image_may_be_left_out():
  config = config_of()
  config.fusion.predict_unseen = False
  weight = lay_out(page(WORKED), config).arrays["streams/text/loss_weights/lm"]
  assert weight.tolist() == [0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0]
  words = page(["only", "words", "here"])
  weight = lay_out(words, config).arrays["streams/text/loss_weights/lm"]
  assert weight.tolist() == [1, 1, 0]


def test_new_tokens_are_said_only_where_they_can_be():
  config = config_of()
  config.fusion.new_tokens = 2
  ends = page(["now", "see"])
  ends = dataclasses.replace(ends, parts=(*ends.parts, Tokens(
    np.array([t.VOCAB], np.int32), np.array([True]))))
  with pytest.raises(UsageError, match="page is to say token 61, .*config.fusion.say_new=True"):
    lay_out(ends, config)
  config.fusion.say_new = True
  assert lay_out(ends, config).arrays["streams/text/targets"].max() == t.VOCAB


@pytest.mark.parametrize("field, value, words", [
  ("image_attention", "lasst", "did you mean 'last'"), ("new_tokens", 0, "one for pictures"),
  ("next_image", 2.0, "a share from 0 to 1")])
def test_what_cannot_be_is_refused(field, value, words):
  config = config_of()
  config.fusion[field] = value
  with pytest.raises(UsageError, match=words):
    lay_out(page(WORKED), config)


# The model. All below share a few compiled programs.


def flat_of(config, documents) -> dict:
  return t.pack(t.lay_out(documents, config), config)[0]


@functools.cache
def worked():
  """Config, noisy parameters, the worked example and a page of words, packed."""
  config = config_of()
  documents = [page(WORKED), page(["only", "words"], "words", "words")]
  return config, t.noise_params(config), flat_of(config, documents)


def with_gates(params: dict, attention: float | None = None, mlp: float | None = None) -> dict:
  """The parameters with these numbers in the gates."""
  bridge = dict(params["bridge"])
  for name, value in (("attention_gate", attention), ("mlp_gate", mlp)):
    if value is not None:
      bridge[name] = jnp.full_like(bridge[name], value)
  return params | {"bridge": bridge}


def other_image(flat: dict, number: int) -> dict:
  images = flat["media/images/values"].copy()
  images[:, number] = 255 - images[:, number]
  return flat | {"media/images/values": images}


def changed(config, params, flat, other) -> list[bool]:
  """Which slots of the first row change when the batch is another one."""
  out = t.logits(config, params, flat) != t.logits(config, params, other)
  return out.any(-1)[0, : len(WORKED)].tolist()


def test_shut_gates_are_the_language_model():
  """To the bit with other images and with none; the bare model is another program, which rounds
  otherwise."""
  config, params, flat = worked()
  shut = with_gates(params, 0, 0)
  out = t.logits(config, shut, flat)
  unseen = {path: np.zeros_like(flat[path]) for path in ("masks/media/lo", "masks/media/hi")}
  for other in (other_image(flat, 0), flat | unseen):
    np.testing.assert_array_equal(t.logits(config, shut, other), out)
  bare = t.get_config("concat", "causal")
  row = params["new_embed"]["embedding"][0]  # of the token of pictures; token 0 is not used here
  llm = params["llm"] | {"embed": {"embedding": params["llm"]["embed"]["embedding"].at[0].set(row)}}
  tokens = flat["streams/text/tokens"]
  text = {path: values for path, values in flat.items() if "media" not in path}
  text |= {"streams/text/tokens": np.where(tokens == t.VOCAB, 0, tokens)}
  model = find_fusion(bare).Model(FrozenConfigDict(bare))
  run = jax.jit(lambda params, batch: model.apply({"params": params}, batch).logits())
  there = flat["streams/text/segment_ids"] > 0
  words = there, slice(1, None)  # the head is tied: the column of token 0 is another one, too
  expected = np.asarray(run({"llm": llm}, from_flat(text)))[words]
  assert t.error(out[words], expected) < 2e-6
  assert t.error(t.logits(config, params, flat)[words], expected) > 100 * 2e-6


def test_shut_gates_learn_before_what_is_behind_them():
  config, params, flat = worked()
  _, grads = t.value_and_grad(config, with_gates(params, 0, 0), flat)
  bridge = flatten(grads["bridge"])
  moved = {path for path, leaf in bridge.items() if np.any(leaf)}
  assert moved == {"attention_gate", "mlp_gate"}
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads["connector"]))
  moved = {path for path, leaf in flatten(
    t.value_and_grad(config, params, flat)[1]["bridge"]).items() if np.any(leaf)}
  assert moved == set(bridge)


def test_what_stands_before_the_first_image_never_changes():
  config, params, flat = worked()
  assert changed(config, params, flat, other_image(flat, 0)) == [False] * 2 + [True] * 9
  # Of the second image only what is behind it; the first reaches all of that too, as text.
  assert changed(config, params, flat, other_image(flat, 1)) == [False] * 6 + [True] * 5


def test_one_layer_reads_one_image():
  """Without self-attention a gated layer's rows depend on their own image alone."""
  config, params, flat = worked()
  layers = params["llm"]["layers"]
  still = jax.tree.map(jnp.zeros_like, layers["attention"]["out"])
  params = params | {"llm": params["llm"] | {"layers": layers | {
    "attention": layers["attention"] | {"out": still}}}}
  for number in (0, 1):
    got = changed(config, params, flat, other_image(flat, number))
    assert got == [image == number + 1 for image in READS]


def test_the_feed_forward_moves_rows_that_see_nothing():
  """As in OpenFlamingo and IDEFICS: the attention of a row before the first image is 0, and adds
  nothing whatever its gate; the feed-forward block behind the other gate changes every row."""
  config, params, flat = worked()
  out = functools.partial(t.logits, config, flat=flat)
  shut = out(with_gates(params, 0, 0))
  first, words = np.array(READS) == 0, slice(len(WORKED), len(WORKED) + 2)
  opened = out(with_gates(params, 1, 0)) != shut
  assert not opened.any(-1)[0, : len(WORKED)][first].any() and not opened[0, words].any()
  assert opened.any(-1)[0, : len(WORKED)][~first].all()
  assert (out(with_gates(params, 0, 1)) != shut).any(-1)[0, : words.stop].all()


def test_a_gate_for_every_channel():
  shapes = jax.tree.map(jnp.shape, t.noise_params(config_of(gate="vector"))["bridge"])
  assert shapes["attention_gate"] == (2, 32) and shapes["mlp_gate"] == (2, 32)
  with pytest.raises(UsageError, match="config.bridge.gate is 'vectr'"):
    t.noise_params(config_of(gate="vectr"))


# Where the gated layers stand; a stack with visitors is its layers written out.


class Add(nn.Module):
  """x * 2 + its number."""

  @nn.compact
  def __call__(self, x, columns, context):
    number = self.param("number", lambda key: jnp.zeros(()))
    return x * context + number, number if columns is None else columns + x


class Both(nn.Module):
  """Five layers and what visits them."""

  every: int
  first: int
  layers: int = 5

  @nn.compact
  def __call__(self, x, columns=None, kept=None):
    host = stack.run(Add, self.layers, name="host")
    count = stack.visits(self.layers, self.every, self.first)
    guests = stack.run(Add, count, name="guests")
    return stack.visit(host, stack.Visitors(guests, self.every, self.first, kept, 3.0), x, columns,
                       2.0)


@pytest.mark.parametrize("every, first", [(1, 0), (2, 0), (2, 1), (3, 2), (4, 0), (7, 0)])
def test_a_run_with_visitors(every, first):
  model, x, expected = Both(every, first), jnp.float32(0.5), 0.5
  params = model.init(jax.random.key(0), x)["params"]
  count = stack.visits(5, every, first)
  assert params["host"]["number"].shape == (5,) and params["guests"]["number"].shape == (count,)
  params = {"host": {"number": jnp.arange(5.0)}, "guests": {"number": 10 + jnp.arange(count * 1.0)}}
  columns, kept = [], []
  for layer in range(5):
    if layer % every == first:
      kept.append(7 + expected)
      expected = 3 * expected + 10 + layer // every
    columns.append(5 + expected)
    expected = 2 * expected + layer
  given = jnp.full(5, 5.0), jnp.full(count, 7.0)
  got = model.apply({"params": params}, x, *given)
  np.testing.assert_allclose(got[0], expected)
  np.testing.assert_allclose(got[1], columns)
  np.testing.assert_allclose(got[2], kept)
  # Apart, as decoding takes them, one after the other.
  again = model.apply({"params": stack.apart(params)}, x, *stack.apart(given))
  assert isinstance(again[1], list) and isinstance(again[2], list)
  np.testing.assert_allclose(jax.tree.leaves(again), [got[0], *got[1], *got[2]])


@pytest.mark.parametrize("every, first", [(0, 0), (2, 2), (3, 2)])
def test_no_place_for_a_gated_layer_is_refused(every, first):
  with pytest.raises(UsageError, match="config.bridge.every is"):
    t.noise_params(config_of(every=every, first=first))


def test_a_frozen_base_has_no_gradients():
  """Its gradients are not there: a step's memory holds neither them nor what they need."""
  config, params, flat = worked()
  batch, module = from_flat(flat), find_fusion(config)
  model = module.Model(t.same_network(config))

  def needed(names) -> int:
    moved = {name: params[name] for name in names}

    def loss(moved, params):
      output = model.apply({"params": params | moved}, batch)
      return module.losses(output, batch, config)["lm"].sum()

    found = jax.jit(jax.grad(loss)).lower(moved, params).compile().memory_analysis()
    return found.output_size_in_bytes + found.temp_size_in_bytes

  base = sum(leaf.nbytes for name in ("llm", "tower") for leaf in jax.tree.leaves(params[name]))
  assert needed(params) - needed(("bridge", "connector", "new_embed")) > base


def test_the_media_are_read_once():
  """Prefill keeps keys and values of the table for every gated layer; a step has no images."""
  config, params, flat = worked()
  model = flamingo.Model(t.same_network(config))
  batch = from_flat(flat)
  rows, slots = batch.streams["text"].tokens.shape
  k_index = np.broadcast_to(np.arange(slots, dtype=np.int32), (rows, slots))
  text = dataclasses.replace(batch.masks["text"], k_index=k_index)
  cache = find_llm(config).empty_cache(config.llm, rows, slots, np.float32)
  batch = dataclasses.replace(batch, masks=batch.masks | {"text": text})
  cache = jax.eval_shape(
    lambda params, cache: model.apply({"params": params}, batch, cache=cache).cache, params, cache)
  table = find_fusion(config).axes(config)["table"]
  assert [leaf.shape for leaf in cache.memory] == [(2, rows, table, 4, 8)] * 2
