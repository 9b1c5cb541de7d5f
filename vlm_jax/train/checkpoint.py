"""Checkpoints that say when they are wrong.

Orbax writes a checkpoint to a temporary directory and renames it, so a kill never leaves half of
one. It does not notice a flipped bit in an array, and it does not look for an older checkpoint when
the newest is damaged. Each checkpoint therefore carries a manifest, committed with it, of the
digests of its arrays and documents; `restore` verifies it, moves a damaged checkpoint aside and
takes the previous one.
"""

import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from jax.experimental import multihost_utils

from vlm_jax.core import digest
from vlm_jax.core.errors import DataError, DiskError, UsageError
from vlm_jax.core.typing import Params
from vlm_jax.train import arrays
from vlm_jax.train.arrays import Corrupt, reading
from vlm_jax.train.state import State, begin

DISK_FULL = ("no space left", "file too large", "disk quota", "enospc", "efbig", "edquot")


class Checkpoints:
  """The `checkpoints/` directory of a run.

  Args:
    path: the directory, made if missing.
    keep: newest checkpoints kept.
    keep_every: every n-th step is kept for ever, 0: none.
    report: gets one line for everything the user should read.
  """

  def __init__(self, path: Path, keep: int, keep_every: int = 0, report: Callable = print):
    quiet()
    self.path, self._report = path, report
    self.failures = 0
    self._pending: int | None = None
    if jax.process_index() == 0:
      path.mkdir(parents=True, exist_ok=True)
      for left in path.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(left)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("checkpoints cleaned")
    # Quarantined steps are renamed before Orbax looks, and Orbax ignores names that are not steps.
    self._options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, keep_period=keep_every or None, enable_async_checkpointing=True)
    self._manager = ocp.CheckpointManager(path, options=self._options)

  def close(self) -> None:
    """Waits for a running save and lets go of the directory."""
    self._manager.close()

  def steps(self) -> list[int]:
    """Steps with a checkpoint, oldest first."""
    return steps(self.path)

  def save(self, step: int, state: State, data: dict, meta: dict) -> None:
    """Starts writing a checkpoint; arrays are copied before it returns.

    Args:
      step: steps done.
      state: the train state.
      data: the loader's state, JSON.
      meta: anything else worth knowing, JSON.

    A full disk does not stop training: one line, `failures` goes up, older checkpoints stay.
    """
    self._guard(lambda: self._manager.wait_until_finished())
    tree = {"params": state.params, "optimizer": {"step": state.step, "state": state.opt_state}}
    items = {
      **{name: ocp.args.StandardSave(item, save_args=arrays.chunks(item))
         for name, item in tree.items()},
      "data": ocp.args.JsonSave(data),
      "meta": ocp.args.JsonSave(meta),
      "manifest": ocp.args.JsonSave(make_manifest(tree, {"data": data, "meta": meta})),
    }
    self._pending = step
    self._guard(lambda: self._manager.save(step, args=ocp.args.Composite(**items), force=True))

  def check(self) -> None:
    """Reports a save that failed in the background."""
    if self._pending is not None and not self._manager.is_saving_in_progress():
      self._guard(lambda: self._manager.wait_until_finished())
      self._pending = None

  def finish(self, step: int) -> None:
    """Waits for the save of `step`, which must exist afterwards.

    Raises:
      DiskError: it could not be written.
    """
    self._guard(lambda: self._manager.wait_until_finished())
    if step not in self.steps():
      raise DiskError(f"the checkpoint of step {step} could not be written to {self.path}; free "
                      "space and start again: the run goes on from the newest checkpoint")

  def restore(self, abstract: State, init_optimizer: Callable | None = None
              ) -> tuple[State, dict | None, dict] | None:
    """The newest checkpoint that is as it was written: (state, data, meta), or None without any.

    One of step 0 may hold parameters alone, as `vlm-jax convert` writes it: the optimizer is then
    as new and the data (None) begins at the beginning.

    Args:
      abstract: shapes, dtypes and shardings to restore into; any mesh.
      init_optimizer: parameters to the optimizer's first state; None: parameters alone are refused.

    Raises:
      UsageError: a sound checkpoint is of another model.
      DataError: there were checkpoints and none is sound.
    """
    damaged = 0
    for step in reversed(self.steps()):
      try:
        if step == 0 and init_optimizer and not (self.path / "0" / "optimizer").exists():
          tree, _, meta = read(self._manager, step, {"params": abstract.params})
          return begin(tree["params"], init_optimizer, abstract), None, meta
        tree = {"params": abstract.params,
                "optimizer": {"step": abstract.step, "state": abstract.opt_state}}
        tree, data, meta = read(self._manager, step, tree)
        optimizer = tree["optimizer"]
        return State(optimizer["step"], tree["params"], optimizer["state"]), data, meta
      except Corrupt as error:
        damaged += 1
        self._quarantine(step, error)
    damaged = damaged or len(list(self.path.glob("*.corrupt-*")))
    if damaged:
      raise DataError(f"none of the checkpoints in {self.path} is readable, the damaged ones are "
                      "named *.corrupt-*; restore a copy or choose a new --workdir")
    return None

  def _quarantine(self, step: int, error: Exception) -> None:
    source = self.path / str(step)
    number = 0
    while (target := source.with_name(f"{step}.corrupt-{number}")).exists():
      number += 1
    if jax.process_index() == 0:
      os.rename(source, target)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f"quarantine {step}")
    self._report(f"checkpoint {step} is damaged ({error}); moved to {target.name}, "
                 "trying the previous one")
    self._manager.close()
    self._manager = ocp.CheckpointManager(self.path, options=self._options)

  def _guard(self, work: Callable[[], Any]) -> None:
    try:
      work()
    except Exception as error:  # Orbax wraps the reason in several types; the text is what is left
      if not _disk_full(error):
        raise
      self.failures += 1
      self._report(f"WARNING: the checkpoint of step {self._pending} was not written, the disk is "
                   f"full ({self.path}); training goes on, free space before the next one")
      self._manager.close()
      for left in self.path.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(left, ignore_errors=True)
      self._manager = ocp.CheckpointManager(self.path, options=self._options)


def steps(path: Path) -> list[int]:
  """Steps with a checkpoint below `path`, oldest first."""
  return sorted(int(child.name) for child in path.iterdir() if child.name.isdigit())


def choose(path: Path, step: int | None) -> int:
  """`step`, or the newest one; a UsageError lists the steps there are when it is not there."""
  known = steps(path) if path.is_dir() else []
  if not known or step is not None and step not in known:
    raise UsageError(f"{path} has no checkpoint{'' if step is None else f' of step {step}'}; "
                     f"it has {', '.join(map(str, known)) or 'none'}")
  return known[-1] if step is None else step


def load_params(path: Path, abstract: Params, step: int | None = None) -> tuple[Params, int]:
  """The parameters of a checkpoint, verified, without the optimizer: for evaluation and export.

  Args:
    path: the `checkpoints/` directory.
    abstract: shapes, dtypes and shardings of all parameters.
    step: which checkpoint, None: the newest.

  Raises:
    UsageError: there is no such checkpoint, or it is of another model.
    DataError: it is damaged.
  """
  quiet()
  step = choose(path, step)
  manager = ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(read_only=True))
  try:
    tree, _, _ = read(manager, step, {"params": abstract})
  except Corrupt as error:
    raise DataError(f"checkpoint {path / str(step)} is damaged ({error}); name an older one with "
                    "--step") from error
  finally:
    manager.close()
  return tree["params"], step


def make_manifest(tree: Any, documents: dict[str, Any]) -> dict[str, Any]:
  """What a checkpoint must contain: digests of all arrays and JSON documents, and its own."""
  manifest = {
    "arrays": digest.of_arrays(tree),
    "documents": {name: digest.of_json(value) for name, value in documents.items()},
  }
  return manifest | {"digest": digest.of_json(manifest)}


def read(manager: ocp.CheckpointManager, step: int, abstract: dict) -> tuple[dict, dict, dict]:
  """Reads and verifies some items of a checkpoint, and both documents.

  Args:
    manager: of the directory.
    step: which checkpoint.
    abstract: item ("params", "optimizer") to a tree of shapes, dtypes and shardings.

  Returns:
    The items, the loader's state and the meta data.

  Raises:
    Corrupt: something is not what was written.
    UsageError: the checkpoint is sound and of another model.
  """
  manifest, data, meta = read_documents(manager, step)
  same_model(manifest["arrays"], abstract, step)
  tree = {}
  for name, item in abstract.items():
    mine = {path.partition("/")[2]: entry for path, entry in manifest["arrays"].items()
            if path.split("/")[0] == name}
    tree[name] = arrays.load(manager.directory / str(step) / name, mine, item)
  verify(tree, manifest)
  return tree, data, meta


def read_documents(manager: ocp.CheckpointManager, step: int) -> tuple[dict, dict, dict]:
  """The manifest of a checkpoint, the loader's state and the meta data, verified.

  Raises:
    Corrupt: one is not what was written.
  """
  def json_item(name: str) -> Any:
    with reading(name):
      return manager.restore(step, args=ocp.args.Composite(**{name: ocp.args.JsonRestore()}))[name]

  manifest = json_item("manifest")
  own = manifest.pop("digest", None) if isinstance(manifest, dict) else None
  if own is None or own != digest.of_json(manifest):
    raise Corrupt("its manifest is damaged")
  documents = {name: json_item(name) for name in ("data", "meta")}
  for name, value in documents.items():
    if digest.of_json(value) != manifest["documents"][name]:
      raise Corrupt(f"'{name}' is not what was written")
  return manifest, documents["data"], documents["meta"]


def verify(tree: Any, manifest: dict[str, Any]) -> None:
  """Compares arrays, or `Pieces`, with the manifest's digests.

  Raises:
    Corrupt: one is not what was written.
  """
  for name, entry in digest.of_arrays(tree).items():
    if entry != manifest["arrays"][name]:
      raise Corrupt(f"array '{name}' is not what was written")


def same_model(saved: dict[str, dict], abstract: dict, step: int) -> None:
  """Refuses a sound checkpoint of another model, which is nothing to move aside."""
  for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    entry = saved.get(name)
    if entry is None:
      raise UsageError(f"checkpoint {step} has no '{name}', which the model needs; the code or "
                       "config is not the one that wrote it")
    if entry["shape"] != list(leaf.shape):
      raise UsageError(f"checkpoint {step} has '{name}' with shape {entry['shape']}, the model "
                       f"needs {list(leaf.shape)}; the code or config is not the one that wrote it")


def quiet() -> None:
  """Keeps tracebacks of failures that are handled here off the terminal.

  Orbax logs the error of every thread on its way up, event loops that it closed after an error
  still get callbacks, and of the arrays that a full disk refused it asks after the first only: the
  event loop logs a traceback for each of the others.
  """
  absl_logging.set_verbosity(absl_logging.FATAL)
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  if getattr(sys.unraisablehook, "ours", False):
    return
  before = sys.unraisablehook

  def hook(event: Any) -> None:
    if str(event.exc_value) != "Event loop is closed":
      before(event)

  hook.ours = True
  sys.unraisablehook = hook


def _disk_full(error: BaseException | None) -> bool:
  while error is not None:
    if any(words in str(error).lower() for words in DISK_FULL):
      return True
    error = error.__cause__ or error.__context__
  return False
