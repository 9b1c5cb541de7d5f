"""Markup as values: whatever is not `Html` already is escaped on its way in, always."""

import base64
import html
import io
from collections.abc import Iterable
from typing import Any

from PIL import Image

VOID = ("img", "meta", "link", "br")


class Html(str):
  """Text that is markup. Only this module makes it, from escaped pieces."""


def escape(value: Any) -> Html:
  """Anything as markup: `Html` as it is, an iterable of children joined, all else escaped."""
  if value is None:
    return Html("")
  if isinstance(value, Html):
    return value
  if isinstance(value, Iterable) and not isinstance(value, str | bytes | dict):
    return Html("".join(escape(child) for child in value))
  return Html(html.escape(str(value)))


def tag(element: str, *children: Any, **attributes: Any) -> Html:
  """One element. `class_` is class, other underscores are hyphens; None and False leave one out."""
  text = "".join(
    f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
    for name, value in attributes.items() if value is not None and value is not False)
  if element in VOID:
    return Html(f"<{element}{text}>")
  return Html(f"<{element}{text}>{escape(children)}</{element}>")


def table(head: list[Any], rows: Iterable[list[Any]], numbers: Iterable[int] = ()) -> Html:
  """A table that scrolls by itself on narrow screens; columns of `numbers` are set to the right."""
  right = set(numbers)
  cell = lambda kind, index, value: tag(kind, value, class_="n" if index in right else None)
  line = lambda kind, row: tag("tr", [cell(kind, i, value) for i, value in enumerate(row)])
  body = tag("tbody", [line("td", row) for row in rows])
  return tag("div", tag("table", tag("thead", line("th", head)) if head else None, body),
             class_="scroll")


def picture(image: Image.Image, alt: str, **attributes: Any) -> Html:
  """A picture inside the page, as PNG."""
  buffer = io.BytesIO()
  image.save(buffer, format="PNG", optimize=True)
  data = base64.b64encode(buffer.getvalue()).decode()
  return tag("img", src=f"data:image/png;base64,{data}", alt=alt, width=image.width,
             height=image.height, **attributes)


def figure(value: Any) -> str:
  """A number for people: 1,234, 0.9943, 2.3e-05; anything else as it is."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return str(value)
  if isinstance(value, int) or float(value).is_integer() and abs(value) < 1e15:
    return f"{int(value):,}"
  if abs(value) >= 1000:
    return f"{value:,.0f}"
  return f"{value:.4g}"
