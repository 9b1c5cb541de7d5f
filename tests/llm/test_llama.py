"""Llama held to transformers; its cache, its sizes, and soft caps of all families.

Measured: logits below 2e-6, gradients below 6e-6.
"""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax.core import meta
from ml_collections import FrozenConfigDict

from tests.llm import published
from vlm_jax.configs import base
from vlm_jax.convert import nodes, table
from vlm_jax.core.batch import Stream
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.core.fusion import Output
from vlm_jax.core.mask import NEVER, IntervalMask
from vlm_jax.core.precision import Precision
from vlm_jax.core.tree import flatten, unflatten
from vlm_jax.fusion import concat
from vlm_jax.llm import _decoder, llama
from vlm_jax.ops import rope

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


KINDS = {  # seed, tied, rope_parameters beyond theta
  "tied": (0, True, {}),  # SmolLM2
  "llama3": (1, False, dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                            high_freq_factor=4.0, original_max_position_embeddings=32)),
}


@pytest.fixture(scope="module", params=KINDS)
def reference(request, tmp_path_factory):
  seed, tied, more = KINDS[request.param]
  theirs = transformers.LlamaConfig(**published.numbers(seed), tie_word_embeddings=tied,
                                    rope_parameters=published.rope(seed, **more))
  return published.Reference(transformers.LlamaForCausalLM, theirs,
                             tmp_path_factory.mktemp("theirs") / "model")


def test_logits_and_gradients(reference):
  published.check_logits_and_gradients(reference)


def test_greedy_tokens(reference):
  published.check_greedy_tokens(reference)


def test_files(reference, tmp_path):
  published.check_files(reference, tmp_path)


def test_twins_fail_loudly(reference, monkeypatch):
  wrong = {"norm_eps": 1e-12, "activation": "gelu"}
  if reference.config.llm.rope_scaling == "llama3":
    wrong |= {"rope_scaling": "linear", "rope_high": 5.0, "rope_factor": 7.0}
  errors = {name: reference.twin(**{name: value}) for name, value in wrong.items()}
  flat, path = flatten(reference.params), "layers/attention/query/kernel"
  swapped = unflatten(flat | {path: flat[path][:, :, [0, 2, 1, 3]]})  # heads share other keys
  if reference.config.llm.kv_heads == 2:
    errors["groups"] = reference.error(reference.run(params=swapped))
  interleaved = lambda width, theta: rope.sequence(width, theta).interleaved()  # of Meta's files
  monkeypatch.setattr("vlm_jax.llm._decoder.sequence", interleaved)
  errors["rope"] = reference.error(reference.run())
  print({name: f"{error:.1e}" for name, error in errors.items()})
  assert min(errors.values()) > 100 * published.LOGITS, errors


def test_a_tied_head_in_the_file_must_be_the_embedding(reference):
  tensors = {key: tensor.get() for key, tensor in table.export(
    reference.params, nodes.entries(reference.config.llm, "llm")).items()}
  tied = reference.config.llm.tie_embeddings
  assert ("lm_head.weight" in tensors) != tied
  load = lambda head: nodes.load(
    Tensors(tensors | {"lm_head.weight": head}), nodes.entries(reference.config.llm, "llm"),
    tied and nodes.HEAD)
  embedding = tensors["model.embed_tokens.weight"]
  load(embedding)
  if tied:
    with pytest.raises(DataError, match="lm_head.weight differs from the embedding"):
      load(embedding + 1)
  else:
    np.testing.assert_array_equal(load(embedding + 1)["head"]["kernel"], embedding.T + 1)


class Tensors(dict):
  """Tensors by key in memory, as `table.load` reads them."""

  @property
  def shapes(self):
    return {key: array.shape for key, array in self.items()}


@pytest.mark.parametrize("name, count", [
  ("smollm2-135m", 134_515_008), ("smollm2-360m", 361_821_120), ("smollm2-1.7b", 1_711_376_384),
  ("2-7b", 6_738_415_616), ("2-13b", 13_015_864_320), ("3-8b", 8_030_261_248),
  ("3.2-1b", 1_235_814_400), ("3.2-3b", 3_212_749_824)])
def test_sizes_have_as_many_parameters_as_published(name, count):
  assert published.parameters(llama, name) == count


@pytest.mark.parametrize("name", llama.SIZES)
def test_nodes_are_read_as_they_are_written(name):
  config = base.get_config().llm
  config.update(llama.size(name))
  back = llama.read_hf(llama.write_hf(config))
  assert back.pop("head_dim") == llama.head_dim(config)
  assert back.items() <= config.to_dict().items()


def test_old_files_say_rope_scaling():
  theirs = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {
    "type": "linear", "factor": 4}}
  fields = llama.read_hf(theirs)
  assert (fields["rope_theta"], fields["rope_scaling"], fields["rope_factor"]) == (
    5e5, "linear", 4.0)


@pytest.mark.parametrize("field, value", [("qk_norm", "rms"), ("final_soft_cap", 30.0)])
def test_what_theirs_cannot_say_is_refused(field, value):
  config = base.get_config().llm
  config[field] = value
  with pytest.raises(UsageError, match=f"config.llm.{field} is {value!r}; a checkpoint of model"):
    llama.write_hf(config)


def test_unknown_rope_scaling():
  config = base.get_config().llm
  config.rope_scaling = "liner"
  with pytest.raises(UsageError, match="rope_scaling is 'liner'; did you mean 'linear'"):
    _decoder.pairs(config, _decoder.Kind(1e4))


def test_no_reader_of_the_head_drops_its_soft_cap():
  """Whoever reads `output.head` in a call reads `output.soft_cap` in the same one."""
  root, found = Path(llama.__file__).parent.parent, 0
  for path in root.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call):
        read = [ast.unparse(child) for child in ast.walk(node)]
        for head in {text for text in read if text.endswith("output.head")}:
          assert head.removesuffix("head") + "soft_cap" in read, f"{path}:{node.lineno}"
          found += 1
  assert found >= 2


def test_soft_caps_reach_logits_and_losses():
  rng = np.random.default_rng(0)
  hidden, head = rng.normal(size=(1, 4, 8)), rng.normal(size=(8, 16))
  out = Output(jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32), soft_cap=2.0)
  expected = 2 * np.tanh(hidden @ head / 2)
  np.testing.assert_allclose(out.logits(), expected, rtol=1e-5, atol=1e-6)
  targets = jnp.zeros((1, 4), jnp.int32)
  stream = Stream(targets, targets, targets, targets, targets, targets, {"lm": jnp.ones((1, 4))})
  config = base.get_config()
  config.data.sources = {"only": base.source(name="only")}
  loss = concat.lm_losses(out, stream, config)["lm"].sum()
  norm = np.log(np.exp(expected).sum(-1))
  np.testing.assert_allclose(loss, (norm - expected[..., 0]).sum(), rtol=1e-5)


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
