"""Costs against masks that are really built, models that are really made, and counting by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from vlm_jax import recipes
from vlm_jax.core import mask as masks
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.mesh import make_mesh
from vlm_jax.ops import costs
from vlm_jax.ops.costs import LLM, LLMS
from vlm_jax.ops.visual_tokens import SYSTEMS, UNCOUNTED, Footprint, Memory
from vlm_jax.train import state as states
from vlm_jax.train.metrics import Work

TINY = LLM(depth=3, width=8, heads=4, kv_heads=2, head_dim=2, mlp=12, vocab_size=10, context=64)


def count(mask) -> int:
  return int(mask.dense().sum())


@pytest.mark.parametrize("n", [1, 5, 12])
def test_pairs_are_those_of_the_masks(n):
  assert costs.causal(n) == count(masks.causal(n))
  assert costs.full(n) == count(masks.full(n))
  for size in (1, 3, 12, 20):
    assert costs.visible("prefix", n, size) == count(masks.prefix(n, size))


def test_pairs_of_image_blocks():
  ends = np.array([0, 0, 5, 5, 5, 0, 0, 9, 9, 0])  # images of 3 and 2 slots among 10 tokens
  expected = count(masks.see_until(masks.causal(10), ends))
  assert costs.image_blocks(10, [3, 2]) == expected
  assert costs.image_blocks(10, [5]) != expected, "one image of five slots sees more"


def test_attention_counts_visible_pairs_only():
  image = Footprint(6, mask="prefix")
  shown = count(masks.prefix(6 + 2 + 3, 6 + 2))
  assert costs.pairs(image, TINY, 2, 3) == TINY.depth * shown
  n = 6 + 2 + 3
  by_hand = TINY.depth * (2 * n * TINY.layer + 4 * 2 * 4 * shown)
  assert costs.layer_flops(image, TINY, 2, 3) == by_hand


def theirs(name):
  import transformers as hf
  if name.startswith("vicuna"):
    llm = LLMS[name]
    return hf.LlamaForCausalLM, hf.LlamaConfig(
      num_hidden_layers=llm.depth, hidden_size=llm.width, num_attention_heads=llm.heads,
      intermediate_size=llm.mlp, max_position_embeddings=llm.context)
  if name == "gemma-2b":  # as PaliGemma has it, with places and segments in the vocabulary
    return hf.GemmaForCausalLM, hf.GemmaConfig(
      num_hidden_layers=18, hidden_size=2048, num_attention_heads=8, num_key_value_heads=1,
      intermediate_size=16384, vocab_size=256000 + 1024 + 128)
  if name == "persimmon-8b":
    return hf.PersimmonForCausalLM, hf.FuyuConfig().text_config
  config = hf.ChameleonConfig()
  return hf.LlamaForCausalLM, hf.LlamaConfig(
    num_hidden_layers=config.num_hidden_layers, hidden_size=config.hidden_size,
    num_attention_heads=config.num_attention_heads, intermediate_size=config.intermediate_size,
    max_position_embeddings=config.max_position_embeddings, vocab_size=config.vocab_size)


@pytest.mark.parametrize("name", LLMS)
def test_matrices_are_those_of_the_published_model(name):
  llm, (kind, config) = LLMS[name], theirs(name)
  assert config.max_position_embeddings == llm.context
  config.num_hidden_layers = 2  # all layers are alike, and making them takes time
  with torch.device("meta"):
    model = kind(config)
  matrices = sum(leaf.numel() for leaf in model.parameters() if leaf.ndim == 2)
  assert matrices == dataclasses.replace(llm, depth=2).matrices
  rest = sum(leaf.numel() for leaf in model.parameters() if leaf.ndim != 2)
  assert rest < matrices / 1000, "what is not counted does not matter"


def test_flops_are_those_that_training_logs():
  config = recipes.load("configs/llava.py")
  module, mesh, llm = find_fusion(config), make_mesh(config), config.llm
  _, leaves = states.initializer(module, config)
  work = Work(config, leaves, states.abstract_batch(module, config, mesh))
  ours = LLM(llm.depth, llm.width, llm.heads, llm.kv_heads, llm.width // llm.heads, llm.mlp,
             llm.vocab_size, config.data.tokens, vocab_matrices=1)
  matrices = sum(math.prod(leaf.shape) for path, leaf in leaves.items()
                 if path.startswith("llm/layers") and len(leaf.shape) > 2)
  assert matrices == llm.depth * ours.layer
  tokens, predicted = 500, 30
  step = costs.estimate(Footprint(400), ours, 70, predicted, 0)["train_flops"]
  assert step == (6 * tokens * matrices + work.attention({"text": costs.causal(tokens)})
                  + work.head(predicted))


def test_layers_that_change_their_slots():
  assert costs.runs(Footprint(7), 5) == [(5, 7)]
  assert costs.runs(Footprint(7, later=2, at=3), 5) == [(3, 7), (2, 2)]
  assert costs.runs(Footprint(7, later=9, at=-2), 5) == [(3, 7), (2, 9)]
  assert costs.runs(Footprint(7, later=2, at=8), 5) == [(5, 7)], "a model without those layers"
  image = Footprint(7, later=2, at=1)
  text = 3
  assert costs.cache_bytes(image, TINY, text) == 2 * 2 * 2 * 2 * (10 * 1 + 5 * 2)
  assert costs.pairs(image, TINY, text) == costs.causal(10) + 2 * costs.causal(5)


def test_cross_attention_and_layers_before():
  plain, memory = Footprint(1), Memory(rows=5, width=6, every=2, mlp=4)
  crossed = Footprint(1, memory=memory)
  assert costs.crossings(crossed, 3) == 2
  more = costs.pairs(crossed, TINY, 4) - costs.pairs(plain, TINY, 4)
  assert more == 2 * (1 + 4) * 5
  query_out, key_value, mlp = 2 * 8 * 8, 2 * 6 * 8, 2 * 4 * 8 * 8
  numbers = costs.parameters(crossed, TINY) - costs.parameters(plain, TINY)
  assert numbers == 2 * (query_out + key_value + mlp)
  flops = costs.layer_flops(crossed, TINY, 4) - costs.layer_flops(plain, TINY, 4)
  assert flops == 2 * (2 * 5 * (query_out + mlp) + 2 * 5 * key_value + 4 * 8 * 5 * 5)
  assert costs.cache_bytes(crossed, TINY, 4) - costs.cache_bytes(plain, TINY, 4) == (
    2 * 5 * 2 * 8 * 2)
  before = Footprint(1, before=(2, 9))
  assert costs.pairs(before, TINY, 4, 6) - costs.pairs(plain, TINY, 4, 6) == 2 * costs.causal(13)
  assert costs.cache_bytes(before, TINY, 4) == costs.cache_bytes(plain, TINY, 4)


def test_several_images():
  three = lambda image: dataclasses.replace(image, count=3)
  for image in (Footprint(5), Footprint(5, later=2, at=1), Footprint(5, mask="prefix")):
    whole = dataclasses.replace(image, slots=15, later=image.later and 6)
    for cost in (costs.pairs, costs.layer_flops, costs.cache_bytes):
      assert cost(three(image), TINY, 4) == cost(whole, TINY, 4)
  memory = Memory(rows=5, width=6, every=2, mlp=4)
  crossed = three(Footprint(1, memory=memory))
  assert costs.pairs(crossed, TINY, 4) == 3 * costs.causal(7) + 2 * 7 * 5, "reads one image"
  assert costs.cache_bytes(crossed, TINY, 4) == costs.cache_bytes(Footprint(3), TINY, 4) + (
    2 * 15 * 2 * 8 * 2), "keeps all"
  assert costs.parameters(crossed, TINY) == costs.parameters(Footprint(1, memory=memory), TINY)
  before = three(Footprint(1, before=(2, 9)))
  assert costs.pairs(before, TINY, 4) == 3 * costs.causal(7) + 3 * 2 * costs.causal(13)
  assert costs.parameters(before, TINY) == TINY.matrices + 2 * TINY.layer


def test_the_largest_batch_fits_and_one_more_does_not():
  llm, memory = LLMS["vicuna-7b"], 40 * 10**9
  made = costs.estimate(SYSTEMS["LLaVA-1.5"].image(336, 336), llm, 64, 64, memory)
  used = lambda batch: 2 * llm.matrices + batch * made["kv_bytes"]
  assert used(made["batch"]) <= memory < used(made["batch"] + 1)
  assert costs.largest_batch(10**9, 2 * llm.matrices, 1) == 0


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_has_costs(name):
  made = costs.estimate(SYSTEMS[name].image(480, 640), LLMS["vicuna-7b"], 64, 64, 80 * 10**9)
  assert all(isinstance(value, int) for value in made.values())
  assert made["slots"] + made["memory_rows"] > 0 and made["batch"] > 0
  assert made["train_flops"] > made["prefill_flops"] > 0
  assert name not in UNCOUNTED
