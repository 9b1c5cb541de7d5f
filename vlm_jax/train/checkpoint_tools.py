"""What `vlm-jax ckpt` does: look at checkpoints without the code or config that wrote them.

Shapes and dtypes come from a checkpoint's own manifest, every array is checked against its digest,
and all of it lands on the host, whatever mesh it was written from; parameters may stay on the disk,
to be read in pieces. `prune` takes the lock of the run first; `average` and `write_run` make new
directories.
"""

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from vlm_jax.core.errors import DataError, DiskError, UsageError
from vlm_jax.core.pieces import Pieces
from vlm_jax.core.tree import unflatten
from vlm_jax.core.typing import Params
from vlm_jax.core.writing import new_directory, write_atomically
from vlm_jax.train import arrays, checkpoint, workdir
from vlm_jax.train.checkpoint import Corrupt

FOLDER = "checkpoints"
ITEMS = ("params", "optimizer")


@dataclasses.dataclass(frozen=True)
class Entry:
  """One directory below `checkpoints/`.

  Attributes:
    path: where.
    step: steps done.
    kind: "checkpoint", "quarantined" (damaged, moved aside) or "unfinished" (a save was cut off).
    bytes: on the disk.
    seconds: when it was written, since the epoch.
  """

  path: Path
  step: int
  kind: str
  bytes: int
  seconds: float


@dataclasses.dataclass(frozen=True)
class Contents:
  """A checkpoint that was read back as it was written: {"params/llm/...": array}, documents."""

  step: int
  arrays: dict[str, np.ndarray]
  data: dict[str, Any]
  meta: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Difference:
  """How an array differs between two checkpoints.

  Attributes:
    path: of the array.
    largest: max |a - b|; None when the array is only in one, or the shapes differ.
    relative: |a - b| / |b| in the Euclidean norm, or None.
    note: what there is to say instead, e.g. "only in A".
  """

  path: str
  largest: float | None
  relative: float | None
  note: str = ""


def folder(run: str | Path) -> Path:
  """The `checkpoints/` of a run directory; a UsageError when there is none."""
  path = Path(run).absolute() / FOLDER
  if not path.is_dir():
    raise UsageError(f"{run} has no {FOLDER}/; name the directory of a run")
  return path


def locate(spec: str | Path) -> tuple[Path, int]:
  """A run directory (its newest checkpoint) or `RUN/checkpoints/STEP`: the folder and the step.

  Raises:
    UsageError: there is no such checkpoint.
  """
  path = Path(spec).absolute()
  if path.name.isdigit() and path.parent.name == FOLDER:
    return path.parent, checkpoint.choose(path.parent, int(path.name))
  return folder(spec), checkpoint.choose(folder(spec), None)


def entries(path: Path) -> list[Entry]:
  """Everything below `checkpoints/`, by step."""
  found = []
  for child in path.iterdir():
    step, _, rest = child.name.partition(".")
    if not step.isdigit() or not child.is_dir():
      continue
    kind = "unfinished" if "orbax-checkpoint-tmp" in rest else "quarantined"
    size = sum(file.stat().st_size for file in child.rglob("*") if file.is_file())
    found.append(Entry(child, int(step), kind if rest else "checkpoint", size,
                       child.stat().st_mtime))
  return sorted(found, key=lambda entry: (entry.step, entry.path.name))


def load(path: Path, step: int, items: Sequence[str] = ITEMS) -> Contents:
  """Reads and verifies a checkpoint.

  Args:
    path: the `checkpoints/` directory.
    step: which.
    items: "params" and "optimizer"; one that the checkpoint was written without is left out.

  Raises:
    Corrupt: it is not what was written.
  """
  found: dict[str, np.ndarray] = {}
  with _reader(path) as manager:
    manifest, data, meta = checkpoint.read_documents(manager, step)
    for item in items:
      # One item after the other: the optimizer is twice as large as the parameters.
      if item == "params":
        mine = {f"params/{name}": leaf.whole() for name, leaf in _pieces(path, step, manifest)}
        checkpoint.verify(mine, manifest)
      else:
        mine = _optimizer(manager, step, path / str(step) / item, manifest)
      found |= mine
  return Contents(step, found, data, meta)


def open_params(path: Path, step: int) -> dict[str, Pieces]:
  """The parameters of a checkpoint by path, verified, and none of them in memory.

  Args:
    path: the `checkpoints/` directory.
    step: which.

  Raises:
    Corrupt: it is not what was written.
  """
  with _reader(path) as manager:
    manifest, _, _ = checkpoint.read_documents(manager, step)
  found = dict(_pieces(path, step, manifest))
  checkpoint.verify({"params": unflatten(found)}, manifest)
  return found


@contextlib.contextmanager
def _reader(path: Path) -> Iterator[ocp.CheckpointManager]:
  checkpoint.quiet()
  manager = ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(read_only=True))
  try:
    yield manager
  finally:
    manager.close()


def _pieces(path: Path, step: int, manifest: dict[str, Any]) -> Iterable[tuple[str, Pieces]]:
  entries = {name.partition("/")[2]: entry for name, entry in manifest["arrays"].items()
             if name.split("/")[0] == "params"}
  return arrays.open_pieces(path / str(step) / "params", entries).items()


def _optimizer(manager: ocp.CheckpointManager, step: int, path: Path, manifest: dict[str, Any]
               ) -> dict[str, np.ndarray]:
  """The optimizer's arrays; its tuples are known from Orbax's own description of the tree."""
  expected = {name for name in manifest["arrays"] if name.split("/")[0] == path.name}
  if not expected:
    return {}
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  try:
    tree = ocp.StandardCheckpointHandler().metadata(path).tree
    abstract = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
  except Exception as error:  # whatever a damaged description makes Orbax say
    raise Corrupt(f"'{path.name}' has no readable description of its arrays") from error
  tree, _, _ = checkpoint.read(manager, step, {path.name: abstract})
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  found = {jax.tree_util.keystr(keys, simple=True, separator="/"): np.asarray(leaf)
           for keys, leaf in leaves}
  if missing := sorted(expected - found.keys()):
    raise Corrupt(f"array '{missing[0]}' is missing")
  return found


def verify(path: Path, step: int) -> str | None:
  """Reads every byte of a checkpoint: None when all is as it was written, else what is wrong."""
  try:
    open_params(path, step)
    load(path, step, ("optimizer",))
  except Corrupt as error:
    return str(error)
  return None


def sound(path: Path, step: int, items: Sequence[str] = ITEMS) -> Contents:
  """As `load`, with a DataError for people."""
  with _for_people(path, step):
    return load(path, step, items)


def open_sound(path: Path, step: int) -> dict[str, Pieces]:
  """As `open_params`, with a DataError for people."""
  with _for_people(path, step):
    return open_params(path, step)


@contextlib.contextmanager
def _for_people(path: Path, step: int) -> Iterator[None]:
  try:
    yield
  except Corrupt as error:
    raise DataError(f"checkpoint {path / str(step)} is damaged ({error}); name another one"
                    ) from error


def norms(contents: Contents) -> list[dict[str, Any]]:
  """Per array: "path", "shape", "dtype", "norm" (Euclidean, f64), "mean" and "largest" |x|."""
  rows = []
  for name, array in sorted(contents.arrays.items()):
    size = np.abs(array.astype(np.float64))
    rows.append({"path": name, "shape": list(array.shape), "dtype": str(array.dtype),
                 "norm": float(np.sqrt((size * size).sum())),
                 "mean": float(array.astype(np.float64).mean()) if array.size else 0.0,
                 "largest": float(size.max(initial=0))})
  return rows


def diff(a: Contents, b: Contents) -> list[Difference]:
  """How the arrays of two checkpoints differ, by path."""
  rows = []
  for path in sorted(a.arrays.keys() | b.arrays.keys()):
    one, two = a.arrays.get(path), b.arrays.get(path)
    if one is None or two is None:
      rows.append(Difference(path, None, None, f"only in {'B' if one is None else 'A'}"))
    elif one.shape != two.shape:
      rows.append(Difference(path, None, None, f"{list(one.shape)} in A, {list(two.shape)} in B"))
    else:
      one, two = one.astype(np.float64), two.astype(np.float64)
      gap, norm = np.abs(one - two), float(np.sqrt((two * two).sum()))
      length = float(np.sqrt((gap * gap).sum()))
      relative = length / norm if norm else (math.inf if length else 0.0)
      rows.append(Difference(path, float(gap.max(initial=0)), relative))
  return rows


def average(run: str | Path, steps: Sequence[int], out: str | Path) -> int:
  """Writes the mean of the parameters of several checkpoints as a run directory of its own.

  It holds the run's config and one checkpoint without optimizer, named after the newest step: for
  evaluation and generation, not to train on. Means are taken in f64 and rounded once.

  Args:
    run: the run directory.
    steps: at least two of its checkpoints.
    out: the new directory; missing or empty.

  Returns:
    The step the average is stored under.

  Raises:
    UsageError: fewer than two steps, no such checkpoint, or `out` holds something.
    DataError: one of them is damaged.
    DiskError: `out` cannot be written.
  """
  path = folder(run)
  if len(set(steps)) < 2:
    raise UsageError(f"--steps needs two checkpoints or more, got {len(set(steps))}; it has "
                     f"{', '.join(map(str, checkpoint.steps(path))) or 'none'}")
  steps = [checkpoint.choose(path, step) for step in sorted(set(steps))]
  workdir.load_config(run)  # before anything is written: it must be a run
  config = (Path(run) / "config.json").read_text()
  with new_directory(out) as target:
    sums: dict[str, np.ndarray] = {}
    for step in steps:
      contents = sound(path, step, ("params",))
      for name, array in contents.arrays.items():
        sums[name] = sums.get(name, 0) + array.astype(np.float64)
    params = {name: (total / len(steps)).astype(contents.arrays[name].dtype)
              for name, total in sums.items()}
    meta = {"averaged": steps, "of": str(Path(run).absolute())}
    write_run(target, config, steps[-1], unflatten(params)["params"], meta)
  return steps[-1]


def write_run(directory: Path, config: str, step: int, params: Params,
              meta: dict[str, Any]) -> None:
  """A run directory with one checkpoint of parameters alone.

  Training can start from one of step 0 (`Checkpoints.restore`): nothing has moved yet.

  Args:
    directory: an empty one.
    config: the text of its config.json.
    step: under which the checkpoint is stored.
    params: plain arrays, or `Pieces`, which are read twice: for their digests, then to be written.
    meta: anything worth knowing, JSON; `step` is added.
  """
  checkpoint.quiet()
  meta, params = {"step": step, **meta}, arrays.cut(params)
  write_atomically(directory / "config.json", config)
  json = {"data": {}, "meta": meta}
  json["manifest"] = checkpoint.make_manifest({"params": params}, json)
  handlers = {"params": arrays.handler(), **{name: ocp.JsonCheckpointHandler() for name in json}}
  with ocp.CheckpointManager(directory.absolute() / FOLDER, item_handlers=handlers) as manager:
    manager.save(step, args=ocp.args.Composite(
      params=ocp.args.PyTreeSave(params),
      **{name: ocp.args.JsonSave(value) for name, value in json.items()}))


def removable(path: Path, keep: int, keep_every: int, quarantined: bool = False) -> list[Entry]:
  """What a keep policy has no use for; never the newest checkpoint that is sound.

  Args:
    path: the `checkpoints/` directory.
    keep: the newest checkpoints stay.
    keep_every: so does every n-th step; 0: none.
    quarantined: also what was moved aside as damaged.

  Raises:
    UsageError: `keep` below 1.
    DataError: no checkpoint is sound, so that nothing may be removed.
  """
  if keep < 1 or keep_every < 0:
    raise UsageError(f"--keep is {keep} and --keep-every {keep_every}; keep at least 1")
  found = entries(path)
  steps = [entry.step for entry in found if entry.kind == "checkpoint"]
  good = next((step for step in reversed(steps) if verify(path, step) is None), None)
  if steps and good is None:
    raise DataError(f"none of the checkpoints in {path} is sound; nothing is removed")
  stay = {*steps[-keep:], good} | {step for step in steps if keep_every and step % keep_every == 0}
  return [entry for entry in found if (entry.kind == "checkpoint" and entry.step not in stay)
          or (entry.kind == "quarantined" and quarantined)]


def prune(run: str | Path, keep: int, keep_every: int, quarantined: bool,
          really: bool) -> list[Entry]:
  """Removes what `removable` lists, under the run's lock, or only lists it.

  Raises:
    RetryError: another process holds the run.
    DiskError: a directory cannot be removed.
  """
  path = folder(run)
  if not really:
    return removable(path, keep, keep_every, quarantined)
  with _disk_errors(path), workdir.lock(path.parent / "LOCK"):
    gone = removable(path, keep, keep_every, quarantined)
    for entry in gone:
      # Renamed first: a removal that is cut off must not leave half of a checkpoint behind.
      doomed = entry.path.with_name(f"{entry.step}.orbax-checkpoint-tmp-removed")
      entry.path.rename(doomed)
      shutil.rmtree(doomed)
  return gone


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise DiskError(f"{error.filename or path} cannot be written ({error.strerror}); free space, "
                    "mend its permissions or choose another directory") from error


def groups(contents: Contents) -> dict[str, int]:
  """Numbers of parameters by module, {"llm": n, ...}."""
  counts: dict[str, int] = {}
  for name, array in contents.arrays.items():
    item, module = name.split("/")[:2]
    if item == "params":
      counts[module] = counts.get(module, 0) + array.size
  return counts
