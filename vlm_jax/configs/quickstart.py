"""A small prefix-LM on real pictures and text, minutes on two CPU cores.

3,600 easy-VQA pictures with all their questions, short captions of the same pictures ("a red
circle", said by the training answers), 1,589 OpenMoji drawings, each told from three others, and
the Python manual as text-only documents. The captions help with the shapes, which few questions ask
for directly. Arguments, joined by commas:

  debug         seconds: few steps, a few test pictures; its numbers mean nothing
  blind         control: trained and tested without the picture
  text_only     control: the text windows of every step alone
  image_only    control: the pictures alone
  conversation  the questions of a picture as one causal chat instead of a fan-out document
"""

from ml_collections import ConfigDict

from vlm_jax.configs import base
from vlm_jax.core.errors import UsageError, nearest

TEXT_WINDOWS = 6  # windows of text in a step of the mix, on average
WORDS = ("debug", "blind", "text_only", "image_only", "conversation")
CONTROLS = {"blind", "text_only", "image_only"}  # at most one of them


def get_config(arg: str = "") -> ConfigDict:
  """The recipe; `arg` is words of `WORDS` joined by commas."""
  config = base.get_config()
  config.fusion.name = "prefix_lm"

  config.tower.patch = 8
  config.tower.width = 96
  config.tower.depth = 3
  config.tower.mlp = 256
  config.tower.heads = 3
  config.tower.unroll = 3
  # Most of a picture is one light colour: centred there, it is near zero.
  config.tower.mean = (0.88, 0.88, 0.88)
  config.tower.std = (0.2, 0.2, 0.2)
  config.connector.name = "space_to_depth"  # 8 x 8 patches to 16 slots

  config.llm.vocab_size = 1024
  config.llm.width = 96
  config.llm.depth = 3
  config.llm.mlp = 256
  config.llm.heads = 3
  config.llm.kv_heads = 1
  config.llm.unroll = 3

  # Whole cycles are packed: short windows and few pictures a cycle leave little of a row empty.
  config.data.tokens = 1280
  config.data.rows = 2
  config.data.images = 17
  config.data.window = 64
  augment = ("flip", "translate")
  # Weights by the validation splits: equal ones leave the drawings and the text behind.
  config.data.sources.easy_vqa = base.source(
    name="easy_vqa", form="fan_out", ratio=1, augment=augment)
  config.data.sources.captions = base.source(
    name="easy_vqa", form="caption", ratio=2, weight=2.0, augment=augment)
  config.data.sources.openmoji = base.source(
    name="openmoji", form="fan_out", ratio=2, weight=2.0, augment=augment)
  config.data.sources.pydoc = base.source(name="pydoc", form="text", ratio=1, weight=2.0)

  config.optim.lr = 1e-3
  config.optim.b2 = 0.98
  config.optim.weight_decay = 0.05
  config.optim.warmup = 100
  config.train.steps = 1800
  config.train.log_every = 100
  config.train.checkpoint_every = 400

  config.evals.easy_vqa = base.evaluation(kind="vqa", source="easy_vqa", split="test")
  # Four names of four groups, the pictures of families that training never shows.
  config.evals.openmoji = base.evaluation(
    kind="choice", source="openmoji", form="choice", split="test")
  config.evals.openmoji_captions = base.evaluation(
    kind="caption", source="openmoji", form="caption", split="test", controls=(), max_tokens=16)
  config.evals.text = base.evaluation(kind="perplexity", source="pydoc", split="test")
  return choose(config, arg)


def choose(config: ConfigDict, arg: str) -> ConfigDict:
  """Changes the mix and the size as the words of `arg` say, in whatever order."""
  words = list(filter(None, arg.split(",")))
  for word in words:
    if word not in WORDS:
      raise UsageError(f"--config: no argument '{word}'; {nearest(word, WORDS)}")
  if sum(word in CONTROLS for word in words) > 1:
    raise UsageError(f"--config: '{arg}' asks for two controls at once; use one")
  # Controls take sources away, so what changes a source goes first.
  for word in sorted(words, key=("conversation", *WORDS).index):
    if word == "blind":
      del config.data.sources.captions, config.evals.openmoji_captions
      for name in ("easy_vqa", "openmoji"):
        config.data.sources[name].images = "none"
        config.evals[name].images, config.evals[name].controls = "none", ()
      config.data.tokens = 1024  # as many questions a step as the mix, whose rows hold pictures too
    elif word == "text_only":
      # The mix has about six windows of text in a step, so this has six: equal steps per kind.
      for name in set(config.data.sources) - {"pydoc"}:
        del config.data.sources[name]
      for name in set(config.evals) - {"text"}:
        del config.evals[name]
      config.data.tokens = TEXT_WINDOWS * config.data.window
      config.data.rows = 1
      config.data.images = 1
    elif word == "image_only":
      del config.data.sources.pydoc, config.evals.text
    elif word == "conversation":
      # Three in four turns can be answered from earlier turns, which the test never shows.
      config.data.sources.easy_vqa.form = "conversation"
      config.evals.easy_vqa.form = "single"
    elif word == "debug":
      config.tower.depth = config.llm.depth = config.tower.unroll = config.llm.unroll = 2
      config.train.steps = 6
      config.train.log_every = 2
      config.train.checkpoint_every = 3
      config.optim.warmup = 2
      for entry in config.evals.values():
        entry.limit = 8
  return config
