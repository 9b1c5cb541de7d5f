"""The one training loop. Read it top to bottom: open, build, restore, compile, step, save.

The order matters in two places. A checkpoint is written only after the rows of its step, so a
resumed run finds every row it does not compute again. An evaluation comes after the checkpoint of
its step, so nothing waits for it; if its row is missing at the next start, it is done then. Where a
signal stops one between two batches, a step that is not saved by then is saved first.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlm_jax.core.errors import Interrupted, UsageError
from vlm_jax.core.fusion import Fusion, find_fusion
from vlm_jax.core.mesh import make_mesh
from vlm_jax.train import initial, trackers
from vlm_jax.train import metrics as metrics_lib
from vlm_jax.train import state as state_lib
from vlm_jax.train.checkpoint import Checkpoints
from vlm_jax.train.optimizer import Optimizer, count, make_optimizer, state_bytes
from vlm_jax.train.profile import Profile
from vlm_jax.train.run import Evaluate, Run
from vlm_jax.train.signals import Signals
from vlm_jax.train.state import State
from vlm_jax.train.step import make_step, place
from vlm_jax.train.workdir import Fill, Workdir


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
    built = build(config)

    checkpoints = Checkpoints(work.path / "checkpoints", config.train.keep, config.train.keep_every,
                              progress.say)
    stack.callback(checkpoints.close)
    restored = checkpoints.restore(built.abstract, built.optimizer.init)
    state, data, meta = restored or (None, None, {"step": 0})
    first = meta["step"]
    found = initial.read(config, built.leaves) if state is None else {}
    progress.say(built.line(config) + (
      f"resumed at step {first}" if state is not None else "new run"))

    # The loader's workers fill their queues while the step is compiled.
    loader = (make_loader or pipeline)(config, start=data)
    stack.callback(getattr(loader, "close", lambda: None))
    progress.say("compiling")
    began = time.perf_counter()
    step_function, state = compile_and_create(config, built, state, found, signals)
    del found
    compile_seconds = time.perf_counter() - began
    progress.say(f"compiled in {compile_seconds:.1f} s")

    run = Run(config, work.path, metrics_lib.Work(config, built.leaves, built.shapes),
              dict(built.mesh.shape), checkpoints, progress, evaluate, first)
    stack.callback(run.writer.close)
    run.writer.timing(first, {"compile_seconds": compile_seconds})
    run.evaluate_if_due(first, state.params, signals)
    progress.start(first)
    run.clock.reset()
    take_steps(run, first, state, step_function, loader, built.mesh, profile, signals)
    return run.result()


@dataclasses.dataclass(frozen=True)
class Built:
  """A model and its optimizer while everything is a shape, until it is restored or created.

  Attributes:
    module: the strategy.
    init_params, leaves: as of `state.initializer`.
    optimizer: of what the stage trains.
    mesh: of the devices.
    abstract: the train state.
    shapes: the flat batch of one step.
  """

  module: Fusion
  init_params: Callable
  leaves: dict[str, state_lib.Leaf]
  optimizer: Optimizer
  mesh: Mesh
  abstract: State
  shapes: dict[str, jax.ShapeDtypeStruct]

  def line(self, config: ConfigDict) -> str:
    """Its size in words, the beginning of a line for people."""
    moving, total = count(self.optimizer, self.leaves)
    return (f"{config.fusion.name}: {total:,} parameters, {moving:,} of them train, "
            f"{state_bytes(self.abstract) / 1e6:,.1f} MB of state, {self.mesh.size} device(s), ")


def build(config: ConfigDict) -> Built:
  """The shapes of a run; a UsageError where they do not fit together."""
  mesh, module = make_mesh(config), find_fusion(config)
  init_params, leaves = state_lib.initializer(module, config)
  optimizer = make_optimizer(config, module.STAGES, leaves)
  return Built(module, init_params, leaves, optimizer, mesh,
               state_lib.abstract_state(leaves, optimizer.init, mesh),
               state_lib.abstract_batch(module, config, mesh))


def compile_and_create(config: ConfigDict, built: Built, state: State | None, found: dict[str, Any],
                       signals: Signals) -> tuple[jax.stages.Compiled, State]:
  """The compiled step, and the state; when there is none yet, a new one around weights `found`."""
  stopped = "stopped while compiling, nothing was lost; the same command continues"
  step_function = signals.run(lambda: compile_step(config, built), stopped)
  if state is None:
    state = signals.run(
      lambda: state_lib.create(built.init_params, built.optimizer.init, built.abstract,
                               config.seed), stopped)
    state = dataclasses.replace(state, params=initial.place(state.params, found))
  return step_function, state


def take_steps(run: Run, first: int, state: State, step_function: jax.stages.Compiled, loader: Any,
               mesh: Mesh, profile: Profile, signals: Signals) -> None:
  """Does the steps behind step `first`, with their evaluations; a signal ends it, all saved."""
  config, numbers = run.config, None
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
      run.checkpoints.finish(step)
    if stop:
      signals.check(f"stopped after step {step}, which is saved in {run.path}; "
                    "the same command continues")
    try:
      run.evaluate_if_due(step, state.params, signals)
    except Interrupted:
      if not save:  # the step is none of those that are saved anyway
        run.row(step, state, numbers, flat, info)
        run.save(step, state, loader)
      run.checkpoints.finish(step)
      raise


def compile_step(config: ConfigDict, built: Built) -> jax.stages.Compiled:
  """The step, compiled ahead of time: a shape error comes before the first batch."""
  with jax.set_mesh(built.mesh):  # models pin activations to it, see core.mesh.constrain
    step = make_step(config, built.module, built.optimizer, built.mesh, built.abstract)
    return step.lower(built.abstract, built.shapes).compile()


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
