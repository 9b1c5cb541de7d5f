"""Attention maps: the exact weights, in the right place, under the right word."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.generate.helpers import SIDE, noise, picture, question, tiny, words
from vlm_jax.core.batch import from_flat
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_connector, find_fusion, find_tower
from vlm_jax.core.precision import precision
from vlm_jax.generate import maps
from vlm_jax.generate.prompts import layouts, stack
from vlm_jax.nn.attention_maps import record

ANSWER = [9, 20, 33]


@pytest.fixture(scope="module")
def setup():
  config = tiny(form="single")
  prompt = question(5, seed=3)
  weights, fill = maps.attention(config, noise(config), prompt, ANSWER)
  return config, noise(config), prompt, weights, fill


def rms(x, scale):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def turned(x, positions):
  """Rotary positions of x f[T,H,C], halves of a head as pairs, written out."""
  half = x.shape[-1] // 2
  angle = positions[:, None] * 10000.0 ** (-np.arange(half) / half)
  cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
  one, two = x[..., :half], x[..., half:]
  return np.concatenate([one * cos - two * sin, two * cos + one * sin], -1)


def oracle(config, params, flat, shift=0):
  """The weights f64[L,H,T,T], layer by layer in numpy, from the embedded sequence on."""
  llm = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["llm"])
  text, mask = from_flat(flat).streams["text"], from_flat(flat).masks["text"]
  tower, connector, dtypes = find_tower(config), find_connector(config), precision(config)
  features = tower.Model(config.tower, config.attention, dtypes).apply(
    {"params": params["tower"]}, jnp.asarray(flat["media/images/values"]))
  table = connector.Model(config.connector, config.llm.width, dtypes).apply(
    {"params": params["connector"]}, features.patches, tower.grid(config.tower))
  table = np.asarray(table, np.float64).reshape(-1, config.llm.width)
  fill = text.fill[0]
  x = np.where(fill[:, None] >= 0, table[np.maximum(fill, 0)],
               llm["embed"]["embedding"][text.tokens[0]])
  # A twin shifts the mask by a slot.
  seen = np.asarray(dataclasses.replace(mask, hi=mask.hi - shift).dense())[0]
  found = []
  for layer in range(config.llm.depth):
    p = jax.tree.map(lambda leaf, layer=layer: leaf[layer], llm["layers"])
    y = rms(x, p["attention_norm"]["scale"])
    q, k, v = (np.einsum("td,dhc->thc", y, p["attention"][name]["kernel"])
               for name in ("query", "key", "value"))
    q, k = (turned(z, np.asarray(text.positions[0], np.float64)) for z in (q, k))
    repeat = q.shape[1] // k.shape[1]
    k, v = (np.repeat(z, repeat, 1) for z in (k, v))
    logits = np.einsum("thc,shc->hts", q, k) / np.sqrt(q.shape[-1])
    logits = np.where(seen, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    found.append(weights)
    x = x + np.einsum("hts,shc,hcd->td", weights, v, p["attention"]["out"]["kernel"])
    y = rms(x, p["mlp_norm"]["scale"])
    gate, up = y @ p["mlp"]["gate"]["kernel"], y @ p["mlp"]["up"]["kernel"]
    x = x + (gate / (1 + np.exp(-gate)) * up) @ p["mlp"]["down"]["kernel"]
  return np.stack(found)


def test_the_weights_are_those_of_the_layers(setup):
  config, params, prompt, weights, fill = setup
  said = words(3, 0)
  whole = dataclasses.replace(prompt, parts=(*prompt.parts, dataclasses.replace(
    said, ids=np.asarray(ANSWER, np.int32), loss=np.ones(3, bool))))
  flat = stack(layouts([whole], config), config, rows=1, bucket=1).flat
  want = oracle(config, params, flat)
  assert weights.shape == want.shape == (2, 4, 4 + 5 + 3, 12)
  assert np.isfinite(weights).all() and weights.std() > 0.01
  np.testing.assert_allclose(weights, want, atol=5e-6)
  assert np.abs(weights - oracle(config, params, flat, shift=1)).max() > 5e-4
  assert (fill >= 0).sum() == 4


def test_only_what_was_asked_for_is_recorded(setup):
  config, params, prompt, weights, _ = setup
  flat = stack(layouts([prompt], config), config, rows=1, bucket=1).flat
  model = find_fusion(config).Model(config)
  run = lambda params, flat: model.apply({"params": params}, from_flat(flat)).hidden
  before = jax.jit(run)(params, flat)
  tower = record(run, params, flat, under="tower")
  assert [layer.shape for layer in tower] == [(1, 2, 4, 4)] * config.tower.depth
  assert record(run, params, flat, under="llm")[0].shape == (1, 4, 9, 9)
  assert (jax.jit(run)(params, flat) == before).all()


class Letters:
  """Token i is PIECES[i]."""

  PIECES = {9: "a", 20: "b", 33: " c"}

  def decode(self, tokens):
    return "".join(self.PIECES[int(token)] for token in tokens)


def test_maps_are_the_weights_on_the_slots_of_the_picture(setup):
  config, params, prompt, weights, fill = setup
  found = maps.word_maps(config, params, prompt, ANSWER, Letters())
  assert [word.word for word in found] == ["ab", "c"]
  # Slots 0 to 3 are the picture, 2 x 2 in reading order; slot 8 predicts the first token.
  mean = weights.mean((0, 1))
  for word, rows in zip(found, ([8, 9], [10]), strict=True):
    want = mean[rows][:, :4].mean(0)
    np.testing.assert_allclose(word.maps, want.reshape(1, 2, 2), rtol=1e-6)
    assert word.share == pytest.approx(want.sum(), rel=1e-6) and 0 < word.share < 1
  last = maps.word_maps(config, params, prompt, ANSWER, Letters(), layers=[-1])
  np.testing.assert_allclose(last[1].maps[0].ravel(), weights[-1].mean(0)[10, :4], rtol=1e-6)
  assert np.abs(last[1].maps - found[1].maps).max() > 1e-3
  with pytest.raises(UsageError, match="layers 0 to 1, got 2"):
    maps.word_maps(config, params, prompt, ANSWER, Letters(), layers=[2])
  with pytest.raises(UsageError, match="needs a picture"):
    maps.word_maps(config, params, question(5, image=False), ANSWER, Letters())
  with pytest.raises(UsageError, match="said nothing"):
    maps.word_maps(config, params, prompt, [], Letters())


def test_words_of_split_characters():
  class Bytes:
    def decode(self, tokens):
      return bytes(tokens).decode("utf-8", errors="replace")

  said = "caf\u00e9 \u4e2d b"
  found = maps.words(list(said.encode()), Bytes())
  assert [word for word, _ in found] == said.split()
  assert [index for _, members in found for index in members] == list(range(len(said.encode())))


def test_the_drawing_is_brightest_where_the_weight_is():
  weights = np.array([[[0.0, 0.1], [0.9, 0.0]]])
  assert np.asarray(maps.draw([maps.WordMap("even", 0.4, np.ones((2, 2, 2)))],
                              [picture(1).values, picture(2).values])).std() > 10
  image = maps.draw([maps.WordMap("left below", 0.4, weights)] * 3, [picture(1).values])
  assert image.size == (4 * (maps.SIDE + maps.GAP) + maps.GAP, maps.SIDE + 2 * maps.LINE + 20)
  panel = np.asarray(maps.heat(weights[0] / 0.9, np.full((SIDE, SIDE, 3), 128, np.uint8)), float)
  corners = [panel[y, x].sum() for y, x in ((8, 8), (8, -8), (-8, 8), (-8, -8))]
  assert np.argmax(corners) == 2 and corners[1] > corners[0]


def test_slots_that_are_no_grid_are_refused(setup, monkeypatch):
  config = setup[0]
  fusion = find_fusion(config)
  assert maps.grid(config)[1] == (2, 2)
  monkeypatch.setattr(fusion, "rows", lambda config: np.arange(3))
  with pytest.raises(UsageError, match="are no grid"):
    maps.grid(config)
