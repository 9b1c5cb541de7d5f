"""GridQA: in how few tokens a strategy keeps a picture, and what it loses with fewer.

Sixteen cells of eight colours (`data/sources/gridqa.py`), a cell a patch, and a decoder of three
layers from scratch: a variant trains in one to five minutes of one core, as many steps as it needs,
and differs from the others in what stands between picture and text alone. All see the same
documents in the same order, but for the one that reads its question. Arguments, one of each group,
joined by commas:

  full16      LLaVA's arrangement, every cell a token ("": this one)
  blind       the same without the picture
  mean        the mean of all cells: it counts colours, and most often one of them is right
  pool4       the means of 2 x 2 cells
  concat4     2 x 2 cells side by side, projected: as many tokens as pool4, and nothing is lost
  resampler1, resampler4, resampler8   that many latents of a Perceiver Resampler
  qformer1    one query of a Q-Former, which does not know what will be asked
  instructed1 the same query, told the question before it reads the picture: a picture is asked one
              question, so there are as many pictures as questions
  flamingo    every cell a row, which gated layers read: which picture do they follow? A picture is
              one token of the text; what a resampler loses is told by those above
  flamingo_all   its control: text sees every picture of the document, not the last one before it
  blip2, coca    BLIP-2's first stage and CoCa: grids are compared with captions, each of which has
                 another in the step that differs in one cell, and captioned; with no word below

  ""           one grid and sixteen questions, none of which sees another
  interleaved  three grids and a question behind each, which one did it follow? mixed with those of
               "", from which a cell is learned sooner
  binding      names that colours have in one document only, asked behind 0, 4 and 8 shots

  debug       seconds: few steps, a few test grids; its numbers mean nothing

`BANDS` says what numbers must lie between what; benchmarks/gridqa.py measures them.
"""

from typing import Any

from ml_collections import ConfigDict

from vlm_jax.configs import base
from vlm_jax.core.errors import UsageError
from vlm_jax.data.sources.gridqa import BOUND, CELLS, SHOWN

# Latents leave the mean of all cells between steps 250 and 300.
RESAMPLER = {"connector.name": "perceiver", "connector.depth": 2, "connector.heads": 8,
             "connector.head_dim": 8, "connector.activation": "gelu", "train.steps": 600}
# A gate starts at zero and Adam moves it by no more than the rate: too little in so few steps.
FLAMINGO = {"fusion.name": "flamingo", "connector.name": "linear", "data.tokens": 336,
            "optim.groups": (("bridge/.*_gate", 10.0),)}
QFORMER = {"fusion.name": "blip2", "connector.name": "qformer", "connector.latents": 1,
           "connector.depth": 2, "connector.cross_every": 1, "connector.slot_width": 64,
           "connector.heads": 4}
WORDS = 357  # of the tokenizer
# What is different from full16, field to value.
VARIANTS: dict[str, dict[str, Any]] = {
  "full16": {},
  "blind": {"data.sources.gridqa.images": "none", "evals.gridqa.images": "none"},
  "mean": {"connector.name": "pool", "connector.factor": 4},
  "pool4": {"connector.name": "pool"},
  "concat4": {"connector.name": "space_to_depth"},
  "resampler1": {**RESAMPLER, "connector.latents": 1},
  "resampler4": {**RESAMPLER, "connector.latents": 4},
  "resampler8": {**RESAMPLER, "connector.latents": 8},
  "qformer1": QFORMER,
  "instructed1": {**QFORMER, "fusion.name": "instructblip", "connector.vocab_size": WORDS,
                  "data.instruction_tokens": 1, "data.images": 64},
  "flamingo": {**FLAMINGO, "fusion.image_attention": "last"},
  "flamingo_all": {**FLAMINGO, "fusion.image_attention": "all"},
  "blip2": {"fusion.name": "blip2_qformer", "connector.name": "qformer", "connector.latents": 16,
            "connector.slot_width": 64, "connector.depth": 4, "connector.heads": 4,
            "connector.hidden": 128, "connector.vocab_size": WORDS, "connector.positions": 24,
            "connector.unroll": 2},
  "coca": {"fusion.name": "coca", "connector.name": "attention_pool", "connector.latents": 16,
           "connector.heads": 4, "llm.name": "two_halves", "llm.depth": 2, "llm.encoder_depth": 2,
           "llm.activation": "gelu", "llm.unroll": 2},
}
# As published, but for ITG: at their weight of 1 captions stay a guess in so few steps.
OBJECTIVES = {"blip2": {"itc": 1.0, "itm": 1.0, "itg": 4.0}, "coca": {"contrast": 1.0, "lm": 2.0}}
TASKS = ("", "interleaved", "binding")
# Argument to the numbers of evaluation "gridqa", or of another that a name begins with, and what
# they lie between, ends included.
BANDS: dict[str, dict[str, tuple[float, float]]] = {
  "blind": {"accuracy": (0, 0.15)},
  "mean": {"accuracy": (0, 0.35)},
  "full16": {"accuracy": (0.95, 1), "shuffled/accuracy": (0, 0.2)},
  "resampler1": {"accuracy": (0, 0.4)},
  "resampler4": {"accuracy": (0.4, 0.97)},
  "resampler8": {"accuracy": (0.9, 1)},
  "qformer1": {"accuracy": (0, 0.4)},
  "instructed1": {"accuracy": (0.95, 1), "shuffled/accuracy": (0, 0.2)},
  "flamingo,interleaved": {"accuracy": (0.9, 1), "shuffled/accuracy": (0, 0.2)},
  "flamingo_all,interleaved": {"accuracy": (0, 0.55)},
  # Of four shots one in two shows the colour; of the others one in four unused names is right.
  "mean,binding": {"accuracy@0": (0, 0.2), "accuracy@4": (0.4, 0.75), "accuracy@8": (0.85, 1),
                   "shuffled_shots/accuracy@8": (0, 0.2)},
  "full16,interleaved": {"accuracy": (0.9, 1), "shuffled/accuracy": (0, 0.2)},
  "pool4": {"accuracy": (0, 0.5)},
  "concat4": {"accuracy": (0.95, 1)},
  # Of two captions that differ in one cell; of 200 captions the picture of each; a caption's cells.
  "blip2": {"accuracy": (0.9, 1), "shuffled/accuracy": (0.35, 0.65),
            "find/text_to_image@1": (0.5, 1), "find/shuffled/text_to_image@1": (0, 0.03),
            "rank/text_to_image@1": (0.9, 1), "rank/shuffled/text_to_image@1": (0, 0.03),
            "say/accuracy": (0.9, 1), "say/shuffled/accuracy": (0, 0.03)},
  "coca": {"accuracy": (0.9, 1), "shuffled/accuracy": (0.35, 0.65),
           "find/text_to_image@1": (0.5, 1), "find/shuffled/text_to_image@1": (0, 0.03),
           "say/accuracy": (0.9, 1), "say/shuffled/accuracy": (0, 0.03)},
}


def get_config(arg: str = "") -> ConfigDict:
  """The recipe; `arg` as in the module."""
  variant, task, debug = base.choose(arg, tuple(VARIANTS), TASKS, ("", "debug"))
  if task and variant in OBJECTIVES:
    raise UsageError(f"--config: '{arg}' asks '{variant}', which compares grids with captions, for "
                     f"'{task}'; leave that out")
  config = base.get_config()
  config.fusion.name = "concat"
  # The patches as they are embedded, with their places: all mixing of cells is the variant's.
  # A place is louder than its colour: the other way round, latents hear no places for long.
  config.tower.update(image_size=16, patch=4, width=64, depth=1, mlp=64, heads=1, pre_norm=True,
                      post_norm=False, feature_layer=-2, std=(16.0,) * 3)
  config.llm.update(vocab_size=WORDS, width=64, depth=3, mlp=192, heads=4, kv_heads=4)

  config.data.root = "data/gridqa_only"  # a tokenizer of its own, of which every word is one token
  # Four grids fill a row, with all their questions and the most tokens a picture takes.
  config.data.update(rows=4, tokens=384, images=4)
  once = variant == "instructed1" and not task
  config.data.sources.gridqa = base.source(name="gridqa",
                                           form=task or ("single" if once else "fan_out"))
  config.optim.update(lr=2e-3, b2=0.98, weight_decay=0.01, warmup=100)
  config.train.update(steps=400, log_every=50, checkpoint_every=10_000)
  config.evals.gridqa = base.evaluation(
    source="gridqa", split="test", controls=("shuffled",), together=16, batch=32, max_tokens=2,
    limit=200 * (CELLS if once else 1))
  config.update_from_flattened_dict(VARIANTS[variant])
  if task == "interleaved":
    many = 4  # grids of the other form to a document of this one; an answer counts as much in both
    config.data.sources.cells = base.source(name="gridqa", form="fan_out", ratio=many)
    config.data.sources.gridqa.weight = SHOWN / (many * CELLS)
    config.data.update(tokens=config.data.tokens + 64, images=many + SHOWN)
    config.evals.gridqa.limit = 1000
  if task == "binding":
    # Pictures are matched by their colour and have no places: colours are loud, and behind the
    # tower's MLP, since embedded ones share up to two of three channels. Narrower heads learn late.
    config.tower.update(std=(1.0,) * 3, feature_layer=-1)
    config.llm.head_dim = 32
    config.data.update(rows=1, images=8 * BOUND)
    config.train.steps = 4000
    config.evals.gridqa.update(kind="few_shot", form="episode", choose="own", limit=1000,
                               controls=("shuffled_shots",))

  if variant in OBJECTIVES:
    compare(config, variant)
  if debug:
    config.optim.warmup = 2
    config.train.update(steps=4, log_every=2)
    for entry in config.evals.values():
      entry.update(limit=8, batch=8)
  return config


def compare(config: ConfigDict, variant: str) -> None:
  """Grids and their captions, 32 pairs a step; which caption is right, found and written."""
  config.fusion.width = 64
  config.fusion.objectives = ConfigDict(OBJECTIVES[variant])
  config.llm.positions = 24
  config.data.template = "caption"
  config.data.update(rows=2, images=16, tokens=16 * 24)
  config.train.steps = 1000
  config.data.sources.gridqa.form = "pair"
  shown = dict(source="gridqa", split="test", controls=("shuffled",), limit=200)
  config.evals.gridqa = base.evaluation(kind="choice", form="match", **shown)
  config.evals.find = base.evaluation(kind="retrieval", form="caption", **shown)
  config.evals.say = base.evaluation(kind="vqa", form="caption", max_tokens=21, **shown)
  if variant == "blip2":
    config.evals.rank = base.evaluation(kind="retrieval", form="caption", rerank=16, **shown)
