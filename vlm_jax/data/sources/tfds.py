"""TensorFlow Datasets, read without TensorFlow: what was prepared as array_record.

`path` is a prepared data set's folder, or its name ("coco_captions", "c4/en") in $TFDS_DATA_DIR or
~/tensorflow_datasets. `split` is one of its own, slices included: split="train[:95%]". Features:
`image` or `images`, and one of `conversations`, `messages`, `captions`, `caption`, `text`.
"""

import difflib
import glob
import os
import re
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.data import turns
from vlm_jax.data.bad import BadExample
from vlm_jax.data.sources import Parts, Record

FORMS = ("document",)
OWN_SPLITS = True
FIELDS = ("conversations", "messages", "captions", "caption", "text")
EXPECTS = "a data set prepared by TFDS with the feature captions, caption, text or messages"
INFO = "dataset_info.json"


class Examples(Sequence):
  """The examples of a split, images still encoded; can be pickled and opens the files again."""

  def __init__(self, folder: str, split: str):
    """Opens the prepared data set in `folder`.

    Raises:
      DataError: it is damaged, not array_record, or a feature needs TensorFlow.
      UsageError: no such split.
    """
    import tensorflow_datasets  # a second to load

    self._opened = folder, split
    try:
      builder = tensorflow_datasets.builder_from_directory(folder)
      features = dict(builder.info.features or {})
    except Exception as error:  # damaged metadata raises whatever parses it
      raise DataError(f"{folder} is not a data set prepared by TFDS ({error})") from error
    if not set(FIELDS) & set(features):
      raise DataError(f"{folder} has the features {', '.join(features)}; expected {EXPECTS}")
    stored = builder.info.file_format.value
    if stored != "array_record":
      raise DataError(f"{folder} is stored as {stored}, which needs TensorFlow to read; prepare it "
                      "with --file_format=array_record")

    class Encoded(tensorflow_datasets.decode.SkipDecoding):
      """Also skips the decoding of a sequence of images."""

      def decode_batch_example_np(self, example):
        return list(example)

    decoders = {name: Encoded() for name in ("image", "images") if name in features}
    try:
      self._source = builder.as_data_source(split, decoders=decoders or None)
      self._length = len(self._source)
    except ValueError as error:
      raise UsageError(f"{folder}: split '{split}': {error}") from error
    except Exception as error:
      raise DataError(f"{folder} cannot be read without TensorFlow ({type(error).__name__}: "
                      f"{error})") from error

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Record:
    """Example `index` as lists, texts and bytes; BadExample when it is damaged."""
    try:
      record = _plain(self._source[index])
    except Exception as error:  # the reader raises whatever the file format's library raises
      raise BadExample("wrong_record", f"example {index}: {type(error).__name__} {error}"
                       ) from error
    for field in ("conversations", "messages"):  # TFDS gives a sequence of dicts as dict of lists
      if isinstance(record.get(field), dict):
        columns = record[field]
        record[field] = [dict(zip(columns, row, strict=True))
                         for row in zip(*columns.values(), strict=True)]
    return record

  def __reduce__(self):
    return Examples, self._opened


def _plain(value: Any) -> Any:
  """TFDS's arrays and sequences as lists, dicts of text; images, alone in `image(s)`, as bytes."""
  if isinstance(value, dict):
    return {key: one if key in ("image", "images") else _plain(one) for key, one in value.items()}
  if isinstance(value, bytes):
    return value.decode("utf-8", "replace")
  if hasattr(value, "tolist"):
    value = value.tolist()
  return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def reader(entry: ConfigDict, split: str) -> Sequence[Record]:
  """Random access to the examples of `split`; see `find` and `Examples` for what can be wrong."""
  return Examples(find(entry.path), split)


def find(path: str) -> str:
  """The folder of the newest version of a prepared data set; says what is missing when none is."""
  from tensorflow_datasets.core.constants import DATA_DIR

  if not path:
    raise UsageError("source tfds: set `path` to a folder or name, e.g. 'coco_captions'")
  root = os.path.expanduser(path)
  root = root if os.path.isdir(root) else os.path.join(DATA_DIR, path)
  found = glob.glob(os.path.join(glob.escape(root), "**", INFO), recursive=True)
  if found:
    numbers = lambda name: [int(number) for number in re.findall(r"\d+", os.path.dirname(name))]
    configs = {os.path.dirname(os.path.dirname(name)) for name in found}
    if len(configs) > 1 and os.path.join(root, INFO) not in found:
      known = ", ".join(sorted(os.path.relpath(one, root) for one in configs))
      raise UsageError(f"{root} has several configurations: {known}; name one")
    return os.path.dirname(max(found, key=numbers))
  name, folder = path.strip("/").split("/")[0], DATA_DIR
  if os.path.isabs(root := os.path.expanduser(path)):
    folder, path = os.path.split(root.rstrip("/"))
    name = path
  known = registered()
  if name in known:
    raise DataError(
      f"TFDS knows '{name}', but {folder} does not hold it prepared; prepare it where TensorFlow "
      f"and the network are: `tfds build {path} --file_format=array_record --data_dir={folder}`")
  close = difflib.get_close_matches(name, known, n=3)
  hint = f"did you mean {' or '.join(close)}? " if close else ""
  raise UsageError(f"source tfds: {folder} has no '{path}' and this version of TFDS no data set "
                   f"'{name}'; {hint}name a prepared folder")


def registered() -> list[str]:
  """The names of all data sets of the installed TFDS, found without TensorFlow."""
  import tensorflow_datasets

  # These register c4, wit, laion400m and others, which TFDS itself only finds with TensorFlow.
  import tensorflow_datasets.text
  import tensorflow_datasets.vision_language

  return tensorflow_datasets.list_builders(with_community_datasets=False)


def parts(record: Record, form: str) -> list[Parts]:
  """The document of an example; of `captions`, one document each."""
  del form
  return turns.documents(record, FIELDS)
