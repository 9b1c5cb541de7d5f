"""Adapters: what trains, what stays, merging, decoding, dropout, checkpoints."""

import functools
import shutil

import jax
import numpy as np
import pytest

from tests.fusion import testing
from tests.generate import helpers
from tests.numbers import same
from vlm_jax.convert import adapters
from vlm_jax.core.adapters import is_adapter
from vlm_jax.core.batch import from_flat
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.mesh import make_mesh
from vlm_jax.core.tree import flatten, unflatten
from vlm_jax.generate.decode import generate
from vlm_jax.generate.prompts import layouts, stack
from vlm_jax.train import state as states
from vlm_jax.train.checkpoint import load_params
from vlm_jax.train.loop import train
from vlm_jax.train.optimizer import make_optimizer

TOLERANCE = 2e-6  # of logits; measured 4e-7
QUERIES = "llm/.*/attention/(query|value)"


def recipe(targets=(QUERIES,), **lora):
  config = testing.get_config("concat", "causal")
  config.lora.update(rank=3, targets=tuple(targets), **lora)
  config.optim.update(warmup=1, lr=1e-2)
  config.train.update(steps=4, log_every=1, checkpoint_every=2, trackers=())
  return config


def flat_batch(config, seed=0):
  return testing.pack(testing.lay_out(testing.documents(seed), config), config)[0]


@pytest.mark.parametrize("targets,stage,adapted,whole", [
  ((QUERIES,), "all", {"llm"}, {"connector", "tower"}),
  ((QUERIES,), "finetune", {"llm"}, {"connector"}),
  ((".*",), "finetune", {"llm", "connector"}, set()),
  ((".*",), "projector", {"connector"}, set()),
], ids=["all", "queries", "everywhere", "projector"])
def test_a_node_trains_by_its_adapters_or_whole(targets, stage, adapted, whole):
  config = recipe(targets)
  config.fusion.stage = stage
  module = find_fusion(config)
  _, leaves = states.initializer(module, config)
  optimizer = make_optimizer(config, module.STAGES, leaves)
  node = lambda path: path.split("/")[0]
  assert {node(path) for path in optimizer.trainable} == adapted | whole
  assert all(is_adapter(path) for path in optimizer.trainable if node(path) in adapted)
  assert {path for path in leaves if node(path) in whole} <= set(optimizer.trainable)
  moments = flatten(optimizer.init(states.abstract_params(leaves, make_mesh(config)))[1].mu)
  assert set(moments) == set(optimizer.trainable)


def test_a_new_adapter_changes_nothing():
  config = recipe((".*",))
  drawn = flatten(states.initializer(find_fusion(config), config)[0](jax.random.key(0)))
  params = flatten(testing.noise_params(config))
  for path, leaf in drawn.items():
    if is_adapter(path):
      assert np.any(leaf) != path.endswith("lora_b"), path
      params[path] = leaf
  plain = config.copy_and_resolve_references()
  plain.lora.rank = 0
  base = {path: leaf for path, leaf in params.items() if not is_adapter(path)}
  flat = flat_batch(config)
  assert same(testing.logits(config, unflatten(params), flat),
              testing.logits(plain, unflatten(base), flat))


def test_merged_is_adapted():
  config = recipe((".*",), alpha=5.0)
  params, flat = testing.noise_params(config), flat_batch(config)
  before = testing.logits(config, params, flat)
  merged, without = adapters.merge(params, config)
  after = testing.logits(without, merged, flat)
  assert testing.error(after, before) < TOLERANCE
  twin = config.copy_and_resolve_references()
  twin.lora.alpha = 5.5
  wrong, _ = adapters.merge(params, twin)
  assert testing.error(testing.logits(without, wrong, flat), before) > 100 * TOLERANCE


def test_decoding_reads_the_adapters():
  config = helpers.tiny("concat", "conversation", "causal")
  config.lora.update(rank=2, targets=(".*",), alpha=8.0)
  params = helpers.noise(config)
  merged, without = adapters.merge(params, config)
  prompts = stack(layouts([helpers.question(5)], config), config, rows=1, bucket=8)
  say = lambda config, params: generate(config, params, prompts, max_tokens=6)
  adapted, plain = say(config, params), say(without, merged)
  np.testing.assert_array_equal(adapted.tokens, plain.tokens)
  np.testing.assert_allclose(adapted.log_probs, plain.log_probs, atol=1e-4)
  zeroed = {path: leaf * 0 if path.endswith("lora_b") else leaf
            for path, leaf in flatten(params).items()}
  other = say(config, unflatten(zeroed))
  assert np.abs(np.asarray(other.log_probs) - np.asarray(plain.log_probs)).max() > 1e-2


def test_dropout_is_of_the_adapters_and_only_in_training():
  config = recipe(dropout=0.5)
  params, batch = testing.noise_params(config), from_flat(flat_batch(config))
  model = find_fusion(config).Model(config)

  @functools.partial(jax.jit, static_argnames="dropped")
  def run(key, dropped):
    rngs = {"dropout": key} if dropped else {}
    return model.apply({"params": params}, batch, rngs=rngs).hidden

  keys = jax.random.split(jax.random.key(1), 2)
  one, two, again = (np.asarray(run(key, True)) for key in (*keys, keys[0]))
  np.testing.assert_array_equal(one, again)
  assert testing.error(one, two) > 1e-2
  np.testing.assert_array_equal(run(keys[0], False), run(keys[1], False))


class Loader:
  """The same packed rows in every step, shifted by its number."""

  def __init__(self, config, start=None):
    self.config, self.index = config, (start or {"index": 0})["index"]

  def __next__(self):
    self.index += 1
    return flat_batch(self.config, self.index), {}

  def state(self):
    return {"index": self.index}


def test_exactly_the_adapters_train_and_a_resumed_run_is_the_same(tmp_path):
  """At every linear layer, with dropout, accumulation and a frozen layer of the stack."""
  config = recipe((".*",), dropout=0.1)
  config.optim.frozen = ("llm/layers[:1]",)
  config.train.update(compilation_cache=str(tmp_path / "cache"), keep=3, accumulation=2)
  config.data.rows = 4
  train(config, tmp_path / "whole", make_loader=Loader)
  shutil.copytree(tmp_path / "whole", tmp_path / "half")
  shutil.rmtree(tmp_path / "half" / "checkpoints" / "4")
  train(config, tmp_path / "half", make_loader=Loader)
  module = find_fusion(config)
  _, leaves = states.initializer(module, config)
  trainable = make_optimizer(config, module.STAGES, leaves).trainable
  abstract = states.abstract_params(leaves, make_mesh(config))
  load = lambda name, step: flatten(load_params(tmp_path / name / "checkpoints", abstract, step)[0])
  before, after, resumed = load("whole", 2), load("whole", 4), load("half", 4)
  for path, leaf in jax.device_get(after).items():
    np.testing.assert_array_equal(leaf, resumed[path], err_msg=path)
    moved = leaf != before[path]
    if path not in trainable:
      assert not is_adapter(path) and not moved.any(), path
    elif path.startswith("llm/layers"):
      assert not moved[0].any() and moved[1].any(), path
    else:
      assert moved.reshape(len(leaf), -1).any(axis=-1).all() or "layers" not in path, path
      assert moved.any(), path


def test_a_connector_trains_beside_a_frozen_decoder_with_adapters(tmp_path):
  """LLaVA's second stage by LoRA: the decoder's own bits stay, its adapters and the connector move.
  """
  config = recipe()
  config.fusion.stage = "finetune"
  config.train.update(steps=2, compilation_cache=str(tmp_path / "cache"))
  config.train.checkpoint_every = 1
  train(config, tmp_path / "run", make_loader=Loader)
  init, leaves = states.initializer(find_fusion(config), config)
  abstract = states.abstract_params(leaves, make_mesh(config))
  after = flatten(load_params(tmp_path / "run" / "checkpoints", abstract, None)[0])
  for path, leaf in flatten(jax.jit(init)(jax.random.key(config.seed))).items():
    moved = np.any(np.asarray(leaf) != np.asarray(after[path]))
    assert moved == (is_adapter(path) or path.startswith("connector/")), path


@pytest.mark.parametrize("fields,sentence", [
  (dict(targets=("llm/layers/attention/querry",)), "matches no linear layer; did you mean"),
  (dict(targets=("llm/embed",)), "'llm/embed' matches no linear layer"),
  (dict(targets=()), "targets is empty"),
  (dict(targets=("(",)), "not a regular expression"),
  (dict(rank=-1), "config.lora.rank is -1"),
  (dict(dropout=1.0), "dropout 1.0"),
])
def test_wrong_fields_are_one_sentence(fields, sentence):
  config = recipe()
  config.lora.update(fields)
  with pytest.raises(UsageError, match=sentence) as error:
    states.initializer(find_fusion(config), config)
  assert "\n" not in str(error.value)


def test_a_stage_without_adapters_is_refused():
  config = recipe()
  config.fusion.stage = "projector"
  module = find_fusion(config)
  _, leaves = states.initializer(module, config)
  with pytest.raises(UsageError, match="none of its adapters trains in stage 'projector'"):
    make_optimizer(config, module.STAGES, leaves)
