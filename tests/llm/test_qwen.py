"""Qwen2 and Qwen3 held to transformers; measured: logits below 2e-6, gradients below 6e-6."""

import pytest
import transformers

from tests.llm import published
from vlm_jax.configs import base
from vlm_jax.core.errors import UsageError
from vlm_jax.core.tree import flatten, unflatten
from vlm_jax.llm import qwen

KINDS = {
  "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, 0, True),
  "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, 2, False),
}


@pytest.fixture(scope="module", params=KINDS)
def reference(request, tmp_path_factory):
  model, config, seed, tied = KINDS[request.param]
  sizes = published.numbers(seed)
  if request.param == "qwen2":
    del sizes["head_dim"]  # theirs has width / heads
    sizes["hidden_size"] = 40
  theirs = config(**sizes, rope_parameters=published.rope(seed), tie_word_embeddings=tied)
  return published.Reference(model, theirs, tmp_path_factory.mktemp("theirs") / "model")


def test_logits_and_gradients(reference):
  published.check_logits_and_gradients(reference)


def test_greedy_tokens(reference):
  published.check_greedy_tokens(reference)


def test_files(reference, tmp_path):
  published.check_files(reference, tmp_path)


def test_twins_fail_loudly(reference):
  wrong = {"norm_eps": 1e-12, "activation": "gelu"}
  errors = {name: reference.twin(**{name: value}) for name, value in wrong.items()}
  flat = flatten(reference.params)
  if reference.config.llm.qkv_bias:
    path = "layers/attention/value/bias"
    params = unflatten(flat | {path: flat[path][:, ::-1]})  # groups swapped
    errors["bias"] = reference.error(reference.run(params=params))
  else:
    path = "layers/attention/query_norm/scale"
    params = unflatten(flat | {path: flat[path][:, ::-1]})
    errors["qk_norm"] = reference.error(reference.run(params=params))
  print({name: f"{error:.1e}" for name, error in errors.items()})
  assert min(errors.values()) > 100 * published.LOGITS, errors


@pytest.mark.parametrize("name, count", [
  ("2.5-0.5b", 494_032_768), ("2.5-7b", 7_615_616_512), ("3-0.6b", 596_049_920),
  ("3-8b", 8_190_735_360)])
def test_sizes_have_as_many_parameters_as_published(name, count):
  assert published.parameters(qwen, name) == count


@pytest.mark.parametrize("change, sentence", [
  (dict(use_sliding_window=True), "qwen3.use_sliding_window is True; only False"),
  (dict(layer_types=["sliding_attention"]), "qwen3.layer_types has sliding_attention; only full"),
  (dict(attention_bias=True), "qwen3.attention_bias is True; only False"),
  (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope_type is 'yarn'"),
])
def test_what_we_lack_is_refused(change, sentence):
  with pytest.raises(UsageError, match=sentence):
    qwen.read_hf({"model_type": "qwen3", **change})


@pytest.mark.parametrize("field, value", [("qkv_bias", False), ("window", 7), ("post_norms", True)])
def test_what_theirs_cannot_say_is_refused(field, value):
  config = base.get_config().llm
  config.update(qwen.size("2.5-0.5b"))
  assert qwen.read_hf(qwen.write_hf(config))["qkv_bias"]
  config[field] = value
  with pytest.raises(UsageError, match=f"config.llm.{field} is {value}; a checkpoint of model_type "
                                       "'qwen2' can only say"):
    qwen.write_hf(config)
