"""A run or a published checkpoint goes on learning, from your own conversations.

    configs/finetune.py:init=PATH,data=my.json,images=images

The model, its tokenizer and how it sees pictures are those of PATH: a run directory, or the
directory of a LLaVA, LLaVA-NeXT or PaliGemma of Hugging Face. A tenth of the records is held out,
and its perplexity is measured at the end. Arguments, joined by commas:

  init=PATH    what to start from
  data=FILE    your conversations; the format is told by the file (see `vlm-jax data check`)
  images=DIR   the folder that they name pictures in (default: the file's own)
  lora         adapters of rank 16 at every linear layer of the language model, and the connector
  debug        four steps of two rows, to see that everything is there

The steps are one pass over the records at a document a row; a row has room for two pictures of the
largest kind, so it may be two passes. The rows of a run stay as they were. Documents of more
pictures need more config.data.images and config.data.tokens. Rates are those of LLaVA-1.5:
2e-5, with adapters 2e-4.
"""

import os
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.configs import base, older
from vlm_jax.convert import systems
from vlm_jax.core import digest
from vlm_jax.core.document import Image
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.fusion import find_fusion
from vlm_jax.data import check, draw, images, published, records
from vlm_jax.data.bad import BadExample
from vlm_jax.data.sources import find_source
from vlm_jax.train import workdir

NAMED, FLAGS = ("init", "data", "images"), ("lora", "debug")
ROWS, TEXT = 8, 512  # rows of a step; slots of a row beside those of two pictures
LOOK = 100  # records that must not all be without a picture
SOURCE = "mine"


def get_config(arg: str = "") -> ConfigDict:
  """The recipe; `arg` is words of the list above."""
  given = parse(arg)
  config = base.get_config()
  if systems.is_published(given["init"]):
    config = of_published(Path(given["init"]), config)
  else:
    of_run(Path(given["init"]), config)
  module = find_fusion(config)
  if not module.STREAM:
    raise UsageError(f"--config: init={given['init']} is a '{config.fusion.name}', which compares "
                     "pictures with texts and says nothing; give a LLaVA, LLaVA-NeXT or PaliGemma, "
                     "or a run that speaks")
  config.fusion.init = given["init"]
  # A LLaVA's tower stays as it was, LLaVA-NeXT's and PaliGemma's do not, and none beside adapters.
  still = "lora" in given or config.fusion.name == "concat"
  stages = [stage.name for stage in module.STAGES]
  config.fusion.stage = "finetune" if still and "finetune" in stages else "all"
  if "bridge" in stages and "lora" not in given:  # a Flamingo learns between what is frozen
    config.fusion.stage = "bridge"

  config.data.sources[SOURCE] = base.source(
    name=check.guess(given["data"]), path=given["data"], image_root=given.get("images", ""),
    held_out=0.1)
  count = readable(config, given["data"])
  config.evals[SOURCE] = base.evaluation(
    kind="perplexity", source=SOURCE, split="validation", batch=config.data.rows)

  config.optim.update(lr=2e-5, schedule="cosine", b2=0.999, weight_decay=0.0)
  if config.fusion.name == "llava_next":
    config.optim.groups = (("tower", 0.1),)
  if "lora" in given:
    config.lora.update(rank=16, alpha=32.0, targets=("llm/.*/(attention|mlp)/.*",))
    config.optim.lr = 2e-4
  if "debug" in given:
    config.precision.compute = "float32"
    config.data.rows = config.evals[SOURCE].batch = 2
    config.train.steps, config.train.log_every = 4, 1
  else:
    config.train.steps, config.train.log_every = -(-count // config.data.rows), 10
  config.optim.warmup = max(round(0.03 * config.train.steps), 1)
  return config


def parse(arg: str) -> dict[str, str]:
  """The words of an argument; those without a value are there with "".

  Raises:
    UsageError: an unknown word, or one of init and data is missing.
  """
  given: dict[str, str] = {}
  for word in filter(None, arg.split(",")):
    name, equals, value = word.partition("=")
    if name not in (NAMED if equals else FLAGS) or equals and not value:
      known = [*(f"{one}=..." for one in NAMED), *FLAGS]
      raise UsageError(f"--config: no argument '{word}'; {nearest(word, known)}")
    given[name] = value
  for name in NAMED[:2]:
    if name not in given:
      raise UsageError(f"--config: {name}=... is missing; write "
                       "--config=configs/finetune.py:init=PATH,data=my.json")
  return given


def of_published(path: Path, config: ConfigDict) -> ConfigDict:
  """The model of a checkpoint of Hugging Face, with rows of its size.

  Its tokenizer is kept in the data root, by what it is and not by where it was: it outlives the
  checkpoint, and a run goes on when that has moved.
  """
  config = systems.read_config(path, config)
  module = find_fusion(config)
  if not module.STREAM:
    return config
  texts = {name.name: name.read_bytes().hex()
           for name in (path / "config.json", *map(Path, published.paths(path)))}
  folder = digest.of_json([texts, config.llm.vocab_size, config.data.template])
  systems.adopt_tokenizer(path, config, Path(config.data.root) / "tokenizers" / folder)
  config.precision.compute = "bfloat16"
  slots, squares = largest(config)
  config.data.update(rows=ROWS, images=2 * squares, tokens=2 * slots + TEXT)
  return config


def largest(config: ConfigDict) -> tuple[int, int]:
  """Slots and squares of the picture that takes most of them."""
  side, module = config.tower.image_size, find_fusion(config)
  grids = config.data.decode.grids or ((1, 1),)
  seen = [images.picture(np.zeros((down * side, across * side, 3), np.uint8), side,
                         images.decoding(config)) for down, across in grids]
  return (max(len(module.order(config, one)) for one in seen),
          max(len(one.squares) for one in seen))


def of_run(path: Path, config: ConfigDict) -> None:
  """The model of a run, and its rows, tokenizer and pixels."""
  if path.name.isdigit() and path.parent.name == "checkpoints":
    path = path.parents[1]
  if not (path / "config.json").is_file():
    raise UsageError(f"--config: init={path} is neither a run directory nor a Hugging Face "
                     "checkpoint (there is no config.json); name one of these")
  theirs = workdir.load_config(path)
  older.fill(theirs, str(path / "config.json"))
  for group in (*older.MODEL, "data"):
    config[group] = theirs[group]
  for node in ("tower", "connector", "llm"):
    config[node].init = ""  # what they named is in the run's parameters now
  config.data.sources = ConfigDict()
  config.data.tokenizer = theirs.data.tokenizer or os.path.join(theirs.data.root,
                                                                records.TOKENIZER)


def readable(config: ConfigDict, path: str) -> int:
  """How many records of the file are trained on.

  Raises:
    UsageError: there are no pictures among the first.
    DataError: the file is missing, or nothing in it is of its format.
  """
  module = find_source(config.data.sources[SOURCE].name)
  opened, _ = draw.open_records(config, SOURCE, module, "train")
  for index in range(min(LOOK, len(opened))):
    try:
      if any(isinstance(part, Image) for parts in module.parts(opened[index], module.FORMS[0])
             for part in parts):
        return len(opened)
    except BadExample:
      continue  # training counts them
  raise UsageError(f"--config: data={path} has no picture in its first {LOOK} records; name "
                   "pictures in them (\"image\": \"1.jpg\"), or add the file to the sources of a "
                   "recipe of your own")
