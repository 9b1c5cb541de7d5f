"""Where documents come from: one small module a source, found by name like every other part.

Every source offers

    FORMS                the ways it writes documents; the first is the default
    parts(record, form)  the documents of one record (a dict), each a tuple of parts; an image may
                         be named (a file below image_root, a data: URL) instead of read

A *data set* (easy_vqa, pydoc) is written by `vlm-jax data prepare` and read from there:

    LICENCE        of the data, and PACKAGE, whose version `data prepare` records
    prepare()      split name to an iterable of records (of msgpack types, each with a "key")
    texts(record)  the texts the tokenizer is trained on

A *format* (llava_json, webdataset, parquet, ...) opens a user's own files where they lie:

    EXPECTS               what such a file holds, for messages
    reader(entry, split)  random access to the records of `config.data.sources[name]`
    OWN_SPLITS            True when the format itself has splits; else `{split}` in the path names
                          them, or `held_out` of the records are split "validation"
"""

import pkgutil
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, cast

from ml_collections import ConfigDict

from vlm_jax.core.document import Text, Visual
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.fusion import find

Record = dict[str, Any]
Parts = tuple[Text | Visual, ...]


class Source(Protocol):
  """What every module in `vlm_jax/data/sources` offers."""

  __name__: str
  FORMS: tuple[str, ...]

  def parts(self, record: Record, form: str) -> list[Parts]:
    """The documents of a record; may raise BadExample."""


class DataSet(Source, Protocol):
  """A source that `vlm-jax data prepare` writes."""

  LICENCE: str
  PACKAGE: str

  def prepare(self) -> dict[str, Iterable[Record]]:
    """Every split's records, in a fixed order."""

  def texts(self, record: Record) -> Iterable[str]:
    """The texts of a record that the tokenizer learns from."""


class Format(Source, Protocol):
  """A source that opens a user's own files."""

  EXPECTS: str

  def reader(self, entry: ConfigDict, split: str) -> Sequence[Record]:
    """The records; DataError when the files are something else as a whole."""


def is_format(source: Source) -> bool:
  """Whether a source opens a user's own files."""
  return hasattr(source, "reader")


def find_source(name: str, outside: bool = True) -> Source:
  """The source module called `name`, or a user's own by its dotted name; else UsageError."""
  return cast(Source, find("data.sources", name, outside=outside))


def formats() -> list[str]:
  """The names of the formats that vlm_jax reads."""
  names = [module.name for module in pkgutil.iter_modules(__path__)]
  return sorted(name for name in names if is_format(find_source(name)))


def folder(name: str) -> str:
  """The folder below the data root that a source is prepared into."""
  return name.rsplit(".", 1)[-1]


def choose_form(source: Source, form: str, field: str) -> str:
  """`form`, or the source's default when it is ""; UsageError naming `field` if it is unknown."""
  if form and form not in source.FORMS:
    raise UsageError(f"{field} is '{form}'; {nearest(form, source.FORMS)}")
  return form or source.FORMS[0]
