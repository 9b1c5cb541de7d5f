"""The one training loop. Read `train` top to bottom: open, build, restore, compile, step, save.

The order matters in two places. A checkpoint is written only after the rows of its step, so a
resumed run finds every row it does not compute again. An evaluation comes after the checkpoint of
its step, so nothing waits for it; if its row is missing at the next start, it is done then.
"""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from vlm_jax.core.errors import NumericsError, UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.mesh import make_mesh
from vlm_jax.core.tree import flatten, unite
from vlm_jax.core.typing import Params
from vlm_jax.core.writing import write_atomically
from vlm_jax.train import initial, trackers
from vlm_jax.train import metrics as metrics_lib
from vlm_jax.train import state as state_lib
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.train.optimizer import count, make_optimizer, state_bytes
from vlm_jax.train.profile import Profile
from vlm_jax.train.signals import Signals
from vlm_jax.train.state import State
from vlm_jax.train.step import Numbers, make_step, place
from vlm_jax.train.workdir import Fill, Workdir, environment

Evaluate = Callable[[str, Params, int], dict[str, float]]
EMPTY = 0.6  # a fill of the rows below this is told once


def train(config: ConfigDict, workdir: str | Path, *, make_loader: Callable | None = None,
          evaluate: Evaluate | None = None, fill: Fill | None = None) -> dict[str, Any]:
  """Trains until `config.train.steps`, from the newest checkpoint of `workdir` if it has one.

  Args:
    config: every field, see configs/base.py.
    workdir: the run directory; made, or continued when it holds a run of the same config.
    make_loader: (config, start=) -> loader of (flat batch, info); None: `data.pipeline.make`.
    evaluate: (name in config.evals, params, step) -> numbers; None: no evaluation is run.
    fill: as in `Workdir`.

  Returns:
    The last row of metrics.jsonl, with the numbers of the last evaluation.

  Raises:
    UserError: see core.errors; NumericsError when a loss is not finite, Interrupted after a signal.
  """
  if config.train.keep < 1:
    raise UsageError(f"config.train.keep is {config.train.keep}; keep at least 1 checkpoint")
  trackers.check(config)
  profile = Profile(config.profile, Path(workdir))
  set_up_cache(config)
  with contextlib.ExitStack() as stack:
    stack.callback(profile.close)
    signals = stack.enter_context(Signals())
    work = stack.enter_context(Workdir(workdir, config, fill))
    progress = metrics_lib.Progress(config.train.steps)
    stack.callback(progress.close)

    # Build. Everything is a shape until it is restored or created.
    mesh = make_mesh(config)
    module = find_fusion(config)
    init_params, leaves = state_lib.initializer(module, config)
    optimizer = make_optimizer(config, module.STAGES, leaves)
    abstract = state_lib.abstract_state(leaves, optimizer.init, mesh)
    shapes = state_lib.abstract_batch(module, config, mesh)

    # Restore.
    checkpoints = Checkpoints(work.path / "checkpoints", config.train.keep, config.train.keep_every,
                              progress.say)
    stack.callback(checkpoints.close)
    state, data, meta = checkpoints.restore(abstract, optimizer.init) or (None, None, {"step": 0})
    first = meta["step"]
    found = initial.read(config, leaves) if state is None else {}
    moving, total = count(optimizer, leaves)
    progress.say(f"{config.fusion.name}: {total:,} parameters, {moving:,} of them train, "
                 f"{state_bytes(abstract) / 1e6:,.1f} MB of state, {mesh.size} device(s), "
                 + (f"resumed at step {first}" if state is not None else "new run"))

    # Compile, while the loader's workers fill their queues.
    loader = (make_loader or pipeline)(config, start=data)
    stack.callback(getattr(loader, "close", lambda: None))
    progress.say("compiling")
    began = time.perf_counter()
    stopped = "stopped while compiling, nothing was lost; the same command continues"
    step_function = signals.run(
      lambda: compile_step(config, module, optimizer, mesh, abstract, shapes), stopped)
    if state is None:
      state = signals.run(
        lambda: state_lib.create(init_params, optimizer.init, abstract, config.seed), stopped)
      state = dataclasses.replace(state, params=initial.place(state.params, found))
      del found
    compile_seconds = time.perf_counter() - began
    progress.say(f"compiled in {compile_seconds:.1f} s")

    run = Run(config, work.path, leaves, shapes, mesh, checkpoints, progress, evaluate, first)
    stack.callback(run.writer.close)
    run.writer.timing(first, {"compile_seconds": compile_seconds})
    run.evaluate_if_due(first, state.params)
    progress.start(first)
    run.clock.reset()

    numbers = None
    for step in range(first + 1, config.train.steps + 1):
      waiting = time.perf_counter()
      flat, info = next(loader)
      run.clock.step(time.perf_counter() - waiting, metrics_lib.token_slots(flat))
      batch = place(flat, mesh)
      jax.block_until_ready(numbers)  # one step in flight, not a queue of batches
      profile.before(step, numbers)
      with jax.profiler.StepTraceAnnotation("train", step_num=step):
        state, numbers = step_function(state, batch)
      profile.after(step, numbers)

      last, stop = step == config.train.steps, run.should_stop(step, signals)
      log = last or step % config.train.log_every == 0
      save = last or stop or step % config.train.checkpoint_every == 0
      if log or save:
        row = run.row(step, state, numbers, flat, info)  # stops the run when it is not finite
      if log:
        run.log(step, row)
      if save:
        run.save(step, state, loader)
      if last or stop:
        checkpoints.finish(step)
      if stop:
        signals.check(f"stopped after step {step}, which is saved in {work.path}; "
                      "the same command continues")
      run.evaluate_if_due(step, state.params)
    return run.result()


class Run:
  """What the loop does with a finished step: numbers, files, checkpoints, evaluations."""

  def __init__(self, config, path, leaves, shapes, mesh, checkpoints, progress, evaluate, first):
    self.config, self.path, self.checkpoints, self.progress = config, path, checkpoints, progress
    self.writer, self.clock = metrics_lib.Writer(config, path, first), metrics_lib.Clock()
    self._work = metrics_lib.Work(config, leaves, shapes)
    self._evaluate = evaluate
    self._sources, self._first_log = sorted(config.data.sources), True
    self._meta = {"seed": config.seed, "prng": jax.config.jax_default_prng_impl,
                  "config": json.loads(config.to_json()), "environment": environment(),
                  "mesh": dict(mesh.shape)}

  def should_stop(self, step: int, signals: Signals) -> bool:
    """Whether a signal came; with many hosts they agree about it on log steps."""
    if jax.process_count() == 1:
      return signals.received is not None
    if step % self.config.train.log_every:
      return False
    numbers = multihost_utils.process_allgather(np.int32(signals.received or 0))
    signals.received = int(numbers.max()) or None
    return signals.received is not None

  def row(self, step: int, state: State, numbers: Numbers, flat: dict,
          info: dict) -> dict[str, Any]:
    """The deterministic numbers of a step.

    Raises:
      NumericsError: loss or gradient norm is not finite; leaves a record and the batch behind.
    """
    row = metrics_lib.row_of(jax.device_get(numbers), self._sources, flat)
    for kind in ("documents", "bad", "epochs"):
      row |= {f"{kind}/{name}": number for name, number in sorted(info.get(kind, {}).items())}
    if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
      return row
    bad = [path for path, leaf in flatten(state.params).items()
           if not bool(np.isfinite(jax.numpy.sum(leaf)))]
    record = self.path / f"numerics-{step}.json"
    if jax.process_index() == 0:
      plain = {name: value if math.isfinite(value) else str(value) for name, value in row.items()}
      text = json.dumps({"step": step, "row": plain, "parameters_not_finite": bad}, indent=2)
      write_atomically(record, text)
      np.savez(record.with_suffix(".npz"), **{path.replace("/", "."): flat[path] for path in flat})
    what = "loss" if not math.isfinite(row["loss"]) else "gradient"
    raise NumericsError(f"the {what} is not finite at step {step} (since this step or one after "
                        f"the last log); {record} and its batch say more, nothing was saved; "
                        "lower config.optim.lr or look at the data")

  def log(self, step: int, row: dict[str, Any]) -> None:
    """Writes the rows of a step and a line of progress."""
    used = {name: row[name] for name in self._work.slots}
    pairs = {name.removeprefix("pairs/"): value for name, value in row.items()
             if name.startswith("pairs/")}
    timing = self.clock.row(used, self._work.attention(pairs)) | self._work.fills(used)
    self.checkpoints.check()
    if self.checkpoints.failures:
      timing["checkpoint_failures"] = self.checkpoints.failures
    self.writer.metrics(step, row)
    self.writer.timing(step, timing)
    self.progress.step(step, row, timing)
    if self._first_log and (share := timing.get("token_fill", 1.0)) < EMPTY:
      self.progress.say(
        f"only {share:.0%} of the slots of the rows hold tokens, and the others cost as much; lower"
        " config.data.tokens, raise config.data.images, or change the ratios in config.data.sources"
        " (`vlm-jax data inspect` shows what is full first)")
    self._first_log = False

  def save(self, step: int, state: State, loader: Any) -> None:
    """Starts the checkpoint of a step; its rows are on the disk first."""
    self.writer.sync()
    data = unite(gather(loader.state()))
    self.checkpoints.save(step, state, data, self._meta | {"step": step})

  def evaluate_if_due(self, step: int, params: Params) -> None:
    """Runs every evaluation of the config when this step has one and its row is missing."""
    every = self.config.train.eval_every
    due = step == self.config.train.steps or every and step and step % every == 0
    if self._evaluate is None or not self.config.evals or not due or self._evaluated(step):
      return
    row = {}
    for name in sorted(self.config.evals):
      for key, value in self._evaluate(name, params, step).items():
        row[f"eval/{name}/{key}"] = value
    self.writer.metrics(step, row)
    self.progress.say(f"step {step}  " + "  ".join(
      f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float)))
    self.clock.reset()

  def _evaluated(self, step: int) -> bool:
    rows = trackers.read(self.path / "metrics.jsonl")
    here = any(row["step"] == step and any(key.startswith("eval/") for key in row) for row in rows)
    return bool(np.all(gather(here)))

  def result(self) -> dict[str, Any]:
    """The last logged row, joined with the last evaluation's."""
    joined: dict[str, Any] = {}
    for row in trackers.read(self.path / "metrics.jsonl"):
      joined |= row
    return joined


def compile_step(config, module, optimizer, mesh, abstract, shapes) -> jax.stages.Compiled:
  """The step, compiled ahead of time: a shape error comes before the first batch."""
  with jax.set_mesh(mesh):  # models pin activations to it, see core.mesh.constrain
    step = make_step(config, module, optimizer, mesh, abstract)
    return step.lower(abstract, shapes).compile()


def set_up_cache(config: ConfigDict) -> None:
  """Keeps every compiled program, however small, so the second start of a run skips compilation."""
  folder = Path(config.train.compilation_cache or Path(config.data.root) / "compilation_cache")
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    print(f"no compilation cache: {folder} cannot be made ({error.strerror})", flush=True)
    return
  jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  compilation_cache.reset_cache()  # an earlier run of this process may have opened another folder


def pipeline(config: ConfigDict, start: dict | None) -> Any:
  """The project's own data pipeline, imported late: a caller's loader need not have grain."""
  from vlm_jax.data import pipeline as data_pipeline

  return data_pipeline.make(config, start, jax.process_index(), jax.process_count())


def gather(value: Any) -> list:
  """A JSON value of every host, in host order."""
  if jax.process_count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(text))).reshape(-1)
  padded = np.pad(text, (0, int(sizes.max()) - len(text)))
  texts = multihost_utils.process_allgather(padded)
  return [json.loads(bytes(text[:size])) for text, size in zip(texts, sizes, strict=True)]
