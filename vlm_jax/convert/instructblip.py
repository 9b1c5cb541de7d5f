"""InstructBLIP checkpoints of Hugging Face: config.json and safetensors, both directions.

InstructBlipForConditionalGeneration (arXiv:2305.06500) is BLIP-2's second stage (`blip2.py` here)
with a Q-Former that reads: its words and their positions are in the file, and the tokenizer that
spells them in a folder beside the language model's. The language model is a decoder, a Vicuna as
published (the strategy `instructblip`), or an encoder-decoder, a Flan-T5 (`instructblip_t5`).
"""

from typing import Any

from ml_collections import ConfigDict

from vlm_jax.connectors import qformer
from vlm_jax.convert import blip2, nodes, processor, table
from vlm_jax.convert.blip2 import HEAD, LLM, SPELLINGS, TOWER, UNREAD
from vlm_jax.core import fusion, hf

__all__ = ["FUSIONS", "HEAD", "LLM", "MODEL_TYPES", "SPELLINGS", "UNREAD", "parts", "pixels",
           "read_config", "write_config"]

STRATEGIES = {"decoder": "instructblip", "encoder-decoder": "instructblip_t5"}
MODEL_TYPES, FUSIONS = ("instructblip",), tuple(STRATEGIES.values())
VISION, QFORMER = "instructblip_vision_model", "instructblip_qformer"
# What stands beside the Q-Former in a BLIP-2 is inside of it here.
INSIDE = ((r"^embeddings\.", "qformer.embeddings."),
          (r"^qformer\.layernorm", "qformer.embeddings.layernorm"))


def pixels(config: ConfigDict, theirs: dict) -> dict:
  """Their preprocessor_config.json."""
  del theirs
  return {"processor_class": "InstructBlipProcessor", **processor.write(config)}


def parts(config: ConfigDict) -> tuple[table.Part, ...]:
  """Where each module's tensors are; the modules name their own KEYS."""
  inside = table.renamer(INSIDE)
  connector = tuple((ours, inside(theirs), how)
                    for ours, theirs, how in qformer.keys(config.connector.cross_every))
  return (("tower/", TOWER, fusion.find_tower(config).KEYS), ("connector/", "", connector),
          ("llm/", LLM, fusion.find_llm(config).KEYS))


def read_config(theirs: dict[str, Any], config: ConfigDict) -> ConfigDict:
  """A copy of `config` whose model is the one of their config.json.

  Raises:
    UsageError: a setting that our modules do not have; the sentence names it.
  """
  config = config.copy_and_resolve_references()
  hf.expect(theirs, "model_type", "instructblip", "instructblip")
  blip2.read_bridge(theirs, config, VISION)
  config.connector.update(hf.read(theirs.get("qformer_config") or {}, blip2.WORDS))
  config.llm.update(nodes.read(theirs.get("text_config") or {}, "llm", "opt"))
  config.fusion.name = STRATEGIES[fusion.find_llm(config).KIND]
  data = config.data
  data.instruction_tokens = min(data.instruction_tokens, config.connector.positions)
  return config


def write_config(config: ConfigDict, image_token: int) -> dict[str, Any]:
  """Their config.json of `config`'s model.

  Raises:
    UsageError: the config is not an InstructBLIP; the sentence names the field.
  """
  return {**blip2.write_bridge(config, VISION, QFORMER), "model_type": "instructblip",
          "architectures": ["InstructBlipForConditionalGeneration"],
          "image_token_index": image_token, "text_config": nodes.write(config.llm, "llm")}
