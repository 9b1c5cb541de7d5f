import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.core import meta
from ml_collections import FrozenConfigDict

from vlm_jax.configs import base
from vlm_jax.convert import table
from vlm_jax.core.errors import UsageError
from vlm_jax.core.mask import NEVER, IntervalMask
from vlm_jax.core.precision import Precision
from vlm_jax.core.tree import flatten
from vlm_jax.llm import llama

TOLERANCE = 2e-4
ROWS, SLOTS = 2, 9


def get_config(**overrides):
  config = base.get_config()
  config.llm.update(vocab_size=37, width=24, depth=2, mlp=40, heads=4, kv_heads=2, head_dim=10,
                    rope_theta=500.0, norm_eps=1e-2, **overrides)
  return config


class Whole(llama.Model):
  """From tokens, to make all parameters."""

  def __call__(self, tokens, positions, mask, cache=None):
    return super().__call__(self.embed(tokens), positions, mask, cache)


def causal(rows=ROWS, slots=SLOTS):
  lo = jnp.zeros((rows, slots), jnp.int32)
  return IntervalMask(lo, lo + jnp.arange(1, slots + 1))


def make(config):
  config = FrozenConfigDict(config)  # modules that jit hashes
  model = Whole(config.llm, config.attention, Precision())
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 37, (ROWS, SLOTS)).astype(np.int32)
  positions = np.broadcast_to(np.arange(SLOTS, dtype=np.int32), tokens.shape)
  shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens, positions, causal()))
  params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype), shapes)
  return model, params, tokens, positions


@pytest.mark.parametrize("tie", [True, False])
def test_is_their_llama(tie):
  config = get_config(tie_embeddings=tie)
  model, params, tokens, positions = make(config)
  theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=37, hidden_size=24, num_hidden_layers=2, intermediate_size=40,
    num_attention_heads=4, num_key_value_heads=2, head_dim=10, rms_norm_eps=1e-2,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0}, tie_word_embeddings=tie,
    attn_implementation="eager",
  )).eval()
  flat = flatten(params["params"])
  shapes = {path: leaf.shape for path, leaf in flat.items()}
  leaves = table.export(params["params"], table.entries([("", "", llama.KEYS)], shapes))
  state = {key: torch.tensor(np.ascontiguousarray(leaf.get())) for key, leaf in leaves.items()}
  missing, unexpected = theirs.load_state_dict(state, strict=False)
  assert not unexpected and missing == (["lm_head.weight"] if tie else [])
  theirs.tie_weights()
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
  out = jax.jit(lambda params: model.apply(params, tokens, positions, causal()).logits())
  error = lambda params: np.abs(out(params) - expected).max() / np.abs(expected).max()
  assert expected.std() > 0.1
  assert error(params) < TOLERANCE
  # Twin: query heads in another order share other keys.
  swapped = jax.tree.map(lambda leaf: leaf, params)
  kernel = swapped["params"]["layers"]["attention"]["query"]["kernel"]
  swapped["params"]["layers"]["attention"]["query"]["kernel"] = kernel[:, :, [0, 2, 1, 3]]
  assert error(swapped) > 100 * TOLERANCE


def test_bf16():
  config = get_config()
  model, params, tokens, positions = make(config)
  expected = jax.jit(model.apply)(params, tokens, positions, causal()).logits()
  half = Whole(model.config, model.attention, Precision(jnp.float32, jnp.bfloat16))
  out = jax.jit(half.apply)(params, tokens, positions, causal())
  assert out.hidden.dtype == jnp.bfloat16 and out.logits().dtype == jnp.float32
  error = np.abs(out.logits() - expected).max() / np.abs(expected).max()
  assert 1e-5 < error < 0.1


def test_cache_in_pieces():
  config = get_config()
  model, params, tokens, positions = make(config)
  run = jax.jit(model.apply)
  full = run(params, tokens, positions, causal())
  cache = llama.empty_cache(config.llm, ROWS, SLOTS, jnp.float32)
  assert cache.k.shape == (2, ROWS, SLOTS, 2, 10)
  assert full.cache is None
  hidden = []
  for start, stop in ((0, 4), (4, 5), (5, 9)):
    index = np.where(np.arange(SLOTS) < stop, np.arange(SLOTS), NEVER)
    k_index = jnp.broadcast_to(jnp.asarray(index, jnp.int32), (ROWS, SLOTS))
    piece = IntervalMask(causal().lo[:, start:stop], causal().hi[:, start:stop], k_index=k_index)
    out = run(params, tokens[:, start:stop], positions[:, start:stop], piece, cache)
    cache = out.cache
    hidden.append(out.hidden)
  assert cache.length == SLOTS
  np.testing.assert_allclose(np.concatenate(hidden, 1), full.hidden, atol=1e-5)


@pytest.mark.parametrize("fields, sentence", [
  ({"width": 100, "heads": 4}, "a head has 25 channels"),
  ({"head_dim": 7}, "a head has 7 channels"),
  ({"heads": 3, "kv_heads": 2, "head_dim": 8}, "heads is 3, which must be a multiple of kv"),
])
def test_heads_that_cannot_be(fields, sentence):
  config = base.get_config().llm
  config.update(fields)
  with pytest.raises(UsageError, match=sentence):
    llama.head_dim(config)


def test_every_mask_is_supported():
  assert llama.supports(causal()) is None
