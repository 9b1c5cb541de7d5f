"""OPT held to transformers; measured: logits below 1e-6, gradients below 5e-6."""

import numpy as np
import pytest
import transformers

from tests.fusion import testing as contract
from tests.llm import published
from vlm_jax.configs import base
from vlm_jax.core.errors import UsageError
from vlm_jax.core.tree import flatten, unflatten
from vlm_jax.llm import opt

KINDS = {"tied": dict(), "no bias": dict(enable_bias=False, tie_word_embeddings=False)}
POSITIONS = 256


@pytest.fixture(scope="module", params=KINDS)
def reference(request, tmp_path_factory):
  theirs = transformers.OPTConfig(
    vocab_size=published.VOCAB, hidden_size=28, ffn_dim=53, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=POSITIONS, pad_token_id=0, bos_token_id=None,
    eos_token_id=None, **KINDS[request.param])
  return published.Reference(transformers.OPTForCausalLM, theirs,
                             tmp_path_factory.mktemp("theirs") / "model")


def test_logits_and_gradients(reference):
  # A bias of keys that do not turn shifts all logits of a query alike.
  published.check_logits_and_gradients(reference, still="k_proj.bias")


def test_greedy_tokens(reference):
  published.check_greedy_tokens(reference)


def test_files(reference, tmp_path):
  published.check_files(reference, tmp_path)


def test_twins_fail_loudly(reference, monkeypatch):
  errors = {"activation": reference.twin(activation="gelu")}
  flat = flatten(reference.params)
  first = unflatten(flat | {"positions": np.roll(flat["positions"], 2, axis=0)})
  errors["first position"] = reference.error(reference.run(params=first))
  if reference.config.llm.linear_bias:
    path = "layers/attention/value/bias"
    swapped = unflatten(flat | {path: flat[path][:, ::-1]})
    errors["bias"] = reference.error(reference.run(params=swapped))
  else:
    errors["eps"] = reference.twin(norm_eps=1e-2)
  print({name: f"{error:.1e}" for name, error in errors.items()})
  assert min(errors.values()) > 100 * published.LOGITS, errors


@pytest.mark.parametrize("name, count", [
  ("125m", 125_239_296), ("1.3b", 1_315_758_080), ("2.7b", 2_651_596_800),
  ("6.7b", 6_658_473_984)])
def test_sizes_have_as_many_parameters_as_published(name, count):
  assert published.parameters(opt, name) == count


@pytest.mark.parametrize("change, sentence", [
  (dict(do_layer_norm_before=False), "opt.do_layer_norm_before is False; only True"),
  (dict(word_embed_proj_dim=512, hidden_size=1024), "opt.word_embed_proj_dim is 512; only 1024"),
  (dict(layer_norm_elementwise_affine=False), "layer_norm_elementwise_affine is False"),
])
def test_what_we_lack_is_refused(change, sentence):
  with pytest.raises(UsageError, match=sentence):
    opt.read_hf({"model_type": "opt", **change})


@pytest.mark.parametrize("field, value", [("norm_eps", 1e-6), ("head_dim", 32), ("kv_heads", 3)])
def test_what_theirs_cannot_say_is_refused(field, value):
  config = base.get_config().llm
  config.update(opt.size("125m"))
  assert opt.read_hf(opt.write_hf(config))["positions"] == 2048
  config[field] = value
  with pytest.raises(UsageError, match=f"config.llm.{field} is {value}; a checkpoint of model_type "
                                       "'opt' can only say"):
    opt.write_hf(config)


def test_packed_rows_are_the_documents_alone():
  """Positions begin again in every document; one that is longer than they are is refused."""
  config = contract.get_config("concat", "causal")
  config.llm.update(opt.size("125m") | dict(
    name="opt", vocab_size=contract.VOCAB, width=32, depth=2, mlp=48, heads=4, kv_heads=4,
    positions=POSITIONS))
  layouts = contract.lay_out(contract.documents(0), config)
  params = contract.noise_params(config)
  flat, where = contract.pack(layouts, config)
  packed = contract.logits(config, params, flat)
  assert len({row for row, _ in where.values()}) < len(where)
  for layout in layouts:
    expected = contract.logits(config, params, contract.alone(layout, config))
    expected = expected[0, : layout.sizes["text"]]
    assert contract.error(packed[where[layout.key]], expected) < 2e-6
  with pytest.raises(UsageError, match="config.llm.positions is 0, but positions"):
    opt.Model.parts(base.get_config().llm)
  config.llm.positions = 4
  with pytest.raises(UsageError, match="config.llm.positions is 4"):
    contract.lay_out(contract.documents(0), config)
