"""The contract of a strategy file, and how strategies, towers, connectors and llms are found.

`config.fusion.name = "prefix_lm"` is the module `vlm_jax/fusion/prefix_lm.py`; a dotted name
(`mylab.my_fusion`) is the user's own module. There is no registry.
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Protocol, cast

import jax
import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core.batch import Batch
from vlm_jax.core.document import Encoded, Pixels
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.layout import Field, Layout
from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.typing import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of every layer; arrays [L,...], or lists of L arrays (`nn.stack.apart`).

  Attributes:
    k, v: f[L,B,S,G,C], of the stream that speaks.
    length: i32[], columns written so far.
    memory: the same two of the slots that cross-attention reads, of the layers that do, made by the
      first call; None before it, and in models that read one stream.
    positions: i32[B,S], of the columns, where attention asks for distances; None elsewhere.
  """

  k: Array
  v: Array
  length: Array
  memory: tuple[Array, Array] | None = None
  positions: Array | None = None

  @property
  def slots(self) -> int:
    """S, the columns of the stream that speaks."""
    return jax.tree.leaves(self.k)[0].shape[-3]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Embeddings:
  """What pictures and texts are compared by; all that a fusion returns which only compares them.

  Attributes:
    image: f32[B,M,E] of unit length, one per picture, or f32[B,M,K,E], the nearest of K counting
      for a text; None without pictures in the batch.
    text: f32[B,M,E] of unit length, one per document; None without texts in the batch.
    scale, bias: f32[], the logit of a pair is scale * image . text + bias; bias None: 0.
  """

  image: Array | None
  text: Array | None
  scale: Array
  bias: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
  """What a fusion returns.

  Attributes:
    hidden: f[B,T,D] of the stream that speaks, after the last norm.
    head: f[D,V], the vocabulary projection (the transposed embedding when tied).
    cache: the cache with this call's keys and values appended, or None.
    soft_cap: c of logits c tanh(logits / c), or None; who reads `head` must read it too.
    embeddings: of strategies that also compare pictures with texts.
  """

  hidden: Array
  head: Array
  cache: Cache | None = None
  soft_cap: float | None = dataclasses.field(default=None, metadata=dict(static=True))
  embeddings: Embeddings | None = None

  def logits(self) -> Array:
    """f32[B,T,V]. For training use the chunked losses, which never hold this array."""
    logits = jax.numpy.einsum("btd,dv->btv", self.hidden, self.head.astype(self.hidden.dtype),
                              preferred_element_type=jax.numpy.float32)
    if self.soft_cap is None:
      return logits
    return self.soft_cap * jax.numpy.tanh(logits / self.soft_cap)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
  """What a tower returns: patches f[B,N,P,D] in reading order, pooled f[B,N,D] or None."""

  patches: Array
  pooled: Array | None = None


FROZEN = "frozen_"  # how names of leaves begin that no stage trains (imported statistics)


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of training: which parameters move, by path pattern (see train.optimizer).

  Leaves whose names begin with `FROZEN` never do, whatever a pattern says.
  """

  name: str
  trainable: tuple[str, ...]


class Fusion(Protocol):
  """What a module in `vlm_jax/fusion` offers.

  Where ids have rows behind the language model's vocabulary, vocabulary(config) says how many there
  are in all; unread(config) gives patterns of parameters that nothing it computes depends on, which
  never train. It may also name in BIASED the masks whose logits get a bias, which not every kernel
  can add, in RUNS the runs of layers of its own that a cache belongs to, and in GLOBAL the
  objectives that compare documents of the whole batch: they have no meaning for a part of it, so
  they accumulate over cached embeddings (`train/accumulate.py`). UNDIVIDED names those that compare
  inside the model and cannot. A strategy whose Model returns `Embeddings` says nothing: its STREAM
  is "". Its function voice(config) may name the strategy that speaks with the same parameters ("":
  none), see `speaking`; what it knows of single pairs is the method matching(batch) of its Model,
  the logits f32[B,M,2] of being none and of being one, where one picture may be that of all texts.
  One that speaks and embeds says EMBEDS = True and returns an `Output` with embeddings; the
  `losses` of plain `Embeddings` are those of GLOBAL. One that speaks without a language model has
  an empty_cache(config, rows, columns, dtype) of its own.

  Two more functions are optional, for what the language model, tower and connector cannot say of
  themselves:

    uses(config, path)         to how many places of one slot a parameter is applied, by names of
                               slots as "images/images"; None: see `train.metrics.Work`
    attention_shapes(config)   mask name to (layers, H, C) of layers of its own that execute it
  """

  Model: type
  STAGES: tuple[Stage, ...]
  STREAM: str  # the stream that speaks: its slots are predicted, and `Output.hidden` is theirs

  def axes(self, config: ConfigDict) -> dict[str, int]:
    """The capacity of every axis of one packed row."""

  def fields(self, config: ConfigDict) -> dict[str, Field]:
    """Every array of a batch."""

  def rows(self, config: ConfigDict) -> np.ndarray:
    """i32[K], the feature rows of one square of the image axis in reading order."""

  def order(self, config: ConfigDict, image: Pixels) -> np.ndarray:
    """i32[k], the fill of the slots of one image, see `layout.write_slots`; mostly `rows`."""

  def layout(self, encoded: Encoded, config: ConfigDict, rng: np.random.Generator) -> Layout:
    """The arrays of one document."""

  def losses(self, output: Output, batch: Batch, config: ConfigDict) -> dict[str, Array]:
    """Per objective the sums f32[sources] of the weighted losses of each source."""

  def weights(self, batch: Batch, config: ConfigDict) -> dict[str, Array]:
    """Per objective the sums f32[sources] of the weights, from batch data only."""


class Tower(Protocol):
  """What a module in `vlm_jax/towers` offers; a published one also the seam of `LanguageModel`.

  Model(config.tower, config.attention, precision) is called with pixels u8[B,N,Height,Width,3] and
  returns Features. `config` below is `config.tower`. Two functions are optional:

    uses(config, path)        to how many places of one image a parameter of the tower is applied;
                              left out: to every place of the grid, and for one query in "pool"
    attention_shape(config)   (T, H, G, C) of the tower's attention; left out: it has none
  """

  Model: type

  def grid(self, config: ConfigDict) -> tuple[int, int]:
    """Rows and columns of the feature grid for the configured image size."""

  def unread(self, config: ConfigDict) -> tuple[str, ...]:
    """Patterns, below "tower/", of parameters that no feature depends on: they never train."""


class Connector(Protocol):
  """What a module in `vlm_jax/connectors` offers.

  Model(config.connector, width, precision) is called with features f[B,N,P,D] and their grid
  (height, width), and returns f[B,N,K,width]; one that reads also with the words i32[B,N,L] of
  `Media`, if the batch has any. One that says VIDEOS = True is called with their time i32[B,N], if
  the batch has it: the N slots are then frames, and what it returns are their items in order, empty
  behind the last. `config` below is `config.connector`. Optional:

    uses(config, path, features)  to how many places of one image a parameter is applied, of
                                  `features` there are (of a video 0: to those that it has once,
                                  whatever its frames); left out: to every slot
  """

  Model: type

  def slots(self, config: ConfigDict, frames: int, height: int, width: int) -> np.ndarray:
    """i32[k], the output rows in reading order for a feature grid of height x width."""


class LanguageModel(Protocol):
  """What a module in `vlm_jax/llm` offers.

  Model(config.llm, config.attention, precision) returns an Output. How it is called depends on
  KIND: a "decoder" has the methods embed(tokens i32[B,T]) -> f[B,T,D] and __call__(x f[B,T,D],
  positions i32[B,T], mask, cache=None, visitors=None), visitors as in `nn/stack.py`; an
  "encoder-decoder" those of `llm/encoder_decoder.py`.
  RUNS names the runs of layers (`nn/stack.py`) that a cache belongs to, as paths below "llm/".
  layers_of(config, mask), optional, is through how many layers the mask of that name goes.
  `config` below is `config.llm`. A published one also has KEYS (`convert/table.py`), MODEL_TYPES,
  read_hf and write_hf (`convert/nodes.py`).
  """

  Model: type
  KIND: str
  RUNS: tuple[str, ...]

  def empty_cache(self, config: ConfigDict, rows: int, columns: int, dtype: Any) -> Cache:
    """A cache of S = `columns` with nothing in it."""

  def supports(self, mask: Any) -> str | None:
    """None, or the reason why the model cannot execute this mask."""


def names(floor: str) -> list[str]:
  """The modules of a floor of the package ("fusion", "towers", "connectors", "llm")."""
  package = importlib.import_module(f"vlm_jax.{floor}")
  return [module.name for module in pkgutil.iter_modules(package.__path__)
          if not module.name.startswith("_")]


@functools.cache  # a layout asks for its modules once per document
def find(floor: str, name: str, *, outside: bool = True) -> ModuleType:
  """The module called `name` on a floor ("fusion", "towers", "connectors", "llm").

  Args:
    floor: package below `vlm_jax`.
    name: module name, or a dotted name of a user's own module.
    outside: whether a dotted name may leave the package (not for configs read from checkpoints).

  Raises:
    UsageError: nothing has that name (lists what exists), or leaving the package is not allowed.
  """
  known = names(floor)
  if name in known:
    return importlib.import_module(f"vlm_jax.{floor}.{name}")
  if "." not in name:
    raise UsageError(f"config: no module '{name}' in vlm_jax/{floor}; {nearest(name, known)}")
  if not outside:
    raise UsageError(f"config: '{name}' is outside vlm_jax; a config read from a run directory may "
                     "only name modules of vlm_jax")
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    raise UsageError(f"config: cannot import '{name}' for vlm_jax.{floor}: {error}") from error


def find_fusion(config: ConfigDict) -> Fusion:
  """The strategy of `config.fusion.name`, typed."""
  return cast(Fusion, find("fusion", config.fusion.name, outside=config.outside))


def embeds(module: Any) -> bool:
  """Whether a strategy gives embeddings of pictures and texts, beside speaking or instead."""
  return getattr(module, "EMBEDS", not module.STREAM)


def speaking(config: ConfigDict) -> ConfigDict:
  """The config of what says what a model has learned to say: itself, or with its voice's name."""
  module = find_fusion(config)
  name = module.voice(config) if hasattr(module, "voice") else ""
  if not name:
    return config
  config = config.copy_and_resolve_references()
  config.fusion.name = name
  return config


def empty_cache(config: ConfigDict, rows: int, columns: int, dtype: Any) -> Cache:
  """A cache of S = `columns` with nothing in it, the strategy's own or its language model's."""
  module = find_fusion(config)
  if hasattr(module, "empty_cache"):
    return module.empty_cache(config, rows, columns, dtype)
  return find_llm(config).empty_cache(config.llm, rows, columns, dtype)


def embeddings_of(output: Output | Embeddings) -> Embeddings:
  """The embeddings of what a strategy that embeds returns, and nothing that it has beside them."""
  found = output.embeddings if isinstance(output, Output) else output
  return Embeddings(found.image, found.text, found.scale, found.bias)


def find_tower(config: ConfigDict) -> Tower:
  """The vision tower of `config.tower.name`, typed."""
  return cast(Tower, find("towers", config.tower.name, outside=config.outside))


def find_connector(config: ConfigDict) -> Connector:
  """The connector of `config.connector.name`, typed."""
  return cast(Connector, find("connectors", config.connector.name, outside=config.outside))


def find_llm(config: ConfigDict, kind: str = "", masks: Mapping[str, IntervalMask] | None = None
             ) -> LanguageModel:
  """The language model of `config.llm.name`, typed.

  Args:
    config: every field.
    kind: what it must be, "": anything.
    masks: what it is to execute, by name.

  Raises:
    UsageError: the model is of another kind, or cannot execute a mask.
  """
  module = cast(LanguageModel, find("llm", config.llm.name, outside=config.outside))
  if kind and module.KIND != kind:
    raise UsageError(f"config.llm.name '{config.llm.name}' is of kind '{module.KIND}'; "
                     f"config.fusion.name '{config.fusion.name}' needs a '{kind}'")
  for name, mask in (masks or {}).items():
    if reason := module.supports(mask):
      raise UsageError(f"config.llm.name '{config.llm.name}' cannot run config.fusion.name "
                       f"'{config.fusion.name}': mask {name}: {reason}")
  return module


def vocabulary(config: ConfigDict) -> int:
  """How many token ids have rows: the language model's, and new ones of the strategy."""
  module = find_fusion(config)
  return module.vocabulary(config) if hasattr(module, "vocabulary") else config.llm.vocab_size
