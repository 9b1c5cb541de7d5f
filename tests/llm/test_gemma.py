"""Gemma 1, 2 and 3 held to transformers, windows shorter than the text included.

Measured: logits below 2e-6, gradients below 7e-6.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from ml_collections import FrozenConfigDict

from tests.fusion import testing as contract
from tests.llm import published
from vlm_jax.configs import base
from vlm_jax.core.errors import UsageError
from vlm_jax.core.mask import IntervalMask, causal, window
from vlm_jax.core.precision import Precision
from vlm_jax.core.tree import flatten, unflatten
from vlm_jax.llm import gemma
from vlm_jax.nn import attention_maps

WINDOW = 4  # of 13 slots
SECOND = dict(sliding_window=WINDOW, query_pre_attn_scalar=5, attn_logit_softcapping=1.5,
              final_logit_softcapping=2.5)
THIRD = dict(sliding_window=WINDOW, query_pre_attn_scalar=7, final_logit_softcapping=3.0)


def their_config(name: str):
  """Depths that no period divides; local and global layers of Gemma 3 turn differently."""
  seed = {"gemma": 2, "gemma2": 0, "gemma3_text": 1}[name]
  sizes = published.numbers(seed)
  if name == "gemma":
    return transformers.GemmaConfig(**sizes, rope_parameters=published.rope(seed))
  sizes["num_hidden_layers"] = 3 if name == "gemma2" else 4
  if name == "gemma2":
    return transformers.Gemma2Config(**sizes, **SECOND, rope_parameters=published.rope(seed))
  kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
  parameters = {"full_attention": published.rope(seed, rope_type="linear", factor=3.0),
                "sliding_attention": published.rope(seed + 1)}
  return transformers.Gemma3TextConfig(**sizes, **THIRD, layer_types=kinds,
                                       rope_parameters=parameters)


KINDS = {"gemma": transformers.GemmaForCausalLM, "gemma2": transformers.Gemma2ForCausalLM,
         "gemma3_text": transformers.Gemma3ForCausalLM}


@pytest.fixture(scope="module", params=KINDS)
def reference(request, tmp_path_factory):
  return published.Reference(KINDS[request.param], their_config(request.param),
                             tmp_path_factory.mktemp("theirs") / "model")


def test_logits_and_gradients(reference):
  published.check_logits_and_gradients(reference)


@pytest.mark.parametrize("reference", ["gemma2", "gemma3_text"], indirect=True)
def test_greedy_tokens(reference):
  published.check_greedy_tokens(reference)


def test_files(reference, tmp_path):
  published.check_files(reference, tmp_path)


def test_twins_fail_loudly(reference, monkeypatch):
  """Each mistake alone; the kinds of gelu differ by 5e-4 at most and have a test of their own."""
  llm = reference.config.llm
  wrong = {"norm_eps": 1e-12, "rope_theta": 2 * llm.rope_theta}
  if llm.attention_soft_cap:
    wrong = {"query_scalar": 0.0, "final_soft_cap": 0.0, "attention_soft_cap": 0.0,
             "window - 1": WINDOW - 1, "window + 1": WINDOW + 1}
  if llm.qk_norm:
    wrong = {"local_theta": llm.rope_theta, "rope_factor": 1.0, "qk_norm": "rms"}
  errors = {name: reference.twin(**{name.split()[0]: value}) for name, value in wrong.items()}
  if not llm.post_norms:
    flat, parts = flatten(reference.params), gemma.Model.parts
    other = {path: leaf - 1 if path == "norm/scale" else leaf for path, leaf in flat.items()}
    errors["offset"] = reference.error(reference.run(params=unflatten(other)))
    unscaled = lambda config: dataclasses.replace(parts(config), embedding_scale=None)
    monkeypatch.setattr(gemma.Model, "parts", staticmethod(unscaled))
    errors["embedding"] = reference.error(reference.run())
  print({name: f"{error:.1e}" for name, error in errors.items()})
  assert min(errors.values()) > 100 * published.LOGITS, errors


@pytest.mark.parametrize("reference", ["gemma2"], indirect=True)
def test_attention_maps_are_theirs(reference):
  """Scale, soft cap and window of every layer are in the pictures."""
  config = FrozenConfigDict(reference.config)

  class Under(nn.Module):
    @nn.compact
    def __call__(self, tokens, mask):
      llm = gemma.Model(config.llm, config.attention, Precision(), name="llm")
      return llm(llm.embed(tokens), jnp.arange(published.SLOTS)[None], mask).hidden

  params = {"params": {"llm": jax.tree.map(jnp.asarray, reference.params)}}
  mask = IntervalMask(*(jnp.asarray(field)[None] for field in (
    causal(published.SLOTS).lo, causal(published.SLOTS).hi)))
  maps = attention_maps.record(Under().apply, params, reference.tokens[:1], mask, under="llm")
  theirs = reference.model(torch.tensor(reference.tokens[:1]).long(), output_attentions=True)
  assert len(maps) == len(theirs.attentions) == 3
  for ours, expected in zip(maps, theirs.attentions, strict=True):
    np.testing.assert_allclose(ours, expected.detach().numpy(), atol=2e-5)


@pytest.mark.parametrize("reference", ["gemma"], indirect=True)
def test_gelu_is_the_approximation(reference):
  """The two kinds differ by 5e-4 at their worst argument; a logit moves by 10 tolerances."""
  assert reference.config.llm.activation == "gelu_tanh"
  assert reference.twin(activation="gelu") > 10 * published.LOGITS


def test_old_files_say_gelu_and_mean_the_approximation():
  assert gemma.read_hf({"model_type": "gemma", "hidden_act": "gelu"})["activation"] == "gelu_tanh"
  theirs = {"model_type": "gemma2", "hidden_activation": "gelu"}
  assert gemma.read_hf(theirs)["activation"] == "gelu"


@pytest.mark.parametrize("name, count", [
  ("1-2b", 2_506_172_416), ("1-7b", 8_537_680_896), ("2-2b", 2_614_341_888),
  ("2-9b", 9_241_705_984), ("2-27b", 27_227_128_320), ("3-270m", 268_098_176),
  ("3-1b", 999_885_952), ("3-4b", 3_880_263_168)])
def test_sizes_have_as_many_parameters_as_published(name, count):
  assert published.parameters(gemma, name) == count


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_config_means_the_defaults_there(kind):
  """What a node leaves out is what it means in transformers."""
  full = type(their_config(kind))()
  ours = gemma.read_hf({"model_type": kind})
  assert ours == gemma.read_hf(full.to_dict())
  assert (ours["width"], ours["depth"], ours["kv_heads"], ours["head_dim"]) == (
    full.hidden_size, full.num_hidden_layers, full.num_key_value_heads, full.head_dim)
  hub = {"model_type": kind, "rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 8}}
  assert gemma.read_hf(hub)["rope_theta"] == 77.0 and gemma.read_hf(hub)["rope_factor"] == 8.0


def test_layers_of_the_published_sizes():
  config = base.get_config().llm
  for name, local in (("1-2b", 0), ("2-9b", 21), ("3-4b", 29)):
    config.update(gemma.size(name))
    parts = gemma.Model.parts(config)
    assert sum(parts.kinds[kind].window > 0 for kind in parts.order) == local
    assert gemma.read_hf(gemma.write_hf(config)).items() <= {
      **config.to_dict(), "query_scalar": config.query_scalar or 256.0}.items()


def test_a_window_counts_slots_of_the_packed_row():
  """Local layers of two documents in a row are those of the documents alone, in a cache too."""
  own = jnp.arange(10, dtype=jnp.int32)
  two = IntervalMask(jnp.array([0] * 6 + [6] * 4), own + 1)
  dense = np.asarray(two.within(own, 3).dense())
  np.testing.assert_array_equal(dense[:6, :6], window(6, 3).dense())
  np.testing.assert_array_equal(dense[6:, 6:], window(4, 3).dense())
  assert not dense[:6, 6:].any() and not dense[6:, :6].any()
  kept = np.array([0, 1, 3, 4, 5])  # a dropped slot still counts
  taken = causal(6).take(kept, kept)
  np.testing.assert_array_equal(taken.within(taken.k_index, 3).dense(),
                                window(6, 3).dense()[np.ix_(kept, kept)])


def test_branches_and_a_window_that_bites_are_refused():
  config = base.get_config()
  config.llm.update(name="gemma", window=3, global_every=2)
  config = FrozenConfigDict(config)
  model = gemma.Model(config.llm, config.attention, Precision())

  def run(slots):
    row = jnp.zeros((1, slots), jnp.int32)
    mask = IntervalMask(row, row, q_class=row, k_class=row)
    method = lambda model: model(model.embed(row), row, mask)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), method=method))

  run(3)
  with pytest.raises(UsageError, match="config.llm.window is 3, less than the 4 slots"):
    run(4)


@pytest.mark.parametrize("kind, change, sentence", [
  ("gemma", dict(attention_bias=True), "gemma.attention_bias is True; only False"),
  ("gemma2", dict(use_bidirectional_attention=True), "use_bidirectional_attention is True"),
  ("gemma3_text", dict(attn_logit_softcapping=9.0), "attn_logit_softcapping is 9.0; only None"),
  ("gemma2", dict(num_hidden_layers=3, layer_types=["full_attention", "sliding_attention",
                                                    "full_attention"]), "has no period"),
])
def test_what_we_lack_is_refused(kind, change, sentence):
  with pytest.raises(UsageError, match=sentence):
    gemma.read_hf({"model_type": kind, **change})


@pytest.mark.parametrize("size, field, value", [
  ("1-2b", "final_soft_cap", 30.0), ("1-2b", "activation", "gelu"), ("2-2b", "local_theta", 10.0),
  ("3-1b", "attention_soft_cap", 50.0), ("1-2b", "query_scalar", 7.0)])
def test_what_theirs_cannot_say_is_refused(size, field, value):
  config = base.get_config().llm
  config.update(gemma.size(size))
  config[field] = value
  with pytest.raises(UsageError, match=f"config.llm.{field} is {value!r}; a checkpoint of model"):
    gemma.write_hf(config)


def test_packed_rows_are_the_documents_alone():
  """Images that see themselves whole among them, behind windows shorter than a document."""
  config = contract.get_config("concat", "bidirectional")
  config.llm.update(gemma.size("2-2b") | dict(
    name="gemma", vocab_size=contract.VOCAB, width=32, depth=3, mlp=48, heads=4, kv_heads=2,
    head_dim=8, window=WINDOW))
  layouts = contract.lay_out(contract.documents(0), config)
  params = contract.noise_params(config)
  flat, where = contract.pack(layouts, config)
  packed = contract.logits(config, params, flat)
  assert len({row for row, _ in where.values()}) < len(where)
  for layout in layouts:
    expected = contract.logits(config, params, contract.alone(layout, config))
    expected = expected[0, : layout.sizes["text"]]
    assert contract.error(packed[where[layout.key]], expected) < 2e-6


def test_the_embedding_scale_is_rounded_to_the_compute_dtype():
  """As published: in bfloat16 the square root of 3072 is 55.5."""
  config = base.get_config()
  config.llm.update(name="gemma", width=3072, heads=12, vocab_size=7)
  config = FrozenConfigDict(config)
  theirs = transformers.models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding(
    7, 3072, 0, embed_scale=3072**0.5).to(torch.bfloat16)
  table = np.random.default_rng(0).normal(size=(7, 3072)).astype(np.float32)
  with torch.no_grad():
    theirs.weight.copy_(torch.tensor(table))
    expected = theirs(torch.arange(7)).float().numpy()
  model = gemma.Model(config.llm, config.attention, Precision(jnp.float32, jnp.bfloat16))
  embed = lambda model: model.embed(jnp.arange(7)[None])
  got = model.apply({"params": {"embed": {"embedding": table}}}, method=embed)[0]
  np.testing.assert_array_equal(got.astype(jnp.float32), expected)
