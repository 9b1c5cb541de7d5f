"""`vlm-jax data check`: what training would make of a user's own files, before it is started.

Every record goes through what training does to it: read, decoded, tokenised, laid out and packed.
"""

import os
import tempfile

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.layout import Layout
from vlm_jax.data import files, inspect, tokenizer
from vlm_jax.data.bad import KEYS, REASONS, Bad, BadExample
from vlm_jax.data.draw import Draw
from vlm_jax.data.pack import Packer
from vlm_jax.data.sources import formats

FIELDS = {"conversations": "llava_json", "text_list": "mmc4", "questions": "vqav2",
          "annotations": "coco", "messages": "messages", "content": "messages", "text": "messages"}
ENDINGS = {".tar": "webdataset", ".array_record": "array_record"}


def guess(path: str) -> str:
  """The format of a file or folder, by its name and its first record.

  Raises:
    UsageError: it cannot be told.
    DataError: there is no such file, or it is damaged.
  """
  if os.path.isdir(os.path.expanduser(path)):
    return "tfds"
  file = files.paths(path, "a file in one of the formats " + ", ".join(formats()))[0]
  ending = os.path.splitext(file)[1].lower()
  if ending in ENDINGS:
    return ENDINGS[ending]
  if ending == ".parquet":
    from vlm_jax.data.sources import parquet

    rows = parquet.Rows(file, ("texts",), parquet.FIELDS, parquet.EXPECTS)
    texts = rows[0].get("texts") if len(rows) else None
    return "obelics" if texts and not any(isinstance(one, dict) for one in texts) else "parquet"
  try:
    record = files.JsonFile(file, "JSON, JSON lines, tar or parquet")[0]
  except (BadExample, IndexError):
    record = files.json_object(file, (), "JSON, JSON lines, tar or parquet")
  for field, name in FIELDS.items():
    if isinstance(record, dict) and field in record:
      return name
  raise UsageError(f"--format: {file} is in no form that is known by sight; name one of "
                   f"{', '.join(formats())}")


def check(config: ConfigDict, name: str, examples: int = 3, limit: int = 0) -> tuple[str, float]:
  """Describes one source of a config.

  Args:
    config: the recipe; without `data.tokenizer` or a prepared one, a token is a byte.
    name: which of its sources.
    examples: documents to write out.
    limit: records to read, 0 for all.

  Returns:
    The description, lines of text, and the share of records that training would drop.
  """
  with tempfile.TemporaryDirectory() as folder:
    config = _with_tokenizer(config, folder)
    drawer = Draw(config, name)
    entry, total = config.data.sources[name], len(drawer.records)
    count = min(limit or total, total)
    bad: dict[str, list[Bad]] = {}
    packs = _Packs(config)
    for index in range(count):
      item = drawer((0, index))
      if isinstance(item, Bad):
        bad.setdefault(item.reason, []).append(item)
      else:
        for layout in item:
          packs.add(layout)
    dropped = sum(map(len, bad.values()))
    lines = [f"{entry.path or entry.name}: {entry.name}, {total:,} records of split "
             f"'{entry.split}'" + (f", the first {count:,} read" if count < total else ""),
             f"{count - dropped:,} records give {len(packs.slots):,} sequences; "
             f"{dropped:,} records would be dropped"]
    for reason, items in sorted(bad.items()):
      lines.append(f"  {reason} {len(items):,}: {REASONS[reason]}")
      lines += [f"    {item.key}: {item.detail}" for item in items[:KEYS]]
    if packs.slots:
      first, described = packs.finish(total / count)
      lines += [*described, "", "[[predicted]] text, and <image:n> for n image slots:",
                *inspect.show(config, first, examples)]
  return "\n".join(lines), dropped / count


class _Packs:
  """Packs sequences as training does; holds counts and the first step alone."""

  def __init__(self, config: ConfigDict):
    fusion = find_fusion(config)
    self._data = config.data
    self._packer = Packer(fusion.fields(config), fusion.axes(config), config.data.rows)
    self._fills: list[dict[str, float]] = []
    self._first: dict[str, np.ndarray] = {}
    self._predicted = 0
    self.slots: list[int] = []  # of every sequence
    self._images: list[int] = []

  def add(self, layout: Layout) -> None:
    """Packs one sequence."""
    if not self._packer.add([layout]):
      self._build()
      self._packer.add([layout])
    self.slots.append(layout.sizes["text"])
    self._images.append(layout.sizes.get("images", 0))
    self._predicted += sum(int(np.count_nonzero(values)) for path, values in layout.arrays.items()
                           if "/loss_weights/" in path)

  def _build(self) -> None:
    packed = self._packer.build()
    self._first = self._first or packed.arrays
    self._fills.append(packed.fill)

  def finish(self, scale: float) -> tuple[dict[str, np.ndarray], list[str]]:
    """The first step, and histograms, loss and steps; `scale`: all records over those read."""
    self._build()
    *full, last = self._fills  # the last step is not full
    fill = {axis: float(np.mean([one[axis] for one in full])) if full else 1.0 for axis in last}
    fullest = max(last, key=lambda axis: last[axis] / max(fill[axis], 1e-9))
    steps = (len(full) + last[fullest] / max(fill[fullest], 1e-9)) * scale
    shares = ", ".join(f"{axis} {share:.2f}" for axis, share in fill.items())
    slots, data = sum(self.slots), self._data
    return self._first, [
      "slots of a sequence, text and images:", *inspect.histogram(self.slots),
      "images of a sequence:", *inspect.histogram(self._images),
      f"predicted: {self._predicted:,} of {slots:,} slots ({self._predicted / slots:.1%})",
      f"one epoch of this source alone: about {steps:,.1f} steps of {data.rows} rows, "
      f"{data.tokens} slots and {data.images} images each" + (f"; fill {shares}" if full else "")]


def _with_tokenizer(config: ConfigDict, folder: str) -> ConfigDict:
  """The config with a tokenizer that exists: its own, the prepared one, or one of bytes."""
  config = config.copy_and_resolve_references()
  path = config.data.tokenizer
  with config.unlocked():
    if not path:
      path = os.path.join(config.data.root, "tokenizer.json")
      if not os.path.isfile(path):
        path = os.path.join(folder, "tokenizer.json")
        tokenizer.train([], tokenizer.SMALLEST).save(path)
    config.data.tokenizer = path
    config.llm.vocab_size = tokenizer.load(
      path, config.data.template, config.llm.positions).vocab_size
  return config
