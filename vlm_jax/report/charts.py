"""Lines, bars, stacked bars and intervals as SVG. Values appear under the pointer by CSS alone."""

import math
from collections.abc import Callable, Mapping, Sequence

from vlm_jax.report.html import Html, figure, tag

WIDTH, HEIGHT = 420, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 26
POINTS = 150  # of a line; longer ones are averaged down to so many
BAR = 17  # height of a bar and its gap
COLOURS = 6  # .c0 to .c5 of the style sheet
LOG_RATIO = 12  # an axis is logarithmic when its positive values span more than this

Series = tuple[Sequence[float], Sequence[float]]  # steps, values


def thin(series: Series, points: int = POINTS) -> Series:
  """At most so many points, each the mean of a stretch, at the last step of the stretch."""
  steps, values = series
  count = len(steps)
  if count <= points:
    return series
  edges = [round(i * count / points) for i in range(points + 1)]
  pieces = list(zip(edges, edges[1:], strict=False))
  return ([steps[end - 1] for _, end in pieces],
          [sum(values[start:end]) / (end - start) for start, end in pieces])


def ticks(low: float, high: float, count: int = 4) -> list[float]:
  """About `count` round numbers from low to high."""
  if not high > low:
    return [low]
  raw = (high - low) / count
  size = 10.0 ** math.floor(math.log10(raw))
  width = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
  first = math.ceil(low / width - 1e-9)
  return [i * width for i in range(first, math.floor(high / width + 1e-9) + 1)]


def scale(values: Sequence[float], zero: bool) -> tuple[Callable, list[float], bool]:
  """The vertical axis: value to [0, 1], its ticks, and whether it is logarithmic."""
  low, high = min(values), max(values)
  if not zero and low > 0 and high / low > LOG_RATIO:
    down, up = math.log10(low), math.log10(high)
    marks = [10.0**power * factor for power in range(math.floor(down), math.ceil(up) + 1)
             for factor in ((1, 2, 5) if up - down < 2.5 else (1,))]
    pad = 0.04 * (up - down)
    down, up = down - pad, up + pad
    place = lambda value: (math.log10(value) - down) / (up - down)
    return place, [mark for mark in marks if 0 <= place(mark) <= 1], True
  low = min(low, 0.0) if zero else low
  pad = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
  low, high = (low if zero and low == 0 else low - pad), high + pad
  return lambda value: (value - low) / (high - low), ticks(low, high), False


def lines(title: str, series: Mapping[str, Series], *, zero: bool = False, note: str = "",
          show: Callable[[float], str] = figure) -> Html:
  """A chart of one or more lines over steps.

  Args:
    title: stands above it.
    series: name to (steps, values); values that are not finite are left out.
    zero: whether the axis starts at 0.
    note: a few words behind the title.
    show: a value as text.
  """
  kept = {}
  for name, (steps, values) in series.items():
    pairs = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
    if pairs:
      kept[name] = thin(([s for s, _ in pairs], [v for _, v in pairs]))
  if not kept:
    return tag("figure", tag("figcaption", tag("b", title)), tag("p", "No number was logged."))
  every = [value for _, values in kept.values() for value in values]
  place, marks, logarithmic = scale(every, zero)
  steps = sorted({step for known, _ in kept.values() for step in known})
  span = (steps[-1] - steps[0]) or 1
  x = lambda step: LEFT + (step - steps[0]) / span * (WIDTH - LEFT - RIGHT)
  y = lambda value: TOP + (1 - place(value)) * (HEIGHT - TOP - BOTTOM)
  at = lambda step, value: f"{x(step):.1f},{y(value):.1f}"
  parts = [_grid(marks, y, steps, x, show)]
  for number, (known, values) in enumerate(kept.values()):
    path = " ".join(at(step, value) for step, value in zip(known, values, strict=True))
    kind = f"c{number % COLOURS}"
    parts.append(tag("polyline", points=path, class_=f"line {kind}") if len(known) > 1 else
                 tag("circle", cx=f"{x(known[0]):.1f}", cy=f"{y(values[0]):.1f}", r=3.5,
                     class_=f"dot {kind}"))
  parts += _tips(kept, steps, x, y, show)
  legend = [tag("span", tag("i", class_=f"c{number % COLOURS}"), name, " ",
                tag("b", show(values[-1])))
            for number, (name, (_, values)) in enumerate(kept.items())]
  notes = ", ".join(filter(None, (note, "logarithmic" if logarithmic else "")))
  caption = tag("figcaption", tag("b", title), f" {notes}" if notes else "",
                tag("div", legend, class_="legend"))
  return tag("figure", caption, tag("svg", parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img",
                                    aria_label=title))


def _grid(marks, y, steps, x, show) -> Html:
  parts = []
  for mark in marks:
    level = f"{y(mark):.1f}"
    parts += [tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=level, y2=level, class_="grid"),
              tag("text", show(mark), x=LEFT - 6, y=f"{y(mark) + 4:.1f}", class_="end")]
  along = ticks(steps[0], steps[-1], 5)
  for mark in along:
    parts.append(tag("text", figure(mark), x=f"{min(x(mark), WIDTH - 18):.1f}", y=HEIGHT - 8,
                     class_="middle"))
  return Html("".join(parts))


def _tips(kept, steps, x, y, show) -> list[Html]:
  """A band around every step that shows its values while the pointer (or a finger) is on it."""
  tips = []
  for index, step in enumerate(steps):
    left = x(steps[index - 1]) if index else LEFT - 6
    right = x(steps[index + 1]) if index + 1 < len(steps) else WIDTH
    start = (left + x(step)) / 2 if index else left
    end = (right + x(step)) / 2 if index + 1 < len(steps) else right
    found = [(number, name, values[known.index(step)])
             for number, (name, (known, values)) in enumerate(kept.items()) if step in known]
    rows = [f"step {figure(step)}"] + [
      f"{name} {show(value)}" if len(kept) > 1 else show(value) for _, name, value in found]
    wide = 12 + 6.9 * max(map(len, rows))
    edge = x(step) + 8 if x(step) + 8 + wide < WIDTH else x(step) - 8 - wide
    box = tag("rect", x=f"{edge:.1f}", y=TOP, width=f"{wide:.1f}", height=8 + 15 * len(rows), rx=4,
              class_="box")
    words = [tag("text", row, x=f"{edge + 6:.1f}", y=TOP + 15 + 15 * i)
             for i, row in enumerate(rows)]
    dots = [tag("circle", cx=f"{x(step):.1f}", cy=f"{y(value):.1f}", r=3.5,
                class_=f"dot c{number % COLOURS}") for number, _, value in found]
    rule = tag("line", x1=f"{x(step):.1f}", x2=f"{x(step):.1f}", y1=TOP, y2=HEIGHT - BOTTOM,
               class_="rule")
    band = tag("rect", x=f"{start:.1f}", y=0, width=f"{max(end - start, 0.5):.1f}", height=HEIGHT,
               class_="band")
    tips.append(tag("g", band, tag("g", rule, dots, box, words, class_="tip"), class_="point"))
  return tips


def bars(title: str, values: Mapping[str, float], *, note: str = "",
         show: Callable[[float], str] = figure) -> Html:
  """A horizontal bar a name, from 0, with its value behind it.

  Args:
    title: stands above it.
    values: name to a value that is not negative.
    note: a few words behind the title.
    show: a value as text.
  """
  most, left, right = max(values.values(), default=0) or 1, 170, 64
  parts = []
  for number, (name, value) in enumerate(values.items()):
    top, wide = number * BAR, value / most * (WIDTH - left - right)
    parts += [tag("text", name, x=left - 8, y=top + 13, class_="end"),
              tag("rect", x=left, y=top + 3, width=f"{wide:.1f}", height=BAR - 5, class_="dot c0"),
              tag("text", show(value), x=f"{left + wide + 6:.1f}", y=top + 13)]
  caption = tag("figcaption", tag("b", title), f" {note}" if note else "")
  return tag("figure", caption, tag("svg", parts, viewBox=f"0 0 {WIDTH} {BAR * len(values)}",
                                    role="img", aria_label=title))


def stack(parts: Mapping[str, float], classes: Mapping[str, str]) -> Html:
  """Shares of a whole as one bar with its legend; `classes` names the colour of each part."""
  total = sum(parts.values()) or 1
  bar = [tag("span", class_=classes[name], style=f"flex:{max(value, 0) / total:.5f}",
             title=f"{name}: {figure(round(value, 1))}") for name, value in parts.items() if value]
  legend = [tag("span", tag("i", class_=classes[name]), f"{name} ",
                tag("b", f"{100 * value / total:.1f}%"), f" ({figure(round(value, 1))})")
            for name, value in parts.items()]
  return Html(tag("div", bar, class_="stack") + tag("div", legend, class_="legend"))


def interval(value: float, low: float, high: float, muted: bool = False) -> Html:
  """A value in [0, 1] with its interval, as a dot on a line."""
  x = lambda share: f"{4 + 112 * min(max(share, 0), 1):.1f}"
  return tag("svg", tag("line", x1=4, x2=116, y1=8, y2=8, class_="grid"),
             tag("line", x1=x(low), x2=x(high), y1=8, y2=8, class_="span"),
             tag("circle", cx=x(value), cy=8, r=4, class_="dot c1" if muted else "dot c0"),
             viewBox="0 0 120 16", class_="interval", role="img",
             aria_label=f"{value:.4g} between {low:.4g} and {high:.4g}")
