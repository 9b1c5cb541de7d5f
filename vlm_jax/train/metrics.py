"""Numbers of a run, in files, in trackers and on the terminal.

`metrics.jsonl` holds what is a function of the config alone (losses, gradient norm, checksum of the
batch): a run that was killed and resumed has the same bytes in it as one that was not.
`timing.jsonl` holds the rest: speed, waiting, occupancy. Rows are in step order.
"""

import math
import sys
import time
import zlib
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core.errors import DiskError
from vlm_jax.core.fusion import find_connector, find_fusion, find_llm, find_tower
from vlm_jax.core.layout import streams_of
from vlm_jax.nn import pool
from vlm_jax.train import trackers
from vlm_jax.train.optimizer import unread_of
from vlm_jax.train.state import Leaf
from vlm_jax.train.step import Numbers

# How paths of tables end whose rows are read or added, which is as good as free, as numbers are; a
# tied embedding is the head's matrix.
READ = ("embed/embedding", "head/kernel", "positions", "table", "latents", "queries", "probe",
        "time", "_token", "registers", "newline")


class Writer:
  """Sends the rows of a run to its files and trackers.

  Args:
    config: of the run; `train.trackers`.
    path: the run directory.
    step: the step the run continues from; rows behind it are taken away.

  Only the first host writes.
  """

  def __init__(self, config: ConfigDict, path: Path, step: int):
    self._path = path
    self._files: dict[str, trackers.Jsonl] = {}
    self._trackers: list[trackers.Tracker] = []
    if jax.process_index() != 0:
      return
    try:
      self._files = {name: trackers.Jsonl(path / f"{name}.jsonl", step)
                     for name in ("metrics", "timing")}
      self._trackers = trackers.make(config, path, step)
    except OSError as error:
      raise self._full(error) from error

  def metrics(self, step: int, row: dict[str, Any]) -> None:
    """A row that is a function of the config."""
    self._write("metrics", step, row)

  def timing(self, step: int, row: dict[str, Any]) -> None:
    """A row of measurements."""
    self._write("timing", step, row)

  def _write(self, name: str, step: int, row: dict[str, Any]) -> None:
    try:
      for tracker in ([self._files[name]] if self._files else []) + self._trackers:
        tracker.log(step, row)
    except OSError as error:
      raise self._full(error) from error

  def sync(self) -> None:
    """Forces the rows to the disk; called before a checkpoint that must not be ahead of them."""
    for file in self._files.values():
      file.sync()

  def close(self) -> None:
    """Closes all files."""
    for tracker in (*self._files.values(), *self._trackers):
      tracker.close()

  def _full(self, error: OSError) -> DiskError:
    return DiskError(f"metrics cannot be written to {self._path} ({error.strerror}); free space "
                     "and start again: the run goes on from the newest checkpoint")


def row_of(numbers: Numbers, sources: list[str], flat: dict[str, np.ndarray]) -> dict[str, Any]:
  """The deterministic row of one step.

  Args:
    numbers: what the step reported, on the host.
    sources: names, sorted.
    flat: this host's batch.
  """
  row: dict[str, Any] = {"loss": float(numbers.total)}
  for objective, losses in numbers.losses.items():
    for index, name in enumerate(sources):
      weight = float(numbers.weights[objective][index])
      if weight > 0:
        row[f"loss/{objective}/{name}"] = float(losses[index])
        row[f"weight/{objective}/{name}"] = weight
  row |= {"grad_norm": float(numbers.grad_norm), "lr": float(numbers.lr)}
  row |= {name: int(count) for name, count in numbers.used.items()}
  row |= {f"pairs/{name}": float(count) for name, count in numbers.pairs.items()}
  return row | {"batch_crc32": checksum(flat)}


def checksum(flat: dict[str, np.ndarray]) -> int:
  """CRC-32 over the names and bytes of this host's batch."""
  value = 0
  for path in sorted(flat):
    value = zlib.crc32(np.ascontiguousarray(flat[path]).reshape(-1).view(np.uint8).data,
                       zlib.crc32(path.encode(), value))
  return value


def token_slots(flat: dict[str, np.ndarray]) -> tuple[int, int]:
  """How many slots of the streams of this host's batch hold a token, and how many there are."""
  streams = [flat[f"streams/{name}/segment_ids"] for name in streams_of(flat)]
  return sum(int(np.count_nonzero(ids)) for ids in streams), sum(ids.size for ids in streams)


class Work:
  """How much of a step's arithmetic is spent on slots that hold nothing.

  Dense layers cost 2 FLOPs per parameter and slot, three times that with the backward pass: slots
  of a stream cost the parameters under its name, or those of no stream's; keys and values of
  cross-attention cost the slots they are made of; an image costs tower and connector at every place
  they are applied to, which they say themselves, as a strategy does of what is its own (see
  `core/fusion.py`). The vocabulary's matrix is used where a token is predicted, by no other slot.
  Attention costs 4 C H FLOPs per visible pair and layer.
  """

  def __init__(self, config: ConfigDict, leaves: dict[str, Leaf], shapes: dict[str, Any]):
    """Reads the parameters and the flat batch from their shapes; `slots` are those of a step."""
    kinds = {"streams": "tokens", "media": "images", "documents": "texts"}
    # "tokens/<stream>", "images/<media>" and "texts/<documents>" to slots; where images may be
    # frames "items/<media>", of which there are as many places.
    self.slots = {}
    for path, shape in shapes.items():
      kind, name, field = path.split("/", 2)
      if field == "segment_ids":
        self.slots[f"{kinds[kind]}/{name}"] = math.prod(shape.shape)
      elif kind == "media" and field == "time":
        self.slots[f"items/{name}"] = math.prod(shape.shape)
    self._cost = dict.fromkeys(self.slots, 0.0)  # FLOPs of one slot
    # Texts of fixed length are computed whole, padding included.
    texts = {name: shapes[path].shape[-1] for name in self.slots
             if (path := f"documents/{name.removeprefix('texts/')}/tokens") in shapes}
    fusion, unread = find_fusion(config), unread_of(config, leaves)
    uses = getattr(fusion, "uses", lambda config, path: None)
    for path, leaf in leaves.items():
      if path.endswith(READ) or not leaf.shape:
        continue
      places = uses(config, path)
      if places is None:
        places = _places(config, path, list(self.slots), texts)
      size = 6 * math.prod(leaf.shape) * (1 - np.mean(unread.get(path, 0.0)))
      for name in self._cost.keys() & places.keys():
        self._cost[name] += size * places[name]
    self._predict = 6 * config.llm.width * config.llm.vocab_size
    head_dim = config.llm.head_dim or config.llm.width // config.llm.heads
    encoder = lambda llm, mask: (llm.encoder_depth if mask == "encoder" else 0) or llm.depth
    layers = getattr(find_llm(config), "layers_of", encoder)
    own = fusion.attention_shapes(config) if hasattr(fusion, "attention_shapes") else {}
    self._layers = lambda mask: own.get(
      mask, (layers(config.llm, mask), config.llm.heads, head_dim))

  def fills(self, used: dict[str, int]) -> dict[str, float]:
    """Share of slots in use, and the share of the dense FLOPs that empty slots cost."""
    row = {f"fill/{name}": used[name] / total for name, total in self.slots.items() if total}
    cost = {name: self._cost[name] * total for name, total in self.slots.items()}
    empty = sum(cost[name] * (1 - row[f"fill/{name}"]) for name in cost if f"fill/{name}" in row)
    return row | {"flops_empty_share": empty / max(sum(cost.values()), 1)}

  def head(self, predicted: float) -> float:
    """FLOPs of the vocabulary's matrix, forward and backward, for so many predicted tokens."""
    return self._predict * predicted

  def dense(self) -> float:
    """FLOPs of all layers' matrices, forward and backward, on every slot of a step, used or not."""
    return sum(self._cost[name] * total for name, total in self.slots.items())

  def attention(self, pairs: dict[str, float]) -> float:
    """FLOPs of attention behind the connector, both ways, for the visible pairs of every mask.

    Local layers count as global ones: in rows longer than their window this is an upper bound.
    """
    return sum(3 * 4 * count * math.prod(self._layers(mask)) for mask, count in pairs.items())


def _places(config: ConfigDict, path: str, slots: list[str], texts: dict[str, int]
            ) -> dict[str, int]:
  """To how many places of a slot a parameter is applied, by name of slots; left out: to none.

  Args:
    config: every field.
    path: of the parameter, which the strategy says nothing of.
    slots: names of all slots.
    texts: those of texts of fixed length, and their length.
  """
  top, _, inner = path.partition("/")
  tower, connector = find_tower(config), find_connector(config)
  height, width = tower.grid(config.tower)
  images = [name for name in slots if name.startswith("images/")]
  if top == "tower":
    queries = 1 if inner.startswith("pool/") else height * width
    alike = lambda config, path: pool.uses(path, queries, height * width)
    return dict.fromkeys(images, getattr(tower, "uses", alike)(config.tower, inner))
  if top == "connector":
    count = len(connector.slots(config.connector, 1, height, width))
    uses = getattr(connector, "uses", lambda config, path, features: count)
    places = dict.fromkeys(images, uses(config.connector, inner, height * width))
    for items in (name for name in slots if name.startswith("items/")):
      # What an item costs however many frames it has, it costs once.
      places[items] = uses(config.connector, inner, 0)
      places[items.replace("items", "images", 1)] -= places[items]
    return places
  streams = [name.removeprefix("tokens/") for name in slots if name.startswith("tokens/")]
  places = {f"tokens/{stream}": 1 for stream in _streams_of(path, streams)}
  return places | texts if top == "llm" else places


def _streams_of(path: str, streams: list[str]) -> list[str]:
  """The streams on whose slots a parameter of the language model is used."""
  mine = [stream for stream in streams if stream in path.split("/")]
  if mine and ("/cross/key/" in path or "/cross/value/" in path):
    return [stream for stream in streams if stream not in mine]
  return mine or streams


class Clock:
  """Time since the last log: steps, waiting for data, and what was useful."""

  def __init__(self):
    self.reset()

  def reset(self) -> None:
    """Starts a new stretch."""
    self._start, self._steps, self._wait = time.perf_counter(), 0, 0.0
    self._held = self._slots = 0

  def step(self, waited: float, tokens: tuple[int, int]) -> None:
    """Counts one step that waited so many seconds for its batch of `token_slots`."""
    self._steps += 1
    self._wait += waited
    self._held += tokens[0]
    self._slots += tokens[1]

  def row(self, used: dict[str, int], pair_flops: float) -> dict[str, float]:
    """Rates of the stretch, taking its last step as typical, and its "token_fill"; resets."""
    seconds = max(time.perf_counter() - self._start, 1e-9)
    steps = max(self._steps, 1)
    row = {"step_seconds": seconds / steps, "data_wait_share": self._wait / seconds,
           "attention_flops_per_second": pair_flops * steps / seconds}
    row |= {f"{name}/second": count * steps / seconds for name, count in used.items()}
    if self._slots:
      row["token_fill"] = self._held / self._slots
    self.reset()
    return row


class Progress:
  """A line that is rewritten on a terminal, a line per log otherwise; only the first host talks."""

  def __init__(self, total: int, stream: TextIO | None = None):
    self._stream = stream or sys.stdout
    self._total = total
    self.start(0)
    self._quiet = jax.process_index() != 0
    self._terminal = self._stream.isatty()
    self._open = False

  def start(self, step: int) -> None:
    """Starts the clock of the estimate behind `step`."""
    self._start, self._began = step, time.perf_counter()

  def say(self, text: str) -> None:
    """One whole line, whatever is on the terminal."""
    if not self._quiet:
      print(("\n" if self._open else "") + text, file=self._stream, flush=True)
      self._open = False

  def step(self, step: int, row: dict[str, Any], timing: dict[str, Any]) -> None:
    """The numbers of a logged step."""
    if self._quiet:
      return
    left = (time.perf_counter() - self._began) / max(step - self._start, 1) * (self._total - step)
    rate = sum(value for name, value in timing.items()
               if name.startswith("tokens/") and name.endswith("/second"))
    text = (f"step {step}/{self._total}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  "
            f"grad {row['grad_norm']:.3f}  {1e3 * timing['step_seconds']:.0f} ms/step  "
            f"{rate:,.0f} tokens/s  data wait {100 * timing['data_wait_share']:.0f}%  "
            + (f"fill {100 * timing['token_fill']:.0f}%  " if "token_fill" in timing else "")
            + f"left {duration(left)}")
    if self._terminal:
      done = int(20 * step / self._total)
      bar = f"[{'#' * done}{'.' * (20 - done)}] "
      print(f"\r\x1b[K{bar}{text}", end="", file=self._stream, flush=True)
      self._open = True
    else:
      print(text, file=self._stream, flush=True)

  def close(self) -> None:
    """Ends an open line."""
    if self._open:
      print(file=self._stream, flush=True)
      self._open = False


def duration(seconds: float) -> str:
  """Seconds as 1h02m, 3m04s or 5s."""
  whole = int(seconds)
  if whole >= 3600:
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
  return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
