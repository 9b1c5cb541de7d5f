"""One record to layouts, and random access to documents: the pure functions behind the pipeline.

Everything random is a function of (seed, source, epoch, index), so a record gives the same layouts
in any process, at any time.
"""

import bisect
import copy
import dataclasses
import functools
import itertools
import os
import zlib
from collections.abc import Sequence
from typing import cast

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core.document import Document, Encoded, Image, Pixels, Video, Visual
from vlm_jax.core.errors import DataError, UsageError, nearest
from vlm_jax.core.fusion import find_fusion, vocabulary
from vlm_jax.core.layout import TOLD, Layout, split
from vlm_jax.data import augment, files, images, instruction, records, template, tokenizer
from vlm_jax.data.bad import Bad, BadExample
from vlm_jax.data.sources import (
  Format,
  Parts,
  Record,
  Source,
  choose_form,
  find_source,
  is_format,
)

POLICIES = ("real", "none", "shuffled")


def source_seed(config: ConfigDict, name: str) -> int:
  """The seed of one source's shuffle, 0 <= seed < 2**32."""
  return zlib.crc32(f"{config.seed}/{name}".encode())


def generator(config: ConfigDict, name: str, epoch: int, index: int) -> np.random.Generator:
  """The generator of one record in one epoch."""
  return np.random.default_rng([config.seed, zlib.crc32(name.encode()), epoch, index])


def load_tokenizer(config: ConfigDict) -> tokenizer.Tokenizer:
  """The tokenizer of `config.data.tokenizer`, or the one `data prepare` trained.

  Where a connector reads, too, it has the connector's as its `reader`.

  Raises:
    DataError: there is none, or it cannot be read.
    UsageError: one has more tokens than the model has rows. A model may have more rows than tokens:
      published ones are padded to a round number.
  """
  path = config.data.tokenizer or os.path.join(config.data.root, records.TOKENIZER)
  loaded = tokenizer.load(path, config.data.template, config.llm.positions)
  if loaded.vocab_size > vocabulary(config):
    raise UsageError(f"{path} has {loaded.vocab_size} tokens but config.llm.vocab_size is "
                     f"{config.llm.vocab_size}; set it to {loaded.vocab_size} or choose another "
                     "config.data.tokenizer")
  if told := find_fusion(config).fields(config).get(TOLD):
    loaded.reader = _reader(config, loaded, told.shape[0])
  return loaded


def _reader(config: ConfigDict, speaks: tokenizer.Tokenizer, length: int) -> instruction.Reader:
  """The tokenizer of what a connector reads; without one of its own it reads as the model speaks.

  Raises:
    DataError: as `instruction.load`.
    UsageError: it has more tokens than the connector has rows.
  """
  path, rows = config.data.instruction_tokenizer, config.connector.vocab_size
  reader = instruction.load(path, length) if path else instruction.Reader(
    lambda text: speaks.encode(text)[:length], speaks.vocab_size, speaks.inner)
  if reader.vocab_size > rows:
    whose = path or "the language model's tokenizer (config.data.instruction_tokenizer is '')"
    raise UsageError(f"{whose} has {reader.vocab_size} tokens but config.connector.vocab_size is "
                     f"{rows}; set config.data.instruction_tokenizer to the connector's own, or "
                     f"config.connector.vocab_size to {reader.vocab_size}")
  return reader


def image_decoder(config: ConfigDict) -> template.DecodeImage:
  """A function from Image or Video to Pixels of the tower's size, for `template.encode`."""
  size, how = config.tower.image_size, images.decoding(config)

  def decode(part: Visual) -> Pixels:
    if isinstance(part, Video):
      return images.video([frame.data for frame in part.frames], size, how)
    return images.picture(part.data, size, how)

  return decode


def open_records(config: ConfigDict, name: str, module: Source, split: str
                 ) -> tuple[Sequence[Record], files.ImageFolder]:
  """The records of one split, prepared or a user's own, and the folder that images are named in.

  Raises:
    UsageError: no such split.
    DataError: a file is missing or damaged, or nothing in it is of the source's format.
  """
  entry = config.data.sources[name]
  if not is_format(module):
    return records.open_split(config.data.root, entry.name, split), files.ImageFolder("")
  own, field = getattr(module, "OWN_SPLITS", False), f"config.data.sources.{name}"
  fixed = own or files.names_split(entry)
  if fixed and entry.held_out:
    raise UsageError(f"{field}.held_out is {entry.held_out}, but its splits are "
                     f"{'its own' if own else 'named in its path'}; set it to 0")
  entry = files.of_split(entry, split)
  module = cast(Format, module)
  reader = module.reader(entry, split)
  if not len(reader):
    raise DataError(f"{entry.path} has no records; expected {module.EXPECTS}")
  chosen = (np.arange(len(reader)) if fixed
            else files.share(len(reader), entry.held_out, split, field))
  opened = files.Chosen(reader, chosen)
  files.check_first(opened, lambda record: module.parts(record, module.FORMS[0]), entry.path,
                    module.EXPECTS)
  return opened, files.ImageFolder(entry.image_root or os.path.dirname(entry.path))


class Records:
  """The documents of every record of one split, with the image policy applied."""

  def __init__(self, config: ConfigDict, name: str, split: str, form: str = "",
               policy: str = "real"):
    """Opens a split.

    Args:
      config: reads `data.root`, `data.sources[name]` and `seed`.
      name: which of `config.data.sources`.
      split: split of the source.
      form: form of the source, "" its default.
      policy: "real", "none" (images removed) or "shuffled" (images of another record).

    Raises:
      UsageError: an unknown source, split, form or policy.
      DataError: the prepared files are missing or damaged.
    """
    if name not in config.data.sources:
      raise UsageError(f"config.data.sources has no '{name}'; {nearest(name, config.data.sources)}")
    if policy not in POLICIES:
      raise UsageError(f"images of source '{name}' is '{policy}'; {nearest(policy, POLICIES)}")
    self._module = find_source(config.data.sources[name].name, config.outside)
    self._form = choose_form(self._module, form, f"the form of source '{name}'")
    self._reader, self._folder = open_records(config, name, self._module, split)
    self._policy, self._name, self._split = policy, name, split
    self._shift = 1 + source_seed(config, name) % max(len(self._reader) - 1, 1)
    if policy == "shuffled" and len(self._reader) < 2:
      raise UsageError(f"source '{name}': images='shuffled' needs two records or more in '{split}'")

  def __len__(self) -> int:
    return len(self._reader)

  def key(self, index: int) -> str:
    """A name that finds record `index` again."""
    return f"{self._name}/{self._split}[{index}]"

  def partner(self, index: int) -> int:
    """The record whose images record `index` is shown under "shuffled"; never itself."""
    return (index + self._shift) % len(self._reader)

  def __getitem__(self, index: int) -> list[Document]:
    """The documents of record `index`; BadExample when the source cannot write them."""
    record = self._reader[index]
    documents = self._module.parts(record, self._form)
    if self._policy == "shuffled":
      if any(isinstance(part, Visual) for parts in documents for part in parts):
        strangers = self._strangers(index)
        documents = [_replace(parts, strangers) for parts in documents]
    elif self._policy == "none":
      documents = [_replace(parts, []) for parts in documents]
    key = f"{self._name}/{self._split}/{record['key']}"
    number = lambda i: f"?{i}" if len(documents) > 1 else ""
    return [Document(self._read(parts), self._name, key + number(i))
            for i, parts in enumerate(documents)]

  def _strangers(self, index: int) -> list[Visual]:
    """The images of the partner, or of the next record after it that this form has images of."""
    for step in range(len(self._reader) - 1):
      other = (self.partner(index) + step) % len(self._reader)
      parts = self._module.parts(self._reader[other], self._form)[:1] if other != index else []
      if found := [part for one in parts for part in one if isinstance(part, Visual)]:
        return found
    return []

  def count(self, index: int) -> int:
    """How many documents record `index` has; 1 for a bad one, which says why when it is read."""
    try:
      return len(self._module.parts(self._reader[index], self._form))
    except BadExample:
      return 1

  def _read(self, parts: Parts) -> Parts:
    """The parts with the images that are only named read from their folder."""
    def read(part):
      if isinstance(part, Video):
        return Video(tuple(map(read, part.frames)))
      if isinstance(part, Image) and isinstance(part.data, str):
        return Image(self._folder.read(part.data))
      return part

    return tuple(map(read, parts))


def _replace(parts: Parts, strangers: list[Visual]) -> Parts:
  """The parts with their images replaced in turn by `strangers`; without any they are removed."""
  supply = itertools.cycle(strangers)
  replaced = (next(supply, None) if isinstance(part, Visual) else part for part in parts)
  return tuple(part for part in replaced if part is not None)


class Draw:
  """(epoch, index) of a source to the list of layouts of that record, or a Bad marker.

  It never drops anything, so the order of a pipeline of Draws does not depend on how many processes
  share the work. Pickling it sends the config only; the other process opens its own files.
  """

  def __init__(self, config: ConfigDict, name: str):
    """Opens what one source of `config.data.sources` needs; raises as `Records` does."""
    self._config, self._name = config, name
    entry = config.data.sources[name]
    augment.check(entry.augment, f"config.data.sources.{name}.augment")
    if (config.data.decode.grids or config.data.decode.fit == "naflex") and entry.augment:
      raise UsageError(f"config.data.sources.{name}.augment changes a picture but neither the "
                       "tiles of config.data.decode.grids nor the patches of fit 'naflex'; leave "
                       "it empty")
    self.records = Records(config, name, entry.split, entry.form, entry.images)
    self._augment = tuple(entry.augment)
    self._tokenizer = load_tokenizer(config)
    self._decode = image_decoder(config)
    self._fusion = find_fusion(config)

  def __reduce__(self):
    return Draw, (self._config, self._name)

  def __call__(self, position: tuple[int, int]) -> list[Layout] | Bad:
    epoch, index = position
    rng = generator(self._config, self._name, epoch, index)
    try:
      layouts = []
      for document in self.records[index]:
        for piece in self._pieces(document, rng):
          layouts.append(self._fusion.layout(piece, self._config, rng))
      return layouts
    except BadExample as error:
      return Bad(error.reason, self.records.key(index), error.detail)

  def _pieces(self, document: Document, rng: np.random.Generator) -> list[Encoded]:
    def decode(part: Visual) -> Pixels:
      pixels = self._decode(part)
      later, change = pixels.later, functools.partial(augment.apply, names=self._augment)
      if later is not None:  # every frame is changed as the first is
        later = np.stack([change(frame, rng=copy.deepcopy(rng)) for frame in later])
      return dataclasses.replace(pixels, values=change(pixels.values, rng=rng), later=later)

    encoded = template.encode(document, self._tokenizer, decode)
    data = self._config.data
    # A document with images is only cut when it must be: every piece costs its images again.
    capacity = data.tokens if encoded.images else min(data.window or data.tokens, data.tokens)
    slots = lambda image: len(self._fusion.order(self._config, image))
    pieces = split(encoded, capacity, slots, data.images)
    pieces = [piece for piece in pieces if _teaches(piece)]
    if not pieces:
      raise BadExample("does_not_fit", document.key)
    return pieces


def _teaches(encoded: Encoded) -> bool:
  """Whether some predicted token has a token before it that predicts it."""
  loss = [np.zeros(1, bool) if isinstance(part, Pixels) else part.loss for part in encoded.parts]
  return bool(np.concatenate(loss)[1:].any())


@dataclasses.dataclass(frozen=True)
class Documents(Sequence):
  """Random access to the documents of a split, in the order of its records."""

  records: Records
  ends: tuple[int, ...]  # number of documents up to and with every record

  def __len__(self) -> int:
    return self.ends[-1]

  def __getitem__(self, index: int) -> Document:
    if not 0 <= index < len(self):
      raise IndexError(index)
    record = bisect.bisect_right(self.ends, index)
    return self.records[record][index - (self.ends[record - 1] if record else 0)]

  def key(self, index: int) -> str:
    """A name that finds document `index` again, also when it is bad."""
    return self.records.key(bisect.bisect_right(self.ends, index))


def documents(config: ConfigDict, source_name: str, split: str, form: str = "",
              images: str = "real") -> Documents:
  """The documents of a split for evaluation, in a fixed order; arguments as in `Records`."""
  opened = Records(config, source_name, split, form, images)
  return Documents(opened, tuple(itertools.accumulate(map(opened.count, range(len(opened))))))
