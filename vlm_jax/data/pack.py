"""Whole sampling cycles into the rows of one step, on every axis at once.

A cycle holds `ratio` documents of every source. Cycles are taken while they fit; the first that
does not opens the next step, so the mix is exact in every step. Packing concatenates documents
along each axis and shifts the fields that point into an axis by the document's offset there; it
knows nothing about what the fields mean.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from vlm_jax.core.batch import empty
from vlm_jax.core.errors import UsageError
from vlm_jax.core.layout import Field, Layout

ENOUGH = 1 << 40  # the capacity of an axis that the fusion does not limit

Choose = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Packed:
  """One step.

  Attributes:
    arrays: path to array [rows, capacity, ...].
    fill: share of every array axis that documents take.
    documents: how many documents of each source.
    rows: the layouts of every row, in order.
  """

  arrays: dict[str, np.ndarray]
  fill: dict[str, float]
  documents: dict[str, int]
  rows: list[list[Layout]]


class Packer:
  """Collects cycles for one step after another."""

  def __init__(self, fields: dict[str, Field], axes: dict[str, int], rows: int):
    """Args: fields and axes (capacity of a row) as the fusion declares them, rows of a step."""
    self.fields, self.axes, self.rows = fields, axes, rows
    shifts = {field.shift for field in fields.values() if field.shift}
    self._names = sorted({field.axis for field in fields.values()} | shifts | set(axes))
    self._capacity = np.array([axes.get(name, ENOUGH) for name in self._names], np.int64)
    with_arrays = {field.axis for field in fields.values()}
    self._weighed = np.array([i for i, name in enumerate(self._names) if name in with_arrays])
    self._clear()

  def _clear(self) -> None:
    self._layouts: list[Layout] = []
    self._needs = np.zeros((0, len(self._names)), np.int64)
    self._row_of: list[int] = []  # of every layout
    self._used = np.zeros((self.rows, len(self._names)), np.int64)

  def add(self, cycle: Sequence[Layout]) -> bool:
    """Takes a cycle into the step.

    Returns:
      False when it does not fit any more: `build` the step, then add the cycle again.

    Raises:
      UsageError: the cycle does not even fit an empty step.
    """
    needs = [[layout.sizes.get(name, 0) for name in self._names] for layout in cycle]
    fresh = np.array(needs, np.int64).reshape(-1, len(self._names))
    used = self._used.copy()
    placed = self._place(fresh, range(len(fresh)), used, None)
    if placed is not None:
      self._row_of += placed
    else:
      # First fit met a full step. Packing everything afresh, largest first, often still finds room.
      everything = np.concatenate([self._needs, fresh])
      hopeless = (everything.sum(0) > self.rows * self._capacity).any()
      orders = () if hopeless else _orders(self._shares(everything))
      for order, choose in itertools.product(orders, (_even, _roomy)):
        used = np.zeros_like(self._used)
        placed = self._place(everything, order, used, choose)
        if placed is not None:
          self._row_of = placed
          break
      else:
        if not self._layouts:
          raise UsageError(self._too_large(cycle, fresh))
        return False
    self._used = used
    self._layouts += cycle
    self._needs = np.concatenate([self._needs, fresh])
    return True

  def build(self) -> Packed:
    """The arrays of the step collected so far; the packer is empty again afterwards."""
    contents: list[list[Layout]] = [[] for _ in range(self.rows)]
    documents: dict[str, int] = {}
    for layout, row in zip(self._layouts, self._row_of, strict=True):
      contents[row].append(layout)
      documents[layout.source] = documents.get(layout.source, 0) + 1
    arrays = empty(self.fields, self.axes, self.rows)
    for row, layouts in enumerate(contents):
      self._write(arrays, row, layouts)
    total = self._used.sum(0)
    fill = {
      self._names[i]: float(total[i]) / (self.rows * int(self._capacity[i]))
      for i in self._weighed if self._capacity[i]
    }
    self._clear()
    return Packed(arrays, fill, documents, contents)

  def _write(self, arrays: dict[str, np.ndarray], row: int, layouts: list[Layout]) -> None:
    offsets = dict.fromkeys(self._names, 0)
    for layout in layouts:
      for path, values in layout.arrays.items():
        field = self.fields[path]
        start = offsets[field.axis]
        if field.shift and offsets[field.shift]:
          values = np.where(values >= field.base, values + offsets[field.shift], values)
        arrays[path][row, start : start + len(values)] = values
      for name in self._names:
        offsets[name] += layout.sizes.get(name, 0)

  def _shares(self, needs: np.ndarray) -> np.ndarray:
    """f[layouts, axes with arrays], the share of a row's capacity."""
    return needs[:, self._weighed] / np.maximum(self._capacity[self._weighed], 1)

  def _place(self, needs: np.ndarray, order: Sequence[int], used: np.ndarray, choose: Choose | None
             ) -> list[int] | None:
    """Puts layouts one by one into the first row that fits, or into the one with the lowest score.

    Args:
      needs: i64[layouts, axes].
      order: in which the layouts are placed.
      used: i64[rows, axes], added to.
      choose: f[rows, axes with arrays], the shares that would be left, to a score f[rows]; None:
        the first row.

    Returns:
      The row of every layout, or None when one fits nowhere.
    """
    shares, room = self._shares(needs), self._capacity - used
    left = self._shares(room)
    rows = [0] * len(needs)
    for index in order:
      fits = (room >= needs[index]).all(1).nonzero()[0]
      if not len(fits):
        return None
      row = int(fits[choose(left[fits] - shares[index]).argmin() if choose else 0])
      rows[index] = row
      room[row] -= needs[index]
      left[row] -= shares[index]
      used[row] += needs[index]
    return rows

  def _too_large(self, cycle: Sequence[Layout], needs: np.ndarray) -> str:
    needed = ", ".join(
      f"{count} {name}" for name, count in zip(self._names, needs.sum(0), strict=True)
      if name in self.axes
    )
    room = ", ".join(f"{capacity} {name}" for name, capacity in sorted(self.axes.items()))
    return (f"one sampling cycle ({len(cycle)} documents, {needed}) does not fit an empty step of "
            f"{self.rows} rows with {room} each; raise config.data.rows, config.data.tokens or "
            "config.data.images, or lower the ratios in config.data.sources")


def padded(axes: dict[str, int]) -> dict[str, int]:
  """The axes of a step with one document a row: what packing saves is measured against it."""
  return axes | {"documents": 1}


def _even(left: np.ndarray) -> np.ndarray:
  # The row whose axes would fill up together: none is left with tokens but no image slot.
  return left.max(1) - left.min(1) + 0.1 * left.sum(1)


def _roomy(left: np.ndarray) -> np.ndarray:
  return -left.sum(1)


def _orders(shares: np.ndarray) -> list[list[int]]:
  """Orders to pack in, largest first by several measures of size; ties keep their order."""
  measures = (shares.max(1), shares.sum(1), (shares**2).sum(1))
  return [np.argsort(-measure, kind="stable").tolist() for measure in measures]
