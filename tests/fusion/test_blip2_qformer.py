"""BLIP-2's first stage: masks, losses, negatives. Its embeddings keep the contract of contrast."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertOnlyMLMHead

from tests.fusion import contrast as c
from tests.fusion import testing as t
from tests.fusion.test_contract import pictures
from vlm_jax.connectors import qformer
from vlm_jax.core.batch import from_flat
from vlm_jax.core.errors import UsageError
from vlm_jax.core.mask import draw
from vlm_jax.core.precision import Precision
from vlm_jax.fusion import blip2_qformer as stage1
from vlm_jax.ops.contrastive import NONE
from vlm_jax.train.step import make_step

TOLERANCE, LOUD = 2e-6, 100


@functools.cache
def made():
  """Config, params, flat batch of uneven rows with two equal texts, and what the model says."""
  config = c.get_config("blip2_qformer")
  docs = c.documents(0)
  docs[5] = docs[5].__class__((docs[5].parts[0], docs[2].parts[1]), "words", docs[5].key)
  flat, where = c.pack(t.lay_out(docs, config), config)
  params = t.noise_params(config)
  params = {**params, "temperature": jnp.float32(0.3)}
  model = stage1.Model(config)
  run = jax.jit(lambda params, flat: model.apply({"params": params}, from_flat(flat)))
  full = [where[one.key] for one in docs if len(one.parts) == 2]
  return config, params, flat, run(params, flat), tuple(np.array(full).T)


def test_docstring_pictures_are_the_masks():
  drawn = pictures(stage1.__doc__)
  assert [labels for labels, _ in drawn] == ["tttqqddd", "qqttt"]
  both = jax.tree.map(lambda x: np.asarray(x)[0], stage1.mask_of_both(jnp.array([3]), 2, 3, True))
  order = np.argsort(both.k_index)
  assert draw(both.dense()[np.ix_(order, order)], drawn[0][0]) == drawn[0][1]
  match = jax.tree.map(lambda x: np.asarray(x)[0], qformer.mask_of_told(jnp.array([3]), 2, 3))
  assert match.picture(drawn[1][0]) == drawn[1][1]
  # Padding behind a text is seen by nobody but what pads.
  short = jax.tree.map(lambda x: np.asarray(x)[0], stage1.mask_of_both(jnp.array([2]), 2, 3, True))
  assert not short.dense()[:5, 4].any() and not short.dense()[5:7, 7].any()
  alone = stage1.mask_of_both(jnp.array([2]), 0, 3, False)
  assert np.asarray(alone.dense())[0].tolist() == [[True, True, False]] * 3


def test_losses_are_torchs():
  """Cross-entropies of the outputs, of pairs alone: smoothed over pictures and over words."""
  config, _, flat, out, at = made()
  batch = from_flat(flat)
  sums = {name: float(values.sum()) for name, values in
          stage1.losses(out, batch, config).items()}
  weights = {name: float(values.sum()) for name, values in stage1.weights(batch, config).items()}
  smooth = lambda logits, labels: torch.nn.functional.cross_entropy(
    torch.tensor(np.array(logits)), torch.tensor(labels).long(), reduction="sum",
    label_smoothing=0.1)
  # Two texts are equal: itc leaves out what is neither pair nor stranger, torch cannot; so by rows.
  image, text = np.asarray(out.image)[at], np.asarray(out.text)[at]
  logits = float(out.scale) * np.einsum("nke,me->nkm", image, text).max(1)
  equal = np.zeros(logits.shape, bool)
  equal[1, 3] = equal[3, 1] = True
  itc = sum(float(smooth(one[row][~equal[row]][None], [int((~equal[row])[:row].sum())]))
            for one in (logits, logits.T) for row in range(len(one))) / 2
  assert sums["itc"] == pytest.approx(itc, rel=1e-5) and weights["itc"] == len(image) == 4
  told = np.asarray(out.matches)[at].reshape(-1, 2)
  itm = torch.nn.functional.cross_entropy(torch.tensor(told), torch.tensor([1, 0, 0] * 4),
                                          reduction="sum")
  assert sums["itm"] == pytest.approx(float(itm), rel=1e-5) and weights["itm"] == 12
  tokens = flat["documents/captions/tokens"][at]
  said = np.asarray(out.hidden @ out.head).reshape(2, 4, c.LENGTH, -1)[at][:, :-1]
  real = tokens[:, 1:] > 0
  itg = smooth(said[real], tokens[:, 1:][real])
  assert sums["itg"] == pytest.approx(float(itg), rel=1e-5) and weights["itg"] == real.sum()


def test_what_says_a_text_is_berts_head():
  config = c.get_config("blip2_qformer").connector
  torch.manual_seed(0)
  theirs = BertOnlyMLMHead(BertConfig(
    vocab_size=t.VOCAB, hidden_size=config.slot_width, hidden_act="gelu",
    layer_norm_eps=config.norm_eps))
  for weight in theirs.parameters():
    torch.nn.init.normal_(weight, 0, 0.3)
  head = theirs.predictions
  get = lambda weight: jnp.asarray(weight.detach().numpy())
  dense, norm = head.transform.dense, head.transform.LayerNorm
  params = {"linear": {"kernel": get(dense.weight).T, "bias": get(dense.bias)},
            "norm": {"scale": get(norm.weight), "bias": get(norm.bias)},
            "bias": get(head.decoder.bias)}
  x = np.random.default_rng(0).normal(size=(2, 3, config.slot_width)).astype(np.float32)
  hidden, ours = stage1.Caption(config, Precision()).apply(
    {"params": params}, x, get(head.decoder.weight))
  expected = theirs(torch.tensor(x)).detach().numpy()
  assert t.error(hidden @ ours, expected) < 5 * TOLERANCE
  assert t.error(hidden @ ours.at[-1].set(0), expected) > LOUD * TOLERANCE


def test_strangers_are_drawn_from_the_similar_and_never_the_own():
  config, _, flat, out, _ = made()
  batch = from_flat(flat)
  keys = jax.random.split(jax.random.key(0), 3000)
  drawn = np.asarray(jax.vmap(lambda key: jnp.stack(stage1.strangers(out, batch, key)))(keys))
  pairs = stage1.pairs(out, batch)
  there, digests = np.asarray(pairs.there), np.asarray(pairs.digests)
  allowed = there[:, None] & there & (digests[:, None] != digests).any(-1)
  assert allowed[there].any(1).all() and not allowed.diagonal().any()
  logits = float(out.scale) * np.einsum("nke,me->nkm", pairs.image, pairs.text).max(1)
  for side, scores in enumerate((logits, logits.T)):
    chance = np.exp(np.where(allowed, scores, NONE) - scores.max())
    chance /= np.maximum(chance.sum(1, keepdims=True), 1e-30)
    for row in np.flatnonzero(there):
      share = np.bincount(drawn[:, side, row], minlength=len(there)) / len(keys)
      assert not share[~allowed[row]].any()
      np.testing.assert_allclose(share, chance[row], atol=5 * 0.5 / len(keys) ** 0.5)
    hardest = np.asarray(stage1.strangers(out, batch, None)[side])
    np.testing.assert_array_equal(hardest[there], chance.argmax(1)[there])


def test_pairs_that_are_told_apart():
  """The first is the document's own, the others those of the strangers that were drawn."""
  config, params, flat, out, at = made()
  model = stage1.Model(config)
  run = jax.jit(lambda flat: model.apply({"params": params}, from_flat(flat), method="matching"))
  text, image = (np.asarray(x).reshape(2, 4)[at] for x in stage1.strangers(out, from_flat(flat),
                                                                          None))
  path, pixels = "documents/captions/tokens", "media/images/values"
  flatten = lambda name: flat[name].reshape(8, *flat[name].shape[2:])
  other_text, other_image = flat[path].copy(), flat[pixels].copy()
  other_text[at], other_image[at] = flatten(path)[text], flatten(pixels)[image]
  matches = np.asarray(out.matches)[at]
  for number, changed in enumerate((flat, flat | {pixels: other_image}, flat | {path: other_text})):
    assert t.error(np.asarray(run(changed))[at], matches[:, number]) < TOLERANCE
  assert t.error(matches[:, 1], matches[:, 0]) > LOUD * TOLERANCE


def test_it_does_not_accumulate_and_needs_a_reader():
  config = c.get_config("blip2_qformer")
  config.train.accumulation = 2
  with pytest.raises(UsageError, match="accumulation is 2, but config.fusion.objectives.itm"):
    make_step(config, stage1, None, None, None)
  config.connector.vocab_size = 0
  with pytest.raises(UsageError, match="set config.connector.name='qformer'"):
    jax.eval_shape(stage1.Model(config).init, jax.random.key(0), from_flat(made()[2]))
