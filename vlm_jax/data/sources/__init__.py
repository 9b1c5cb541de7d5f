"""Where documents come from: one small module a source, found by name like every other part.

A source offers

    FORMS     the ways it writes documents; the first is the default
    LICENCE   of the data, and PACKAGE, whose version `data prepare` records
    prepare() split name to an iterable of records (dicts of msgpack types, each with a "key")
    texts(record)        the texts the tokenizer is trained on
    parts(record, form)  the documents of one record, each a tuple of parts
"""

from collections.abc import Iterable
from typing import Any, Protocol, cast

from vlm_jax.core.document import Image, Text
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.fusion import find

Record = dict[str, Any]
Parts = tuple[Text | Image, ...]


class Source(Protocol):
  """What a module in `vlm_jax/data/sources` offers."""

  __name__: str
  FORMS: tuple[str, ...]
  LICENCE: str
  PACKAGE: str

  def prepare(self) -> dict[str, Iterable[Record]]:
    """Every split's records, in a fixed order."""

  def texts(self, record: Record) -> Iterable[str]:
    """The texts of a record that the tokenizer learns from."""

  def parts(self, record: Record, form: str) -> list[Parts]:
    """The documents of a record; may raise BadExample."""


def find_source(name: str, outside: bool = True) -> Source:
  """The source module called `name`, or a user's own by its dotted name; else UsageError."""
  return cast(Source, find("data.sources", name, outside=outside))


def folder(name: str) -> str:
  """The folder below the data root that a source is prepared into."""
  return name.rsplit(".", 1)[-1]


def choose_form(source: Source, form: str, field: str) -> str:
  """`form`, or the source's default when it is ""; UsageError naming `field` if it is unknown."""
  if form and form not in source.FORMS:
    raise UsageError(f"{field} is '{form}'; {nearest(form, source.FORMS)}")
  return form or source.FORMS[0]
