"""Held to `PaliGemmaForConditionalGeneration` of transformers: logits, gradients, tokens, files.

Tiny models: a Gemma with one group and a Gemma 2 whose window bites behind the prefix; of a Gemma 2
without one, as it was trained, the logits. Theirs runs the documents as a batch padded on the
right, ours packed into two rows.
"""

import dataclasses
import functools
import json
import math
import os
import tempfile
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from ml_collections import FrozenConfigDict

from tests.convert.packed import Packed
from tests.numbers import error
from vlm_jax import recipes
from vlm_jax.configs import base
from vlm_jax.convert import paligemma, safetensors_io, systems, table
from vlm_jax.core.document import Encoded, Pixels, Tokens
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.generate.decode import generate
from vlm_jax.generate.prompts import layouts, stack
from vlm_jax.train import state as states

TOLERANCE = 2e-4  # of gradients; measured: at most 1e-5
LOGITS = 2e-5  # measured: at most 4e-6
VOCAB, NEW, WINDOW = 61, 7, 10
IMAGE = VOCAB - 1  # their placeholder
BOS, LINE, EOS = 2, 3, 1
SHARP = ("proj.weight", "position_embedding.weight", "fc1.weight", "fc2.weight", "linear.weight")
transformers.utils.logging.disable_progress_bar()


def their_config(seed: int) -> transformers.PaliGemmaConfig:
  """A tiny PaliGemma; 1 and 2 have a Gemma 2."""
  patch, side = ((4, 8), (5, 10), (3, 9))[seed]
  vision = transformers.SiglipVisionConfig(
    hidden_size=(21, 24, 27)[seed], intermediate_size=37, num_hidden_layers=2,
    num_attention_heads=3, patch_size=patch, image_size=side, vision_use_head=False,
    layer_norm_eps=(1e-2, 0.1, 0.03)[seed])
  text = dict(
    vocab_size=VOCAB, hidden_size=(28, 36, 32)[seed], intermediate_size=53, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=(1, 2, 4)[seed], head_dim=(10, 8, 6)[seed],
    rms_norm_eps=0.02, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    rope_parameters={"rope_type": "default", "rope_theta": 300.0})
  if seed:
    more = {} if seed == 1 else {"layer_types": ["full_attention"] * 2}
    text = transformers.Gemma2Config(
      **text, **more, sliding_window=WINDOW if seed == 1 else None, query_pre_attn_scalar=7,
      attn_logit_softcapping=1.5, final_logit_softcapping=0.7)
  else:
    text = transformers.GemmaConfig(**text)
  return transformers.PaliGemmaConfig(
    vision_config=vision, text_config=text, image_token_index=IMAGE,
    projection_dim=text.hidden_size, hidden_size=text.hidden_size)


def documents(config) -> list[Encoded]:
  """A picture, a prompt behind <bos>, a line break, an answer and its end; one text alone."""
  rng, side = np.random.default_rng(0), config.tower.image_size
  found = []
  for number, (prompt, answer) in enumerate(((3, 9), (1, 4), (4, 2))):
    ids = lambda count: rng.integers(4, IMAGE, count).astype(np.int32)
    picture = [Pixels(rng.integers(0, 256, (side, side, 3)).astype(np.uint8))] if number < 2 else []
    asked = np.array([BOS, *ids(prompt)], np.int32)
    said = np.array([LINE, *ids(answer), EOS], np.int32)
    parts = (*picture, Tokens(asked, np.zeros(len(asked), bool)),
             Tokens(said, np.arange(len(said)) > 0))
    found.append(Encoded(parts, "only", str(number)))
  return found


def their_inputs(encoded: list[Encoded], config, left: bool = False) -> dict[str, torch.Tensor]:
  """A padded batch, as their processor makes it: token types 1 are the answer."""
  slots = len(find_fusion(config).rows(config))
  rows = []
  for one in encoded:
    ids = [np.full(slots, IMAGE) if isinstance(p, Pixels) else p.ids for p in one.parts]
    types = [np.zeros(slots) if isinstance(p, Pixels) else p.loss for p in one.parts]
    rows.append((np.concatenate(ids), np.concatenate(types)))
  width = max(len(ids) for ids, _ in rows)
  pad = lambda a: np.pad(a, (width - len(a), 0) if left else (0, width - len(a)))
  stacked = lambda arrays: torch.tensor(np.stack([pad(a) for a in arrays])).long()
  pixels = np.stack([image for one in encoded for image in one.images]) / 127.5 - 1
  return {"input_ids": stacked([ids for ids, _ in rows]),
          "token_type_ids": stacked([types for _, types in rows]),
          "attention_mask": stacked([np.ones(len(ids)) for ids, _ in rows]),
          "pixel_values": torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)}


def recipe():
  config = base.get_config()
  with config.data.sources.unlocked():
    config.data.sources.only = base.source(name="only")
  config.data.update(tokens=32, images=2, rows=2)
  return config


class Reference(Packed):
  """Theirs, run once: config and parameters as read from their files, logits, gradients, loss."""

  def __init__(self, seed: int, directory):
    torch.manual_seed(seed)
    self.directory = directory
    self.model = transformers.PaliGemmaForConditionalGeneration._from_config(
      their_config(seed), attn_implementation="eager").eval()
    with torch.no_grad():
      for name, weight in self.model.named_parameters():
        weight.normal_(0, 0.3 if name.endswith(SHARP) else 0.1)
        if "vision" in name and "norm" in name and name.endswith("weight"):
          weight.add_(1)
    self.model.save_pretrained(directory)
    self.config, self.params = systems.read(directory, recipe())
    self.documents = documents(self.config)
    inputs = their_inputs(self.documents, self.config)
    logits = self.model(**inputs, use_cache=False).logits
    predicted = (inputs["token_type_ids"][:, 1:] == 1) & (inputs["attention_mask"][:, 1:] == 1)
    loss = torch.nn.functional.cross_entropy(
      logits[:, :-1][predicted], inputs["input_ids"][:, 1:][predicted], reduction="sum")
    loss.backward()
    self.loss = float(loss.detach())
    self.logits = [logits[row, : int(mask.sum())].detach().numpy()
                   for row, mask in enumerate(inputs["attention_mask"])]
    self.grads = {name: weight.grad.numpy() for name, weight in self.model.named_parameters()
                  if weight.grad is not None}


@functools.cache
def reference_of(seed: int) -> Reference:
  """The reference of a seed, made once."""
  return Reference(seed, Path(tempfile.mkdtemp()) / "model")


@pytest.fixture(params=[0, 1])
def reference(request):
  return reference_of(request.param)


@pytest.fixture
def second():
  return reference_of(1)


def test_logits_and_gradients(reference):
  config, module = reference.config, find_fusion(reference.config)
  batch, where = reference.batch()
  model = module.Model(config)

  @jax.jit
  def step(params, batch):
    def loss(params):
      output = model.apply({"params": params}, batch)
      return module.losses(output, batch, config)["lm"].sum(), output.logits()
    return jax.value_and_grad(loss, has_aux=True)(params)

  (loss, logits), grads = step(jax.tree.map(jnp.asarray, reference.params), batch)
  for theirs in reference.logits:
    assert np.isfinite(theirs).all() and theirs.std(axis=0).min() > 1e-3
  worst = reference.error(logits, where)
  assert worst < LOGITS
  assert abs(float(loss) - reference.loss) < LOGITS * abs(reference.loss)
  ours = {k: t.get() for k, t in table.export(grads, systems.entries(config)).items()}
  theirs = {table.renamer(paligemma.SPELLINGS)(key): grad for key, grad in reference.grads.items()}
  assert set(theirs) == set(ours) and len(ours) > 40
  errors = {}
  for key, grad in ours.items():
    if key.endswith("k_proj.bias"):  # it shifts all logits of a query alike: no effect at all
      scale = np.abs(theirs[key.replace("k_proj", "q_proj")]).max()
      assert max(np.abs(grad).max(), np.abs(theirs[key]).max()) < TOLERANCE * scale, key
      continue
    assert np.isfinite(grad).all() and np.abs(theirs[key]).max() > 1e-4, key
    errors[key] = error(grad, theirs[key])
  print(f"logits {worst:.1e}, gradients {max(errors.values()):.1e}")
  assert max(errors.values()) < TOLERANCE, max(errors, key=errors.get)


def test_generated_tokens_are_theirs(second):
  reference, prompts = second, []
  config = reference.config
  for one in reference.documents[:2]:
    line = Tokens(np.array([LINE], np.int32), np.zeros(1, bool))
    prompts.append(dataclasses.replace(one, parts=(*one.parts[:-1], line)))
  ours = generate(config, reference.params, stack(
    layouts(prompts, config), config, rows=2, bucket=1), max_tokens=NEW, stop=())
  inputs = their_inputs(prompts, config, left=True)
  out = reference.model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
  said = out[:, inputs["input_ids"].shape[1] :].numpy()
  np.testing.assert_array_equal(np.asarray(ours.tokens)[:, 0], said)
  assert len(np.unique(said)) > 3


def test_export_loads_there_and_here(reference, tmp_path):
  config, params = reference.config, reference.params
  systems.write(tmp_path / "ours", config, params, IMAGE, shard_bytes=50_000)
  model, info = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
    tmp_path / "ours", output_loading_info=True, attn_implementation="eager")
  assert not any(info.values()), info
  inputs = their_inputs(reference.documents, config)
  for row, theirs in enumerate(reference.logits):
    ours = model(**inputs).logits[row, : len(theirs)].detach().numpy()
    np.testing.assert_array_equal(ours, theirs)
  again, back = systems.read(tmp_path / "ours", recipe())
  assert again.to_json() == config.to_json()
  jax.tree.map(np.testing.assert_array_equal, back, params)
  pixels = json.loads((tmp_path / "ours/preprocessor_config.json").read_text())
  assert pixels["image_seq_length"] == len(find_fusion(config).rows(config))
  # The spelling of transformers 4, and the names in memory, in which the tied head is there.
  with safetensors_io.Reader(reference.directory) as reader:
    old = {table.renamer(paligemma.SPELLINGS)(key): reader[key] for key in reader.shapes}
  for tensors in (old, {k: v.numpy() for k, v in reference.model.state_dict().items()}):
    source = type("Tensors", (dict,), {"shapes": {k: v.shape for k, v in tensors.items()}})(tensors)
    jax.tree.map(np.testing.assert_array_equal, systems.load(source, config), params)


@functools.cache
def _forward(config):
  """The jitted forward pass."""
  model = find_fusion(config).Model(config)
  return jax.jit(lambda params, batch: model.apply({"params": params}, batch).logits())


def test_without_token_types_theirs_is_causal(second):
  """The trap of leaving them out: the prefix no longer sees itself, and nothing says so."""
  inputs = their_inputs(second.documents, second.config)
  del inputs["token_type_ids"]
  config = second.config.copy_and_resolve_references()
  config.attention.implementation = "dense"
  causal = config.copy_and_resolve_references()
  causal.fusion.name, causal.fusion.image_attention = "concat", "causal"
  batch, where = second.batch(causal)
  ours = np.asarray(_forward(FrozenConfigDict(config))(second.params, batch))
  for number, (row, start, size) in enumerate(where):
    theirs = second.model(**inputs).logits[number, :size].detach().numpy()
    assert error(ours[row, start : start + size], theirs) < LOGITS
    assert error(theirs, second.logits[number]) > 100 * LOGITS


TWINS = ("causal image", "mask", "image scale", "last norm", "window", "norm offset")


@pytest.mark.parametrize("twin", TWINS)
def test_twins_fail_loudly(second, twin, monkeypatch):
  """Each mistake alone moves some logit far beyond the tolerance."""
  config, params = second.config.copy_and_resolve_references(), second.params
  config.attention.implementation = "dense"
  batch, where = second.batch()
  if twin == "causal image":
    causal = config.copy_and_resolve_references()
    causal.fusion.name, causal.fusion.image_attention = "concat", "causal"
    batch, where = second.batch(causal)
  elif twin == "mask":
    mask = batch.masks["text"]
    batch = dataclasses.replace(batch, masks={"text": dataclasses.replace(mask, hi=mask.hi + 1)})
  elif twin == "image scale":  # images multiplied as tokens are
    linear = jax.tree.map(lambda leaf: leaf * math.sqrt(config.llm.width), params["connector"])
    params = {**params, "connector": linear}
  elif twin == "last norm":
    config.tower.post_norm = False
    params = {**params, "tower": {k: v for k, v in params["tower"].items() if k != "post_norm"}}
  elif twin == "window":
    config.llm.window = WINDOW + 1
  elif twin == "norm offset":
    norm = params["llm"]["norm"]
    params = {**params, "llm": {**params["llm"], "norm": {"scale": norm["scale"] - 1}}}
  measured = second.error(_forward(FrozenConfigDict(config))(params, batch), where)
  print(f"{twin}: {measured / LOGITS:.1f} tolerances")
  assert measured > 100 * LOGITS


def test_a_second_gemma_without_a_window(tmp_path):
  reference = reference_of(2)
  config = reference.config.copy_and_resolve_references()
  config.attention.implementation = "dense"
  assert config.llm.post_norms and not config.llm.window
  batch, where = reference.batch()
  logits = _forward(FrozenConfigDict(config))(reference.params, batch)
  assert reference.error(logits, where) < LOGITS
  systems.write(tmp_path / "ours", config, reference.params, IMAGE)
  assert systems.read(tmp_path / "ours", recipe())[0].llm.to_dict() == config.llm.to_dict()


def test_positions_from_one_are_those_from_zero(second):
  config = second.config.copy_and_resolve_references()
  config.attention.implementation = "dense"
  batch, where = second.batch()
  text = batch.streams["text"]
  later = dataclasses.replace(text, positions=text.positions + 1)
  batch = dataclasses.replace(batch, streams={"text": later})
  assert second.error(_forward(FrozenConfigDict(config))(second.params, batch), where) < LOGITS


def test_a_prefix_longer_than_the_window_is_refused(second):
  config = second.config.copy_and_resolve_references()
  config.llm.window = 6
  with pytest.raises(UsageError, match="has a prefix of 9 slots, .* config.llm.window = 6 slots"):
    layouts(second.documents, config)


def test_configs_that_are_no_paligemma(second):
  theirs = second.model.config.to_dict()
  for change, sentence in (
    ({"model_type": "llava"}, "model_type is 'llava'"),
    ({"text_config": {"model_type": "llama"}}, "'llama', which no PaliGemma has; use gemma or"),
    ({"vision_config": {"model_type": "clip_vision_model"}}, "'clip_vision_model', which no"),
    ({"projection_dim": 5}, "projection_dim is 5 but the language model's width is 36"),
    ({"vision_config": {"model_type": "siglip_vision_model", "vision_use_head": True}},
     "vision_use_head is true"),
  ):
    with pytest.raises(UsageError, match=sentence):
      paligemma.read_config({**theirs, **change}, recipe())
  for field, value in (("fusion.name", "concat"), ("tower.post_norm", False),
                       ("connector.bias", False), ("tower.feature_layer", -2)):
    config = second.config.copy_and_resolve_references()
    node, name = field.split(".")
    config[node][name] = value
    with pytest.raises(UsageError, match=f"config.{field} is"):
      paligemma.write_config(config, IMAGE)


HUB = {  # the settings that google/paligemma-3b-pt-224 writes down
  "model_type": "paligemma", "image_token_index": 257152, "projection_dim": 2048,
  "text_config": {"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384,
                  "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1,
                  "vocab_size": 257216},
  "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152,
                    "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27,
                    "patch_size": 14, "projection_dim": 2048, "vision_use_head": False},
}


def test_the_published_model_is_the_recipe_with_64_rows_more():
  config = paligemma.read_config(HUB, recipe())
  full = transformers.PaliGemmaConfig(**HUB)
  assert config.llm.head_dim == full.text_config.head_dim == 256
  assert config.tower.norm_eps == full.vision_config.layer_norm_eps
  assert config.tower.image_size == full.vision_config.image_size == 224
  count = lambda config: sum(map(math.prod, systems.shapes(config).values()))
  assert count(config) == 2_923_466_480
  ours = recipes.load("configs/paligemma.py:224")
  assert count(config) - count(ours) == (257216 - 257152) * 2048
  for node in ("tower", "llm"):
    same = {name: getattr(ours, node)[name] for name in ("width", "depth", "mlp", "heads")}
    assert same.items() <= config[node].to_dict().items()


@pytest.mark.parametrize("words, slots, tokens", [
  ("", 256, 384), ("448,2-9b", 1024, 1536), ("896,2-27b,transfer", 4096, 4608)])
def test_recipe(words, slots, tokens):
  config = recipes.load(f"configs/paligemma.py:{words}")
  assert len(find_fusion(config).rows(config)) == slots and config.data.tokens == tokens
  assert bool(config.optim.warmups) == (not words)
  _, leaves = states.initializer(find_fusion(config), config)
  assert find_fusion(config).STAGES[0].trainable == (".*",)
  assert leaves["connector/linear/kernel"].shape == (1152, config.llm.width)
  theirs = paligemma.write_config(config, 257152)
  assert theirs["text_config"]["model_type"] == ("gemma2" if words else "gemma")


def test_recipe_words():
  with pytest.raises(UsageError, match="no argument '225'; did you mean '224'"):
    recipes.load("configs/paligemma.py:225")
  with pytest.raises(UsageError, match="asks for 896 and 224; use one"):
    recipes.load("configs/paligemma.py:896,224")
  assert recipes.load("configs/paligemma.py:debug").train.steps == 50
