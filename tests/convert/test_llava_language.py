"""LLaVA checkpoints whose language model is no Llama, held to transformers.

Windows and soft caps bite; measured: logits below 2e-6.
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from ml_collections import FrozenConfigDict

from vlm_jax.configs import base
from vlm_jax.convert import llava, nodes, systems
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Encoded, Pixels, Tokens
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.generate.prompts import layouts, stack

LOGITS = 2e-5
VOCAB, SIDE, PATCH = 53, 12, 6
IMAGE = VOCAB - 1
SIZES = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=44, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-3, pad_token_id=0)
TEXTS = {
  "qwen2": lambda: transformers.Qwen2Config(**SIZES),
  "gemma2": lambda: transformers.Gemma2Config(
    **SIZES, head_dim=10, sliding_window=3, query_pre_attn_scalar=6, attn_logit_softcapping=1.5,
    final_logit_softcapping=0.5),
  "gemma3_text": lambda: transformers.Gemma3TextConfig(
    **SIZES, head_dim=10, sliding_window=3, query_pre_attn_scalar=6, layer_types=[
      "sliding_attention", "sliding_attention", "full_attention"]),
}
transformers.utils.logging.disable_progress_bar()


def recipe():
  config = base.get_config()
  with config.data.sources.unlocked():
    config.data.sources.only = base.source(name="only")
  config.data.update(tokens=24, images=1, rows=1)
  return config


@pytest.fixture(scope="module", params=TEXTS)
def theirs(request, tmp_path_factory):
  """The model of transformers, its directory, a document, and what it says to it."""
  text = TEXTS[request.param]()
  vision = transformers.CLIPVisionConfig(
    hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=3,
    patch_size=PATCH, image_size=SIDE)
  torch.manual_seed(0)
  model = transformers.LlavaForConditionalGeneration._from_config(transformers.LlavaConfig(
    vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=4,
    tie_word_embeddings=text.tie_word_embeddings), attn_implementation="eager").eval()
  with torch.no_grad():
    for name, weight in model.named_parameters():
      weight.normal_(0, 0.3 if "proj.weight" in name else 0.1)
  directory = tmp_path_factory.mktemp("theirs") / "model"
  model.save_pretrained(directory)
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
  ids = [rng.integers(1, IMAGE, count).astype(np.int32) for count in (2, 7)]
  text = [Tokens(part, np.zeros(len(part), bool)) for part in ids]
  return model, directory, Encoded((text[0], Pixels(pixels), text[1]), "only", "0")


def say(model, encoded):
  """Their logits f32[T,V]."""
  mean, std = (np.array(values) for values in (
    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
  before, image, after = encoded.parts
  pixels = (image.values / 255 - mean) / std
  ids = np.concatenate([before.ids, np.full(4, IMAGE), after.ids])
  return model(input_ids=torch.tensor(ids)[None].long(), pixel_values=torch.tensor(
    pixels.transpose(2, 0, 1)[None], dtype=torch.float32)).logits[0].detach().numpy()


def test_logits_and_files(theirs, tmp_path):
  model, directory, encoded = theirs
  config, params = systems.read(directory, recipe())
  batch = stack(layouts([encoded], config), config, rows=1, bucket=1).flat
  ours = find_fusion(config).Model(FrozenConfigDict(config))
  run = jax.jit(lambda params, flat: ours.apply({"params": params}, from_flat(flat)).logits())
  got = run(jax.tree.map(jnp.asarray, params), batch)[0]
  expected = say(model, encoded)
  error = np.abs(got - expected).max() / np.abs(expected).max()
  print(f"logits: {error:.1e}")
  assert np.isfinite(expected).all() and expected.std(axis=0).min() > 1e-3
  assert error < LOGITS

  systems.write(tmp_path / "ours", config, params, IMAGE)
  back, info = transformers.LlavaForConditionalGeneration.from_pretrained(
    tmp_path / "ours", output_loading_info=True, attn_implementation="eager")
  assert not any(info.values()), info
  np.testing.assert_array_equal(say(back, encoded), expected)
  again, same = systems.read(tmp_path / "ours", recipe())
  assert again.to_json() == config.to_json()
  jax.tree.map(np.testing.assert_array_equal, same, params)


def test_a_final_soft_cap_is_nothing_a_llava_has(theirs):
  """Theirs has it in the node and never reads it: ours neither, and does not claim to write it."""
  model, directory, _ = theirs
  config = llava.read_config(model.config.to_dict(), recipe())
  assert config.llm.final_soft_cap == 0
  if config.llm.name == "gemma":
    node = model.config.text_config.to_dict()
    cap = nodes.read(node, "llm")["final_soft_cap"]
    assert cap == (node["final_logit_softcapping"] or 0)
    config.llm.final_soft_cap = 30.0
    with pytest.raises(UsageError, match="config.llm.final_soft_cap is 30.0; a LLaVA checkpoint"):
      llava.write_config(config, IMAGE)
