"""Which files a split is read from, and their digests: what a number was measured on."""

import functools
import os
from typing import Any

from ml_collections import ConfigDict

from vlm_jax.data import files, published, records
from vlm_jax.data.sources import find_source, folder, is_format

WHOLE = 1 << 28  # bytes; of a larger file of one's own only the size is told


def files_of(config: ConfigDict, name: str, split: str) -> dict[str, dict[str, Any]]:
  """Path to {"bytes", "sha256"} of the files behind one split of a source, and of tokenizers.

  Prepared files are told by their manifest. Of a user's own file above `WHOLE` bytes there is no
  digest, and TFDS is told by its name alone.

  Raises:
    UsageError, DataError: there is no such source, or a file is missing.
  """
  entry = config.data.sources[name]
  source = find_source(entry.name, config.outside)
  own: list[str] = []
  told: dict[str, dict[str, Any]] = {}
  if not is_format(source):
    path = f"{folder(entry.name)}/{split}.array_record"
    told[path] = records.check(config.data.root)["files"][path]
  elif getattr(source, "OWN_SPLITS", False):
    told[entry.path] = {"split": split}
  else:
    entry = files.of_split(entry, split)
    own = [path for pattern in (entry.path, entry.annotations) if pattern
           for path in files.paths(pattern, "")]
  words = [config.data.tokenizer or os.path.join(config.data.root, records.TOKENIZER),
           *filter(None, [config.data.instruction_tokenizer])]
  for path in words:
    own += published.paths(path) if os.path.isdir(path) else [path]
  for path in own:
    found = os.stat(path)
    told[path] = _described(path, found.st_size, found.st_mtime_ns)
  return told


@functools.cache  # evaluations come again and again
def _described(path: str, size: int, written: int) -> dict[str, Any]:
  del written
  return {"bytes": size} | ({"sha256": records.digest(path)} if size <= WHOLE else {})
