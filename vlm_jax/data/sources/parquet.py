"""Parquet with images inside, as the Hugging Face hub stores data sets.

One row is one record. Columns: `image` or `images` (struct<bytes, path>, a list of them, or file
names below image_root), and one of `conversations`, `messages`, `texts`, `captions`, `caption`,
`text`, as in vlm_jax/data/turns.py; others are not read.

A row is read with its row group: files for shuffled reading should have small ones (100 rows).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core.errors import DataError
from vlm_jax.data import files, turns
from vlm_jax.data.bad import BadExample
from vlm_jax.data.sources import Parts, Record

FORMS = ("document",)
FIELDS = ("conversations", "messages", "texts", "captions", "caption", "text")
EXPECTS = f"parquet with the columns image or images and one of {', '.join(FIELDS)}"


class Rows(Sequence):
  """Random access to the rows of one file; keeps the row group it read last."""

  def __init__(self, path: str, columns: Sequence[str], needed: Sequence[str], expects: str):
    """Reads the footer; a file without one of the columns `needed` is a DataError."""
    import pyarrow.parquet  # slow to load

    self._path = path
    try:
      file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
      raise DataError(f"{path} cannot be read ({error}); expected {expects}") from error
    names = file.schema_arrow.names
    if not set(needed) & set(names):
      raise DataError(f"{path} has the columns {', '.join(names)}; expected {expects}")
    self._columns = [name for name in names if name in columns]
    groups = range(file.metadata.num_row_groups)
    self._ends = np.cumsum([file.metadata.row_group(group).num_rows for group in groups] or [0])
    self._group: tuple[int, Any] = (-1, None)

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, index: int) -> Record:
    """Row `index` as a dict; a damaged row group is a BadExample."""
    import pyarrow.parquet

    group = int(np.searchsorted(self._ends, index, "right"))
    if self._group[0] != group:
      try:
        with pyarrow.parquet.ParquetFile(self._path) as file:
          self._group = group, file.read_row_group(group, columns=self._columns)
      except (OSError, pyarrow.ArrowException) as error:
        raise BadExample("wrong_record", f"{self._path} row group {group}: {error}") from error
    first = int(self._ends[group - 1]) if group else 0
    return self._group[1].slice(index - first, 1).to_pylist()[0]

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {"_group": (-1, None)}


def reader(entry: ConfigDict, split: str) -> Sequence[Record]:
  """Random access to the rows of `entry.path`."""
  del split
  columns = ("id", "key", "image", "images", *FIELDS)
  return files.Joined([Rows(path, columns, FIELDS, EXPECTS)
                       for path in files.paths(entry.path, EXPECTS)])


def parts(record: Record, form: str) -> list[Parts]:
  """The document of a row; of `captions`, one document each."""
  del form
  return turns.documents(record, FIELDS)
