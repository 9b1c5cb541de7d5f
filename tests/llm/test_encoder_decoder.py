"""Our encoder and decoder blocks against T5 v1.1's, the cache, and what the config refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.core import meta
from ml_collections import FrozenConfigDict
from transformers import T5Config
from transformers.models.t5 import modeling_t5

from tests.numbers import error
from vlm_jax.configs import base
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_llm
from vlm_jax.core.mask import NEVER, IntervalMask
from vlm_jax.core.precision import Precision
from vlm_jax.llm import encoder_decoder
from vlm_jax.nn.attention import make_context

TOLERANCE, LOUD = 2e-4, 100
ROWS, SLOTS, KEYS = 2, 7, 9
WIDTH, HEADS, HEAD, MLP, VOCAB = 24, 3, 16, 40, 31


def get_config(**overrides):
  config = base.get_config()
  config.llm.update(name="encoder_decoder", vocab_size=VOCAB, width=WIDTH, depth=2, mlp=MLP,
                    heads=HEADS, kv_heads=HEADS, head_dim=HEAD, norm_eps=1e-2, **overrides)
  return FrozenConfigDict(config)


T5 = dict(norm="rms", feed_forward="gated", activation="gelu_tanh", query_scalar=1.0)
SIMVLM = dict(norm="layer", feed_forward="plain", activation="gelu", linear_bias=True, positions=16)


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def noise(shapes, seed=0, scale=0.3):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: rng.normal(0, scale, leaf.shape).astype(np.float32),
                      meta.unbox(shapes))


def intervals(hi, rows=ROWS):
  hi = jnp.broadcast_to(jnp.asarray(hi, jnp.int32), (rows, len(hi)))
  return IntervalMask(jnp.zeros_like(hi), hi)


def block_pair(decoder: bool):
  """Their block with noise for parameters, and ours with the same; (theirs, ours, parameters)."""
  theirs = modeling_t5.T5Block(T5Config(
    d_model=WIDTH, d_kv=HEAD, d_ff=MLP, num_heads=HEADS, feed_forward_proj="gated-gelu",
    layer_norm_epsilon=1e-2, dropout_rate=0.0, is_decoder=decoder, vocab_size=VOCAB,
    attn_implementation="eager"), has_relative_attention_bias=True, layer_idx=0).eval()
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for leaf in theirs.parameters():
      leaf.copy_(0.3 * torch.randn(leaf.shape, generator=generator))
  return theirs, ours_of(theirs, decoder)


def ours_of(theirs, decoder: bool, take=lambda leaf: leaf.detach()):
  """Their parameters (or what `take` reads of each, e.g. gradients) in our tree."""
  leaf = lambda module: take(module.weight).numpy().T.copy()

  def attention(module):
    split = lambda name: leaf(getattr(module, name)).reshape(WIDTH, HEADS, HEAD)
    return {"query": {"kernel": split("q")}, "key": {"kernel": split("k")},
            "value": {"kernel": split("v")},
            "out": {"kernel": leaf(module.o).reshape(HEADS, HEAD, WIDTH)}}

  feed = theirs.layer[-1]
  mlp = {"gate": feed.DenseReluDense.wi_0, "up": feed.DenseReluDense.wi_1,
         "down": feed.DenseReluDense.wo}
  params = {
    "attention_norm": {"scale": leaf(theirs.layer[0].layer_norm)},
    "attention": attention(theirs.layer[0].SelfAttention),
    "mlp_norm": {"scale": leaf(feed.layer_norm)},
    "gated": {name: {"kernel": leaf(module)} for name, module in mlp.items()},
  }
  if decoder:
    params["cross_norm"] = {"scale": leaf(theirs.layer[1].layer_norm)}
    params["cross"] = attention(theirs.layer[1].EncDecAttention)
  return params


@pytest.mark.parametrize("decoder", [False, True])
def test_blocks_are_t5s(decoder):
  """Outputs and gradients, T5's own relative bias included, under ragged masks."""
  theirs, params = block_pair(decoder)
  config = get_config(**T5)
  parts = encoder_decoder.Parts(config.llm, "auto", Precision())
  x, memory, cotangent = draw(ROWS, SLOTS, WIDTH), draw(ROWS, KEYS, WIDTH, seed=1), draw(
    ROWS, SLOTS, WIDTH, seed=2)
  bias = theirs.layer[0].SelfAttention.compute_bias(SLOTS, SLOTS).detach()
  spread = jnp.broadcast_to(jnp.asarray(bias.numpy()), (ROWS, HEADS, SLOTS, SLOTS))
  own = intervals(range(1, SLOTS + 1) if decoder else [SLOTS] * SLOTS)
  cross = intervals([KEYS - 2] * SLOTS)

  def run(params, bias, memory=memory):
    context = make_context(own, None, (8, 8), bias=bias)
    if not decoder:
      return encoder_decoder.EncoderBlock(parts).apply({"params": params}, x, None, context)[0]
    other = make_context(cross, None, (8, 8), keys=KEYS)
    contexts = encoder_decoder.Contexts(context, other, memory)
    return encoder_decoder.DecoderBlock(parts).apply({"params": params}, x, None, contexts)[0]

  got = jax.jit(run)(params, spread)
  grads = jax.jit(jax.grad(lambda params: jnp.sum(run(params, spread) * cotangent)))(params)

  hidden = lambda mask: torch.where(torch.tensor(np.asarray(mask)), 0.0, -1e30)[:, None]
  more = dict(encoder_hidden_states=torch.tensor(memory),
              encoder_attention_mask=hidden(cross.dense(KEYS))) if decoder else {}
  out = theirs(torch.tensor(x), attention_mask=hidden(own.dense()), position_bias=bias, **more)
  out = out[0] if isinstance(out, tuple) else out
  expected = out.detach().numpy()
  assert np.isfinite(expected).all() and expected.std() > 0.1
  assert error(got, expected) < TOLERANCE
  (out * torch.tensor(cotangent)).sum().backward()
  wanted = ours_of(theirs, decoder, lambda leaf: leaf.grad)
  worst = jax.tree.map(error, grads, wanted)
  assert max(jax.tree.leaves(worst)) < TOLERANCE, worst
  # Twins: without the bias, and without the encoder's last visible slots.
  assert error(jax.jit(run)(params, None), expected) > LOUD * TOLERANCE
  if decoder:
    other = memory.copy()
    other[:, : KEYS - 2] += 0.5
    assert error(jax.jit(run)(params, spread, other), expected) > LOUD * TOLERANCE
    other = memory.copy()
    other[:, KEYS - 2 :] += 0.5  # nobody sees these
    np.testing.assert_array_equal(jax.jit(run)(params, spread, other), got)


class Whole(encoder_decoder.Model):
  """From tokens on both sides."""

  def __call__(self, source, target, places, masks, cache=None):
    own, cross, full = masks
    memory = None
    if source is not None:
      index = jnp.broadcast_to(jnp.arange(source.shape[1]), source.shape)
      memory = self.encode(self.embed(source, index, "encoder"), index, full)
    x = self.embed(target, places, "decoder")
    return super().__call__(x, places, memory, own, cross, cache)


def make(**overrides):
  config = get_config(**overrides)
  model = Whole(config.llm, config.attention, Precision())
  rng = np.random.default_rng(0)
  source = rng.integers(0, VOCAB, (ROWS, KEYS)).astype(np.int32)
  target = rng.integers(0, VOCAB, (ROWS, SLOTS)).astype(np.int32)
  places = np.broadcast_to(np.arange(SLOTS, dtype=np.int32), target.shape)
  masks = intervals(range(1, SLOTS + 1)), intervals([KEYS] * SLOTS), intervals([KEYS] * KEYS)
  shapes = jax.eval_shape(model.init, jax.random.key(0), source, target, places, masks)
  return config, model, noise(shapes), source, target, places, masks


def test_cached_decoding_is_the_whole_pass():
  config, model, params, source, target, places, masks = make(encoder_depth=1, **SIMVLM)
  run = jax.jit(model.apply)
  expected = run(params, source, target, places, masks).logits()
  assert expected.std() > 0.1
  cache = encoder_decoder.empty_cache(config.llm, ROWS, SLOTS, np.float32)
  index = jnp.broadcast_to(jnp.arange(SLOTS, dtype=jnp.int32), (ROWS, SLOTS))
  own, cross, full = masks
  first = 3
  place = lambda written: jnp.where(index < written, index, NEVER)
  begin = IntervalMask(own.lo[:, :first], own.hi[:, :first], k_index=place(first))
  part = IntervalMask(cross.lo[:, :first], cross.hi[:, :first])
  out = run(params, source, target[:, :first], places[:, :first], (begin, part, full), cache)
  got = [out.logits()]
  for slot in range(first, SLOTS):
    at = slice(slot, slot + 1)
    step = IntervalMask(own.lo[:, at], own.hi[:, at], k_index=place(slot + 1))
    part = IntervalMask(cross.lo[:, at], cross.hi[:, at])
    # The encoder's slots are not given again: their keys are in the cache.
    out = run(params, None, target[:, at], places[:, at], (step, part, None), out.cache)
    got.append(out.logits())
  assert error(np.concatenate(got, 1), np.asarray(expected)) < 2e-6
  with pytest.raises(ValueError, match="needs the encoder's memory, or a cache"):
    model.apply(params, None, target, places, masks)


def test_parameters_are_those_of_the_config():
  _, _, params, *_ = make(encoder_depth=3, **SIMVLM)
  tree = params["params"]
  assert set(tree) == {"embed", "encoder", "decoder"}
  assert set(tree["encoder"]) == set(tree["decoder"]) == {"positions", "layers", "norm"}
  assert tree["encoder"]["layers"]["mlp"]["up"]["bias"].shape == (3, MLP)
  assert tree["decoder"]["layers"]["cross"]["query"]["bias"].shape == (2, HEADS, HEAD)
  _, _, params, *_ = make(tie_embeddings=False, **T5)
  tree = params["params"]
  assert set(tree) == {"embed", "encoder", "decoder", "head"}
  assert not any("bias" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree))


def test_positions_behind_the_last_are_not_silent():
  _, model, params, source, target, places, masks = make(**SIMVLM)
  run = jax.jit(model.apply)
  assert np.isfinite(run(params, source, target, places + 9, masks).logits()).all()
  assert np.isnan(run(params, source, target, places + 10, masks).logits()[:, -1]).all()


@pytest.mark.parametrize("overrides, sentence", [
  (dict(norm="lyer"), "config.llm.norm is 'lyer'; did you mean 'layer'"),
  (dict(feed_forward="plian"), "config.llm.feed_forward is 'plian'; did you mean 'plain'"),
  (dict(linear_bias=True), "config.llm.linear_bias: the gated feed-forward block has no biases"),
])
def test_what_cannot_be_is_refused(overrides, sentence):
  with pytest.raises(UsageError, match=sentence):
    make(**overrides)


def test_a_model_of_the_other_kind_is_refused():
  config = base.get_config()
  assert find_llm(config, "decoder").KIND == "decoder"
  config.llm.name = "encoder_decoder"
  with pytest.raises(UsageError, match="config.llm.name 'encoder_decoder' is of kind "
                                       "'encoder-decoder'; config.fusion.name 'prefix_lm' needs"):
    find_llm(config, "decoder")
