"""One object to hold: `vlm_jax.load(path_or_recipe)` gives a model with all it takes to use it.

    bundle = vlm_jax.load("runs/first")           a run directory, or RUN/checkpoints/STEP
    bundle = vlm_jax.load("configs/llava.py:debug")   a recipe, its parameters drawn or read anew
    bundle = vlm_jax.load("llava-1.5/")           a checkpoint of Hugging Face, as it lies there
    bundle.answer("what is this?", ["x.png"]).text

What a `Bundle` says of a document is what training and evaluation compute of it.
"""

import atexit
import dataclasses
import functools
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import jax
import numpy as np
import PIL.Image
from ml_collections import ConfigDict

from vlm_jax import recipes, runs
from vlm_jax.configs import base
from vlm_jax.convert import systems, table
from vlm_jax.core.document import Document, Encoded, Image, Pixels, Text, Video, Visual
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.core.fusion import Embeddings, Fusion, embeds, find_fusion, speaking
from vlm_jax.core.layout import Layout
from vlm_jax.core.mesh import make_mesh
from vlm_jax.core.typing import Params
from vlm_jax.data import images as image_files
from vlm_jax.data import pipeline, template
from vlm_jax.data.bad import REASONS, BadExample
from vlm_jax.data.tokenizer import Tokenizer
from vlm_jax.evals import embed, likelihood
from vlm_jax.generate import maps
from vlm_jax.generate.answer import Answer, answers, ask, check_tokens, say
from vlm_jax.generate.dialogue import Dialogue
from vlm_jax.generate.prompts import layouts, slots
from vlm_jax.generate.sampling import GREEDY, Sampling
from vlm_jax.train import checkpoint_tools, initial
from vlm_jax.train import state as states

# A file, the bytes of one, pixels u8[H,W,3], or what Pillow opened; or a video of such frames.
Picture: TypeAlias = str | Path | bytes | np.ndarray | PIL.Image.Image | Visual
CONTEXT = 2048  # of a published checkpoint that does not tell its own


@dataclasses.dataclass(frozen=True)
class Score:
  """What a model thinks of the tokens of a document that training would have it say, n of them.

  Attributes:
    tokens: their ids.
    log_probs: f32[n], of each behind what stands before it.
  """

  tokens: tuple[int, ...]
  log_probs: np.ndarray

  @property
  def log_prob(self) -> float:
    """Of all of them."""
    return float(self.log_probs.astype(np.float64).sum())


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
  """A model and all that it takes to use it.

  Attributes:
    config: every field.
    params: the parameters.
    step: training steps behind them.
  """

  config: ConfigDict
  params: Params
  step: int = 0

  @property
  def module(self) -> Fusion:
    """The strategy; its `Model(config)` is the Linen module.

    What says what a model has learned to say may be another one, see `core.fusion.speaking`; it is
    asked where words are asked for.
    """
    return find_fusion(self.config)

  @functools.cached_property  # read when it is first asked for: not everybody needs words
  def tokenizer(self) -> Tokenizer:
    """Of the config; raises as `pipeline.load_tokenizer`."""
    return pipeline.load_tokenizer(self.config)

  def image(self, picture: Picture) -> Visual:
    """A picture as part of a document: read and, so that it is known to be one, decoded.

    Raises:
      DataError: it cannot be.
    """
    self.processor(picture)
    return _image(picture, self.config)

  def processor(self, picture: Picture) -> Pixels:
    """A picture as the tower sees it, u8[side,side,3] and perhaps its tiles.

    Raises:
      DataError: it cannot be read.
    """
    try:
      return self._pixels(picture)
    except BadExample as error:
      name = str(picture) if isinstance(picture, str | Path) else "the picture"
      raise DataError(f"{name}: {REASONS[error.reason]}; choose another file") from error

  def question(self, prompt: str, pictures: Sequence[Picture] = ()) -> Document:
    """The document of one question about pictures, see `generate.answer.ask`.

    Raises:
      UsageError: a number of `<image>` that is not the pictures', or no word beside them.
      DataError: a picture cannot be read.
    """
    return ask(self.config, prompt, [self.image(picture) for picture in pictures])

  def logits(self, documents: Sequence[Document], rows: int = 8) -> list[np.ndarray]:
    """The logits f32[t,V] of each document's t slots in the stream that speaks, images included.

    Args:
      documents: as `score`.
      rows: documents of about equal length computed together.

    Raises:
      UsageError, DataError: as `score`.
    """
    found = dict(likelihood.logits_of_layouts(speaking(self.config), self.params,
                                              self._layouts(documents), rows))
    return [found[number] for number in range(len(documents))]

  def score(self, documents: Sequence[Document], rows: int = 8) -> list[Score]:
    """How likely each document's predicted tokens are, in the order of its slots.

    The n-th document is laid out as the evaluation `perplexity` lays out the n-th of a split.

    Args:
      documents: with something to predict (`Text.loss`); images may also name files.
      rows: as `logits`.

    Raises:
      UsageError: the strategy says nothing, or cannot lay a document out.
      DataError: a document has nothing to predict, or a picture cannot be read.
    """
    config, laid_out = speaking(self.config), self._layouts(documents)
    path = f"streams/{find_fusion(config).STREAM}/targets"
    found: dict[int, Score] = {}
    for number, log_p, predicted in likelihood.of_layouts(config, self.params, laid_out, rows):
      targets = laid_out[number].arrays[path]
      found[number] = Score(tuple(targets[predicted].tolist()), log_p[predicted])
    return [found[number] for number in range(len(documents))]

  def generate(
    self,
    documents: Sequence[Document],
    *,
    max_tokens: int = 32,
    sampling: Sampling = GREEDY,
    rows: int = 8,
    write: Callable[[str], None] | None = None,
    dialogue: Dialogue | None = None,
  ) -> list[list[Answer]]:
    """The answers to each document: one, or one for every branch of a fan-out document.

    A document is answered behind its last question; a last answer that it has is not read.

    Args:
      documents: conversations, see `question`; images may also name files.
      max_tokens: an answer is cut there.
      sampling: how to choose tokens; an answer does not depend on what it is batched with.
      rows: documents of about equal length computed together.
      write: gets the answer to the one document while it is being said.
      dialogue: with `write`, reads of a longer conversation only what is new in it.

    Raises:
      UsageError: the strategy says nothing, or `write` with several documents or open turns.
      DataError: a picture cannot be read.
    """
    prompts = [self._encode(_open(document), template.encode_prompt) for document in documents]
    common = (self.config, self.params, self.tokenizer)
    if write is not None:
      if len(prompts) != 1:
        raise UsageError(f"{len(prompts)} documents cannot be written out at once; give one")
      return [[say(*common, prompts[0], write, max_tokens=max_tokens, sampling=sampling,
                   dialogue=dialogue)]]
    found: dict[int, list[Answer]] = {}
    for batch in answers(*common, prompts, rows=max(min(rows, len(prompts)), 1),
                         max_tokens=max_tokens, sampling=sampling):
      found |= batch
    return [found[number] for number in range(len(documents))]

  def answer(
    self,
    prompt: str,
    pictures: Sequence[Picture] = (),
    *,
    max_tokens: int = 32,
    sampling: Sampling = GREEDY,
    write: Callable[[str], None] | None = None,
    attention_map: str | Path = "",
    attention_layers: Sequence[int] = (),
  ) -> Answer:
    """Answers one question.

    Args:
      prompt: the question; an `<image>` in it says where the next picture stands. "" asks for a
        caption.
      pictures: shown in this order; before the question when it has no `<image>`.
      max_tokens, sampling, write: as in `generate`.
      attention_map: PNG to draw the attention over the pictures of every word in, "": none.
      attention_layers: the layers to average there, (): all; see `maps.word_maps`.

    Raises:
      UsageError: max_tokens below 1, an `attention_map` that is no PNG, or as `question` and
        `maps.word_maps`.
      DataError: a picture cannot be read.
      DiskError: `attention_map` is in no directory or cannot be written.
    """
    check_tokens(max_tokens)
    if attention_map:
      maps.check(self.config, len(pictures), attention_layers)
      maps.check_place(Path(attention_map))
    document = self.question(prompt, pictures)
    said = self.generate([document], max_tokens=max_tokens, sampling=sampling, write=write)[0][0]
    if attention_map:
      encoded = self._encode(document, template.encode_prompt)
      found = maps.word_maps(self.config, self.params, encoded, said.tokens, self.tokenizer,
                             attention_layers)
      maps.save(maps.draw(found, encoded.images), Path(attention_map))
    return said

  def slots(self, document: Document) -> int:
    """How many slots a conversation takes that is to be answered, images included."""
    encoded = self._encode(_open(document), template.encode_prompt)
    return slots(layouts([encoded], speaking(self.config))[0])

  def embed(self, pictures: Iterable[Picture] = (), texts: Iterable[str] = (), rows: int = 8
            ) -> Embeddings:
    """Unit vectors f32[n,E] of n pictures and f32[m,E] of m texts, None where there are none.

    The logit of a pair is scale * image . text + bias, see `Embeddings`.

    Args:
      pictures, texts: either may be left out.
      rows: of one compiled call.

    Raises:
      UsageError: the strategy does not embed, or there is nothing to embed.
      DataError: a picture cannot be read, or a text has no word.
    """
    if not embeds(self.module):
      raise UsageError(f"config.fusion.name '{self.config.fusion.name}' speaks and gives no "
                       "embeddings; those of CLIP, SigLIP and CoCa do")
    shown = [Encoded((self.processor(one),), "", f"picture {n}") for n, one in enumerate(pictures)]
    said = [self._encode(Document((Text(one, loss=True),), "", f"text {n}"), template.encode)
            for n, one in enumerate(texts)]
    found = [embed.of(self.config, self.params, some, rows, kind)
             for some, kind in ((shown, "media"), (said, "documents")) if some]
    if not found:
      raise UsageError("there is nothing to embed; give pictures, texts or both")
    return Embeddings(next((one.image for one in found if one.image is not None), None),
                      next((one.text for one in found if one.text is not None), None),
                      found[0].scale, found[0].bias)

  def _layouts(self, documents: Sequence[Document]) -> list[Layout]:
    """What training makes of documents; of what it draws, as the evaluation of perplexity draws."""
    config = speaking(self.config)
    module = find_fusion(config)
    if not module.STREAM:
      raise UsageError(f"config.fusion.name '{config.fusion.name}' compares pictures with "
                       "texts and says nothing; use `embed`")
    return [module.layout(self._encode(one, template.encode), config,
                          np.random.default_rng([config.seed, number]))
            for number, one in enumerate(documents)]

  def _encode(self, document: Document, encode: Callable[..., Encoded]) -> Encoded:
    try:
      return encode(document, self.tokenizer, self._pixels)
    except BadExample as error:
      reason = REASONS[error.reason]
      detail = "" if error.detail == reason else f" ({error.detail})"
      raise DataError(f"document '{document.key}': {reason}{detail}; mend it or leave it out"
                      ) from error

  def _pixels(self, picture: Picture) -> Pixels:
    return self._decode(_image(picture, self.config))

  @functools.cached_property
  def _decode(self) -> template.DecodeImage:
    return pipeline.image_decoder(self.config)


def load(path: str | Path, *, step: int | None = None, root: str | None = None,
         outside: bool = False, dtype: str = "") -> Bundle:
  """A model and all that it takes to use it.

  Args:
    path: a run directory, `RUN/checkpoints/STEP`, a recipe `FILE.py:ARG`, or the directory of a
      Hugging Face checkpoint.
    step: of a run, None: the newest.
    root: prepared data, None: where the config says.
    outside: let the frozen config of a run name modules outside vlm_jax; they run code.
    dtype: of the parameters of a Hugging Face checkpoint, "": the file's.

  Raises:
    UsageError: it is none of these, there is no such step, or the model is not one of ours.
    DataError: what is there is damaged.
  """
  place = Path(path).expanduser()
  recipe = str(path).endswith(".py") or ".py:" in str(path)
  published = not recipe and systems.is_published(place)
  if dtype and not published:
    raise UsageError(f"{path} is no Hugging Face checkpoint, so it takes no dtype; set "
                     "config.precision in its recipe")
  if (recipe or published) and step is not None:
    raise UsageError(f"{path} has no steps; leave --step out, or name the directory of a run")
  if recipe:
    return of_recipe(recipes.load(str(path)), root)
  if published:
    return _of_published(place, root, dtype)
  if place.name.isdigit() and place.parent.name == checkpoint_tools.FOLDER:
    if step not in (None, int(place.name)):
      raise UsageError(f"{path} is a checkpoint of step {place.name}, and --step is {step}; "
                       "leave it out")
    place, step = place.parent.parent, int(place.name)
  if not (place / "config.json").is_file():
    raise UsageError(f"{path} is no run directory, RUN/checkpoints/STEP, recipe FILE.py:ARG or "
                     "Hugging Face checkpoint (there is no config.json); name one of these")
  config, read = runs.open_config(str(place), root, outside)
  params, step = read(step)
  return Bundle(config, params, step)


def of_recipe(config: ConfigDict, root: str | None = None) -> Bundle:
  """The model that training a recipe begins with, on one device.

  Raises:
    UsageError, DataError: as `train.initial.read`.
  """
  config.mesh = base.get_config().mesh
  config.data.root = root or config.data.root
  init, leaves = states.initializer(find_fusion(config), config)
  found = initial.read(config, leaves)
  if found.keys() == leaves.keys():  # nothing is left to be drawn
    params = states.abstract_params(leaves, make_mesh(config, jax.devices()[:1]))
  else:
    params = jax.jit(init)(jax.random.key(config.seed))
  return Bundle(config.lock(), initial.place(params, found))


def _of_published(path: Path, root: str | None, dtype: str) -> Bundle:
  """A checkpoint of Hugging Face; says in a line which marks its tokenizer had no token for."""
  theirs = systems.read_theirs(path)
  config, params = systems.read(path, base.get_config(), table.dtype_of(dtype) if dtype else None)
  config.precision.param = systems.one_dtype(params)
  config.data.root = root or config.data.root
  text = theirs.get("text_config") or {}
  config.data.tokens = text.get("max_position_embeddings", CONTEXT)
  config.data.images = max([config.data.images, *(1 + a * b for a, b in config.data.decode.grids)])
  folder = tempfile.mkdtemp(prefix="vlm_jax-")  # evaluations open the tokenizer by its name
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  if new := systems.adopt_tokenizer(path, config, folder):
    print(f"{path}: marks of turns and pictures that the model has yet to learn: {', '.join(new)}",
          file=sys.stderr)
  config.mesh = base.get_config().mesh
  device = jax.sharding.SingleDeviceSharding(make_mesh(config, jax.devices()[:1]).devices.flat[0])
  return Bundle(config.lock(), jax.device_put(params, device))


def _image(picture: Picture, config: ConfigDict) -> Visual:
  """A picture as `data.images` takes it; raises BadExample."""
  if isinstance(picture, Video):
    return Video(tuple(_image(frame, config) for frame in picture.frames))
  if isinstance(picture, Image):
    picture = picture.data
  if isinstance(picture, PIL.Image.Image):
    picture = image_files.of_pillow(picture, image_files.decoding(config))
  elif isinstance(picture, str | Path):
    picture = image_files.read(str(Path(picture).expanduser()))
  return Image(picture)


def _open(document: Document) -> Document:
  """The document with an answer to be given behind its last question."""
  last = document.parts[-1]
  if not isinstance(last, Text) or last.role not in ("user", "system"):
    return document
  open_turn = Text("", "assistant", branch=last.branch)
  return dataclasses.replace(document, parts=(*document.parts, open_turn))
