"""The sections of a report, in reading order, and the file they are written to."""

import contextlib
import datetime
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import vlm_jax
from vlm_jax.core.errors import UsageError, UserError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.writing import write_atomically
from vlm_jax.evals.kinds import find_kind
from vlm_jax.report import charts, rows, samples
from vlm_jax.report.html import Html, figure, table, tag
from vlm_jax.report.run import Run, column, read
from vlm_jax.report.style import document
from vlm_jax.train.metrics import duration

MAPS = 2  # samples of an evaluation whose attention is drawn
UNITS = ("questions", "tokens", "pictures", "documents")  # what evaluations count


def write(workdir: str | Path, out: str | Path | None = None, *, root: str | None = None,
          outside: bool = False, maps: int = MAPS) -> Path:
  """Writes the report of a run.

  Args:
    workdir: the run directory; only read, but for the report.
    out: the file, None: `report.html` in the run directory.
    root: the prepared data, None: where the config says.
    outside: whether the config may name modules outside vlm_jax.
    maps: samples of each evaluation whose attention is drawn, from its checkpoint; 0: none is read.

  Returns:
    The file.

  Raises:
    UsageError: not a run directory, or a negative number of maps.
    DataError: a file of it is damaged.
    DiskError: the file cannot be written.
  """
  if maps < 0:
    raise UsageError(f"--attention-maps is {maps}; use 0 or more")
  run = read(workdir, root, outside)
  path = Path(out) if out else run.path / "report.html"
  write_atomically(path, render(run, maps))
  return path


def render(run: Run, maps: int = MAPS) -> str:
  """The whole page; `maps` as in `write`."""
  parts: list[tuple[str, Callable[[Run], Html]]] = [
    ("Evaluations", evaluations), ("Training", training), ("Token budget", budget),
    ("One packed row", rows.section), ("Samples", lambda run: examples(run, maps)),
    ("Config", config),
    ("Provenance", provenance),
  ]
  links = [tag("a", name, href=f"#{anchor(name)}") for name, _ in parts]
  body = [tag("header", header(run), tag("nav", links)), tiles(run)]
  for name, section in parts:
    body.append(tag("section", tag("h2", name), sentence(run, section), id=anchor(name)))
  return document(f"{run.path.absolute().name} - vlm_jax report", body)


def anchor(name: str) -> str:
  """Id of a section."""
  return name.lower().replace(" ", "-")


def sentence(run: Run, section: Callable[[Run], Html]) -> Html:
  """A section, or the sentence that says why it cannot be there."""
  try:
    return section(run)
  except UserError as error:
    return tag("p", f"Not shown: {error}.", class_="muted")


def header(run: Run) -> Html:
  """Name and a line of what it is."""
  config = run.config
  size = sum(math.prod(shape) for shape in run.shapes.values())
  facts = [f"{config.fusion.name} with {config.tower.name}, {config.connector.name} and "
           f"{config.llm.name}", f"{size:,} parameters" if size else "", f"seed {config.seed}"]
  steps, _ = column(run.metrics, "loss")
  if steps:
    facts.append(f"step {steps[-1]:,} of {config.train.steps:,}")
  return Html(tag("h1", run.path.absolute().name)
              + tag("p", " · ".join(filter(None, facts)), class_="lead"))


def tiles(run: Run) -> Html:
  """The few numbers to read first."""
  found: list[tuple[str, str]] = []
  for label, (_, numbers) in newest(run).items():
    name, value = main(numbers)
    found.append((figure(value), f"{label}: {name}"))
  _, losses = column(run.metrics, "loss")
  found += [(figure(losses[-1]), "last loss")] if losses else []
  for name in sorted({key for row in run.timing for key in row if key.startswith("tokens/")}):
    _, values = column(run.timing, name)
    found.append((figure(round(float(np.mean(values)))), f"{name.split('/')[1]} tokens a second"))
  for name in sorted({key for row in run.timing for key in row if key.startswith("fill/")}):
    _, values = column(run.timing, name)
    kind = name.split("/")[1].removesuffix("s")
    found.append((f"{100 * np.mean(values):.1f}%", f"of {kind} slots in use"))
  if run.timing:
    found.append((duration(train_seconds(run)), "of training"))
  return tag("div", [tag("div", tag("b", value), tag("span", text), class_="tile")
                     for value, text in found], class_="tiles") if found else Html("")


def train_seconds(run: Run) -> float:
  """Time spent in steps: seconds a step times the steps since the log before."""
  steps, seconds = column(run.timing, "step_seconds")
  return float(sum(s * (b - a) for a, b, s in zip([0, *steps], steps, seconds, strict=False)))


def newest(run: Run) -> dict[str, tuple[int, dict[str, Any]]]:
  """Every evaluation's label to the last step it was run at, and its numbers."""
  return {label: (step, numbers) for step, found in run.evals.items()
          for label, numbers in sorted(found.items())}


def main(numbers: dict[str, Any]) -> tuple[str, float]:
  """Name and value of the number an evaluation is read by; "" and NaN of a kind that is gone."""
  name = numbers.get("main", "")
  if not name:  # written by a version that left it to the kind
    with contextlib.suppress(UserError):
      name = find_kind(str(numbers.get("kind")), outside=False).MAIN
  return name, numbers.get(name, math.nan)


def evaluations(run: Run) -> Html:
  """The table with intervals, controls below their evaluation, and curves of in-loop ones."""
  if not run.evals:
    return tag("p", "No evaluation has been written yet; `vlm-jax evaluate --workdir=",
               str(run.path), "` makes one.", class_="muted")
  lines = []
  for label, (step, numbers) in newest(run).items():
    name, value = main(numbers)
    unit = next((unit for unit in (numbers.get("unit"), *UNITS) if unit in numbers), "")
    lines.append([tag("b", label), name, figure(value), bounds(numbers),
                  bar(numbers, value, name), f"{numbers[unit]:,} {unit}" if unit else "",
                  f"{numbers.get('source', '')} {numbers.get('split', '')}", figure(step)])
    for images, control in numbers.get("controls", {}).items():
      other = control.get(name, math.nan)
      asked = tag("span", samples.CONTROLS.get(images, images), class_="sub")
      lines.append([asked, name, figure(other), bounds(control), bar(control, other, name, True),
                    f"{control[unit]:,} {unit}" if unit in control else "", "control", ""])
  head = ["evaluation", "number", "value", "95% interval", "0 to 1", "over", "data", "step"]
  parts = [table(head, lines, (2, 3, 5, 7))]
  if len(run.evals) > 1:
    series: dict[str, dict[str, charts.Series]] = {}
    for label in newest(run):
      points = [(step, main(found[label])) for step, found in run.evals.items() if label in found]
      line = ([step for step, _ in points], [value for _, (_, value) in points])
      series.setdefault(points[-1][1][0], {})[label] = line
    drawn = [charts.lines(name, found) for name, found in series.items()]
    parts += [tag("h3", "Over training"), tag("div", drawn, class_="charts")]
  return Html("".join(parts))


def bounds(numbers: dict[str, Any]) -> str:
  """The interval as text."""
  if not {"low", "high"} <= numbers.keys():
    return ""
  return f"{figure(numbers['low'])} to {figure(numbers['high'])}"


def bar(numbers: dict[str, Any], value: float, name: str, control: bool = False) -> Html | str:
  """The interval as a picture, for numbers between 0 and 1."""
  if not {"low", "high"} <= numbers.keys() or name == "perplexity" or numbers["high"] > 1:
    return ""
  return charts.interval(value, numbers["low"], numbers["high"], control)


def training(run: Run) -> Html:
  """Curves of losses, gradient, rate, speed, waiting and fill."""
  if not run.metrics:
    return tag("p", "No step has been logged yet.", class_="muted")
  names = list(dict.fromkeys(key for row in run.metrics for key in row))
  timed = list(dict.fromkeys(key for row in run.timing for key in row))
  of = lambda rows, keys, cut: {key.removeprefix(cut).removesuffix("/second"): column(rows, key)
                                for key in keys}
  begin = lambda keys, start: [key for key in keys if key.startswith(start)]
  share = lambda value: f"{100 * value:.3g}%"
  one = lambda rows, key: {"last": column(rows, key)}
  drawn = [charts.lines("Loss", one(run.metrics, "loss"), note="all sources, weighted")]
  for objective in dict.fromkeys(key.split("/")[1] for key in begin(names, "loss/")):
    start = f"loss/{objective}/"
    drawn.append(charts.lines(f"Loss of each source, {objective}",
                              of(run.metrics, begin(names, start), start)))
  drawn += [
    charts.lines("Gradient norm", one(run.metrics, "grad_norm"), note="before clipping"),
    charts.lines("Learning rate", one(run.metrics, "lr"), zero=True),
    charts.lines("Throughput", of(run.timing, [key for key in timed if key.endswith("/second")
                                               and key.startswith("tokens/")], "tokens/"),
                 zero=True, note="useful tokens a second"),
    charts.lines("Waiting for data", one(run.timing, "data_wait_share"), zero=True,
                 note="share of the time", show=share),
    charts.lines("Slots in use", of(run.timing, begin(timed, "fill/"), "fill/"), zero=True,
                 show=share),
    charts.lines("Seconds a step", one(run.timing, "step_seconds"), zero=True),
  ]
  return tag("div", drawn, class_="charts")


def budget(run: Run) -> Html:
  """What the slots of a step hold, as a mean over the logged steps."""
  if not run.metrics:
    return tag("p", "No step has been logged yet.", class_="muted")
  mean = lambda name: float(np.mean(column(run.metrics, name)[1] or [0.0]))
  capacity = run.config.data.rows * run.config.data.tokens
  each = len(find_fusion(run.config).rows(run.config))
  used, images = mean("tokens/text"), each * mean("images/images")
  weights = {key for row in run.metrics for key in row if key.startswith("weight/")}
  predicted = sum(sum(column(run.metrics, key)[1]) for key in weights)
  predicted /= max(len(column(run.metrics, "loss")[0]), 1)
  images = min(images, used - predicted)  # of tiles, the border takes no slots
  parts = {"image": images, "prompt": max(used - images - predicted, 0.0), "predicted": predicted,
           "empty": max(capacity - used, 0.0)}
  classes = {name: f"k-{'padding' if name == 'empty' else name}" for name in parts}
  square = "At most each square of an image" if run.config.data.decode.grids else "An image"
  text = (f"Of the {capacity:,} slots of a step ({run.config.data.rows} rows of "
          f"{run.config.data.tokens:,}), mean over the logged steps. {square} takes {each} slots; "
          "predicted tokens are those that carry loss.")
  _, empty = column(run.timing, "flops_empty_share")
  if empty:
    text += f" Empty slots cost {100 * np.mean(empty):.1f}% of the dense FLOPs."
  return Html(charts.stack(parts, classes) + tag("p", text, class_="muted"))


def examples(run: Run, maps: int) -> Html:
  """Samples of every evaluation that asks questions."""
  parts = []
  for label, (step, numbers) in newest(run).items():
    if found := samples.section(run, label, step, numbers, maps):
      parts += [tag("h3", f"{label}, step {step:,}"), found]
  if not parts:
    return tag("p", "No evaluation has left answers to show.", class_="muted")
  note = "Wrong answers first; the others are spread over the whole evaluation."
  return Html(tag("p", note, class_="muted") + Html("".join(parts)))


def config(run: Run) -> Html:
  """Fields that differ from the defaults, and all of them."""
  changed = [[tag("code", name), tag("code", tag("span", repr(value), class_="changed")),
              tag("code", "-" if default is None else repr(default))]
             for name, (value, default) in run.fields.items() if value != default]
  every = [[tag("code", name), tag("code", tag("span", repr(value), class_="changed")
                                   if value != default else repr(value))]
           for name, (value, default) in run.fields.items()]
  return Html(table(["field", "this run", "configs/base.py"], changed)
              + tag("details", tag("summary", f"all {len(every)} fields"),
                    table(["field", "value"], every)))


def provenance(run: Run) -> Html:
  """Data and licences, versions, commands, parameters and checkpoints."""
  parts = [tag("h3", "Data")]
  if run.sources:
    lines = [[name, f"{entry.get('package', '')} {entry.get('version', '')}",
              ", ".join(f"{split} {count:,}" for split, count in entry["records"].items()),
              entry.get("licence", "unknown")] for name, entry in run.sources.items()]
    parts.append(table(["source", "package", "records", "licence and attribution"], lines))
  else:
    parts.append(tag("p", f"The data's manifest is not at {run.config.data.root}; with --root the "
                     "report names sources and licences.", class_="muted"))
  parts += [tag("h3", "What each number was measured on"), origins(run)]
  parts.append(tag("h3", "Versions"))
  versions = run.environment.get("versions", {})
  plain = {key: run.environment[key] for key in ("python", "platform", "commit", "processes")
           if run.environment.get(key)}
  devices = ", ".join(sorted(set(map(str, run.environment.get("devices", [])))))
  facts = {**plain, "devices": devices, **versions}
  parts.append(table([], [[name, tag("code", value)] for name, value in facts.items()])
               if run.environment else tag("p", "env.json is missing.", class_="muted"))
  parts.append(tag("h3", "Commands"))
  parts.append(tag("pre", "\n".join(run.commands) or "command.txt is missing."))
  parts += [tag("h3", "Parameters"), parameters(run), tag("h3", "Checkpoints")]
  if run.checkpoints:
    when = lambda seconds: datetime.datetime.fromtimestamp(seconds).isoformat(" ", "seconds")
    parts.append(table(["step", "MB", "written", ""], [
      [figure(entry.step), f"{entry.bytes / 1e6:,.2f}", when(entry.seconds), entry.kind]
      for entry in run.checkpoints], (0, 1)))
  else:
    parts.append(tag("p", "There is no checkpoint.", class_="muted"))
  today = datetime.datetime.now().isoformat(" ", "minutes")
  parts.append(tag("p", f"Written by vlm_jax {vlm_jax.__version__} on {today}.", class_="muted"))
  return Html("".join(parts))


def origins(run: Run) -> Html:
  """Step and digest of the parameters, and the files, of every evaluation."""
  lines = []
  for label, (step, numbers) in newest(run).items():
    origin = numbers.get("origin", {})
    found = [tag("div", tag("code", path), f" {figure(entry['bytes'])} bytes" if "bytes" in entry
                 else "", tag("span", f" {entry['sha256'][:16]}", title=entry["sha256"])
                 if "sha256" in entry else "")
             for path, entry in sorted(origin.get("files", {}).items())]
    lines.append([tag("b", label), figure(step), tag("code", origin.get("parameters", "unknown")),
                  found or "unknown"])
  if not lines:
    return tag("p", "No evaluation has been written yet.", class_="muted")
  return table(["evaluation", "step", "digest of the parameters", "files, sha256"], lines, (1,))


def parameters(run: Run) -> Html:
  """Parameters by module."""
  if not run.shapes:
    return tag("p", "No checkpoint says what they are.", class_="muted")
  groups: dict[str, int] = {}
  for path, shape in run.shapes.items():
    name = "/".join(path.split("/")[:2])
    groups[name] = groups.get(name, 0) + math.prod(shape)
  return table(["module", "parameters"], [[tag("code", name), f"{count:,}"]
                                          for name, count in sorted(groups.items())], (1,))
