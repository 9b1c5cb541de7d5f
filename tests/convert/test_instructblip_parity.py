"""Held to InstructBlipForConditionalGeneration: logits, loss, gradients, tokens, files.

With a Llama and a T5. What is compared, and how, is BLIP-2's (`test_blip2_parity.py`); here every
document has an instruction of its own length in ids of the Q-Former, beside the prompt.
Measured: logits 6e-7 (Llama) and 4e-6 (T5), gradients 3e-6 and 7e-5.
"""

import dataclasses
import functools
import os
import tempfile
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from tests.convert import test_blip2_parity as blip2
from tests.convert.test_blip2_parity import (
  test_export_loads_there_and_here as test_export_loads_there_and_here,
)
from tests.convert.test_blip2_parity import (
  test_generated_tokens_are_theirs as test_generated_tokens_are_theirs,
)
from tests.convert.test_blip2_parity import (
  test_logits_loss_and_gradients as test_logits_loss_and_gradients,
)
from vlm_jax.core.document import Encoded
from vlm_jax.core.layout import TOLD

KINDS, READS, LENGTHS = ("llama", "t5"), 47, (6, 3)


def their_config(kind: str) -> transformers.InstructBlipConfig:
  text = {
    "llama": dict(model_type="llama", vocab_size=blip2.VOCAB, hidden_size=32, intermediate_size=50,
                  num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                  rms_norm_eps=0.02, max_position_embeddings=40, pad_token_id=0,
                  bos_token_id=blip2.BOS, eos_token_id=blip2.EOS),
    "t5": blip2.their_config("t5").text_config.to_dict()}[kind]
  qformer = blip2.their_config("t5").qformer_config
  return transformers.InstructBlipConfig(
    vision_config={**blip2.their_config("t5").vision_config.to_dict(),
                   "model_type": "instructblip_vision_model"},
    qformer_config=dict(
      hidden_size=qformer.hidden_size, num_hidden_layers=2, num_attention_heads=3,
      intermediate_size=31, layer_norm_eps=0.05, vocab_size=READS, max_position_embeddings=8),
    text_config=text, num_query_tokens=blip2.QUERIES, image_token_index=blip2.IMAGE)


def documents() -> list[Encoded]:
  """BLIP-2's, whose pictures are told words."""
  rng, found = np.random.default_rng(1), []
  for one, length in zip(blip2.documents(), LENGTHS, strict=True):
    words = rng.integers(1, READS, length).astype(np.int32)
    picture = dataclasses.replace(one.parts[0], words=words)
    found.append(dataclasses.replace(one, parts=(picture, *one.parts[1:])))
  return found


def their_inputs(encoded: list[Encoded], *args, **kwargs) -> dict:
  """BLIP-2's, and padded instructions."""
  words = [one.parts[0].words for one in encoded]
  return {**blip2.their_inputs(encoded, *args, **kwargs),
          "qformer_input_ids": blip2.padded(words),
          "qformer_attention_mask": blip2.padded([np.ones_like(row) for row in words])}


class Reference(blip2.Reference):
  theirs = transformers.InstructBlipForConditionalGeneration
  their_config, make_documents = staticmethod(their_config), staticmethod(documents)
  their_inputs = staticmethod(their_inputs)
  # And what words become in the last layer, which nobody reads.
  silent = (*blip2.Reference.silent, *(
    f"encoder.layer.1.{part}.{kind}" for kind in ("weight", "bias")
    for part in ("intermediate.dense", "output.dense", "output.LayerNorm")))


@functools.cache
def reference_of(kind: str) -> Reference:
  return Reference(kind, Path(tempfile.mkdtemp()) / "model")


@pytest.fixture(params=KINDS)
def reference(request):
  return reference_of(request.param)


def test_config_names_the_strategy(reference):
  config, connector = reference.config, reference.config.connector
  assert config.fusion.name == {"llama": "instructblip", "t5": "instructblip_t5"}[reference.kind]
  assert (connector.vocab_size, connector.positions) == (READS, 8)
  assert config.data.instruction_tokens == 8


@pytest.mark.parametrize("twin", ["nothing", "padding", "another's", "the prompt's", "positions"])
def test_twins_fail_loudly(reference, twin):
  """Each mistake alone, in what the Q-Former is told."""
  flat = dict(reference.batch()[0])
  words = flat[TOLD].copy()
  there = words >= 0
  if twin == "nothing":
    words[:] = -1
  elif twin == "padding":  # read as if it were words
    words[~there] = 0
  elif twin == "another's":
    images = there.any(-1)
    words[images] = np.roll(words[images], 1, axis=0)
  elif twin == "the prompt's":  # ids of the other tokenizer, as many
    words[there] = np.resize(reference.documents[0].parts[1].ids, there.sum()) % READS
  elif twin == "positions":
    words[there] = np.concatenate([row[mine][::-1] for row, mine in zip(
      words.reshape(-1, words.shape[-1]), there.reshape(-1, words.shape[-1]), strict=True)])
  (_, logits), _ = reference.step(jax.tree.map(jnp.asarray, reference.params),
                                  flat | {TOLD: words})
  measured = reference.error(logits)
  print(f"{twin}: {measured / blip2.CLOSE:.0f} tolerances")
  assert measured > blip2.LOUD * blip2.CLOSE
