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
from vlm_jax.data.pack import Packed, Packer
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
    from vlm_jax.data.sources import obelics, parquet

    record = parquet.Rows(file, ("texts",), (*parquet.FIELDS, "texts"), parquet.EXPECTS)[0]
    texts = record.get("texts") or ()
    return "parquet" if any(isinstance(one, dict) for one in texts) or not texts else (
      obelics.__name__.rsplit(".", 1)[-1])
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
    layouts: list[Layout] = []
    packs = _Packs(config)
    for index in range(count):
      item = drawer((0, index))
      if isinstance(item, Bad):
        bad.setdefault(item.reason, []).append(item)
        continue
      for layout in item:
        packs.add(layout)
      layouts += item
    dropped = sum(map(len, bad.values()))
    lines = [f"{entry.path or entry.name}: {entry.name}, {total:,} records of split "
             f"'{entry.split}'" + (f", the first {count:,} read" if count < total else ""),
             f"{count - dropped:,} records give {len(layouts):,} sequences; {dropped:,} records "
             "would be dropped"]
    for reason, items in sorted(bad.items()):
      lines.append(f"  {reason} {len(items):,}: {REASONS[reason]}")
      lines += [f"    {item.key}: {item.detail}" for item in items[:KEYS]]
    if layouts:
      lines += packs.describe(layouts, total / count)
      lines += ["", "[[predicted]] text, and <image:n> for n image slots:",
                *inspect.show(config, packs.first.arrays, examples)]
  return "\n".join(lines), dropped / count


class _Packs:
  """Packs sequences as training does, and keeps count and the first step."""

  def __init__(self, config: ConfigDict):
    fusion = find_fusion(config)
    self._config = config
    self._packer = Packer(fusion.fields(config), fusion.axes(config), config.data.rows)
    self._fills: list[dict[str, float]] = []
    self._open = False
    self._first: Packed | None = None

  def add(self, layout: Layout) -> None:
    if not self._packer.add([layout]):
      self._close()
      self._packer.add([layout])
    self._open = True

  def _close(self) -> None:
    packed = self._packer.build()
    self._first = self._first or packed
    self._fills.append(packed.fill)
    self._open = False

  @property
  def first(self) -> Packed:
    """The first packed step."""
    if self._first is None:
      self._close()
    assert self._first is not None
    return self._first

  def describe(self, layouts: list[Layout], scale: float) -> list[str]:
    """Histograms, loss and steps; `scale` is all records over those read."""
    if self._open:
      self._close()
    data = self._config.data
    predicted, slots = 0, sum(layout.sizes["text"] for layout in layouts)
    for layout in layouts:
      predicted += sum(int(np.count_nonzero(values)) for path, values in layout.arrays.items()
                       if "/loss_weights/" in path)
    fill = {axis: np.mean([one[axis] for one in self._fills]) for axis in self._fills[0]}
    steps = sum(one["text"] for one in self._fills) / max(fill["text"], 1e-9) * scale
    return ["slots of a sequence, text and images:",
            *inspect.histogram([layout.sizes["text"] for layout in layouts]),
            "images of a sequence:",
            *inspect.histogram([layout.sizes.get("images", 0) for layout in layouts]),
            f"predicted: {predicted:,} of {slots:,} slots ({predicted / slots:.1%})",
            f"one epoch of this source alone: about {steps:,.0f} steps of {data.rows} rows, "
            f"{data.tokens} slots and {data.images} images each; fill " + ", ".join(
              f"{axis} {share:.2f}" for axis, share in fill.items())]


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
    config.llm.vocab_size = tokenizer.load(path).vocab_size
  return config
