"""InstructBLIP (arXiv:2305.06500): BLIP-2 whose Q-Former reads the instruction, too.

EVA-CLIP ViT-g and a frozen Vicuna 1.1 or Flan-T5 with 32 queries between them. Of a BLIP-2 that is
pretrained, the Q-Former alone trains on instructions. Name its beginning:
`--config.connector.init=RUN`, a run of the first stage of `configs/blip2.py`, whose words it has,
too. Steps, rate, warm-up and batch are this recipe's and were not held against the paper: 60,000
steps of AdamW, 1,000 of warm-up to 1e-5, cosine to 0, and 192, 128 or 64 pairs a step for language
models of 3, 7 and 11 or 13 billion parameters.

The paper draws from many datasets; VQAv2 and LLaVA-Instruct-150K stand here, in the folder you
start from, in the ratio of the square roots of their sizes.
Arguments, joined by commas:

  vicuna-7b, vicuna-13b, flan-xl, flan-xxl   the language model (default vicuna-7b)
  debug      50 steps of a tiny model on easy-VQA in seconds; its numbers mean nothing
"""

from ml_collections import ConfigDict

from vlm_jax.configs import base, blip2
from vlm_jax.llm import llama, t5

# Pairs a step.
MEMBERS = {"vicuna-7b": 128, "vicuna-13b": 64, "flan-xl": 192, "flan-xxl": 64}


def get_config(arg: str = "") -> ConfigDict:
  """The recipe; `arg` is words of the list above."""
  member, debug = base.choose(arg, tuple(MEMBERS), ("", "debug"))
  config = blip2.get_config("flan-xl")  # of which the tower, the queries and the stage stay
  config.connector.vocab_size = 30523  # BERT's, and what opened a text of BLIP-2's first stage
  if member.startswith("vicuna"):
    config.fusion.name = "instructblip"
    # Llama 1 with a row more, that pads.
    sizes = llama.size(member.replace("vicuna", "1"))
    config.llm = base.get_config().llm
    config.llm.update(name="llama", remat="full", **{**sizes, "vocab_size": 32001})
  else:
    config.fusion.name = "instructblip_t5"
    config.llm.update(t5.size(member))

  # Rows of eight pictures, each with what is asked and answered.
  config.data.instruction_tokenizer = "qformer_tokenizer"
  config.data.instruction_tokens = 128
  config.data.rows, config.data.images = MEMBERS[member] // 8, 8
  config.data.tokens, config.data.decoder_tokens = 8 * 192, 8 * 128
  config.data.sources, config.evals = ConfigDict(), ConfigDict()
  # sqrt(443,757 questions) : sqrt(150,000 conversations)
  config.data.sources.vqav2 = base.source(
    name="vqav2", path="v2_OpenEnded_mscoco_train2014_questions.json", form="single", ratio=5,
    annotations="v2_mscoco_train2014_annotations.json", image_root="train2014", held_out=0.01)
  config.data.sources.llava = base.source(
    name="llava_json", path="llava_instruct_150k.json", image_root="train2017", ratio=3)
  config.evals.vqav2 = base.evaluation(
    kind="vqa", source="vqav2", split="validation", limit=1000)

  config.optim.update(lr=1e-5, b2=0.999, warmup=1000, end_lr=0.0)
  config.train.steps = 60_000
  return shrink(config) if debug else config


def shrink(config: ConfigDict) -> ConfigDict:
  """The recipe at the size of a test, on easy-VQA: the same parts, narrow and few."""
  config = blip2.shrink(config)
  config.connector.update(vocab_size=1024, positions=32)
  config.data.update(instruction_tokenizer="", instruction_tokens=16)
  return config
