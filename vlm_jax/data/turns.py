"""The ways people write a conversation, a page or a caption, as parts. One place for all formats.

A record is a dict with one of these fields; which ones a format allows stands in its file.

    conversations  [{"from": "human", "value": "<image> what is it?"}, {"from": "gpt", ...}]
    messages       [{"role": "user", "content": "text" or [{"type": "text"}, {"type": "image"}]}]
    texts          [{"user": "what is it?", "assistant": "a cat"}]
    content        a page: [{"type": "text", "text": "..."}, {"type": "image", "image": "1.png"}]
    captions       ["a cat", "a small cat"], one document each; also {"text": [...]}
    caption, text  "a cat"

and with "image" or "images": file names below image_root, data: URLs, bytes, or {"bytes", "path"}.
A `<image>` in the text of such a record says where the next of them stands; with no mark at all
they stand before the first turn. What was written with an image in its middle stays one turn.

A video is a part of messages and pages, its frames named as images are, in the order of time:

    {"type": "video", "video": ["1.png", "2.png", "3.png"]}
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vlm_jax.core.document import Image, Text, Video, Visual
from vlm_jax.data.bad import BadExample
from vlm_jax.data.sources import Parts

MARK = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "model": "assistant", "system": "system"}
Items = Iterable[str | Visual]


def documents(record: dict[str, Any], fields: Sequence[str]) -> list[Parts]:
  """The documents of a record that is written in one of the ways `fields`.

  Raises:
    BadExample: "wrong_record", "image_count", "unknown_role".
  """
  for field in fields:
    if record.get(field) is not None:
      supply = _Supply(record)
      written = WAYS[field](record[field], supply)
      return [supply.settle(parts) for parts in written]
  raise BadExample("wrong_record", f"it has none of {', '.join(fields)}, but "
                   f"{', '.join(map(str, list(record)[:12]))}")


def say(items: Items, role: str, loss: bool) -> Parts:
  """One turn: texts joined by a line break, those behind an image continuing the text before it."""
  parts: list[Text | Visual] = []
  joined = False
  for item in items:
    if isinstance(item, Visual):
      parts.append(item)
      joined = False
    elif item.strip():
      if joined:
        last = parts.pop()
        item, continues = f"{last.text}\n{item.strip()}", last.continues
      else:
        continues = any(isinstance(part, Text) for part in parts)
      parts.append(Text(item.strip(), role, loss, continues=continues))
      joined = True
  return tuple(parts) or (Text("", role, loss),)  # which the template counts as empty


def image(value: Any) -> Image:
  """An image as a record names it: bytes, str, or {"bytes", "path"} as in parquet."""
  if isinstance(value, dict):
    value = value.get("bytes") or value.get("path")
  if not isinstance(value, str | bytes) or not value:
    raise BadExample("wrong_record", f"an image is {type(value).__name__}, not a name or bytes")
  return Image(value)


def video(value: Any) -> Video:
  """A video as a record names it, the list of its frames; no file of a whole film is decoded.

  Raises:
    BadExample: "wrong_record", it is no such list, or as `image` of a frame.
  """
  if not isinstance(value, list | tuple) or not value:
    kind = "empty" if isinstance(value, list | tuple) else type(value).__name__
    raise BadExample("wrong_record", f"a video is {kind}, not a list of frames; write its frames "
                     "to files and name those")
  return Video(tuple(map(image, value)))


class _Supply:
  """The images of a record, handed out in order."""

  def __init__(self, record: dict[str, Any]):
    values = record.get("image") if record.get("images") is None else record["images"]
    values = values if isinstance(values, list | tuple) else [values]
    self._images = [image(value) for value in values if value is not None]
    self._used = 0

  def __bool__(self) -> bool:
    return bool(self._images)

  def next(self) -> Image:
    """The next image; BadExample when there is none."""
    self._used += 1
    if self._used > len(self._images):
      raise BadExample("image_count", f"{self._used} or more {MARK}, {len(self._images)} images")
    return self._images[self._used - 1]

  def split(self, text: Any) -> list[str | Visual]:
    """A text cut at its marks, the images in their place."""
    first, *rest = _string(text).split(MARK)
    return [first, *(item for piece in rest for item in (self.next(), piece))]

  def settle(self, parts: Parts) -> Parts:
    """The document, with images that nothing marked before its first turn."""
    if self._used and self._used != len(self._images):
      raise BadExample("image_count", f"{self._used} {MARK}, {len(self._images)} images")
    if self._used or not self._images:
      return parts
    system = 1 if isinstance(parts[0], Text) and parts[0].role == "system" else 0
    return (*parts[:system], *self._images, *parts[system:])


def _string(value: Any) -> str:
  if isinstance(value, bytes):
    value = value.decode("utf-8", "replace")
  if not isinstance(value, str):
    raise BadExample("wrong_record", f"a text is {type(value).__name__}")
  return value


def _list(value: Any, field: str) -> list[dict[str, Any]]:
  if not isinstance(value, list | tuple) or not all(isinstance(one, dict) for one in value):
    raise BadExample("wrong_record", f"{field} is not a list of objects")
  if not value:
    raise BadExample("wrong_record", f"{field} is empty")
  return list(value)


def _turn(role: Any, items: Items) -> Parts:
  if role not in ROLES:
    raise BadExample("unknown_role", f"'{role}'")
  return say(items, ROLES[role], ROLES[role] == "assistant")


def _conversations(value: Any, supply: _Supply) -> list[Parts]:
  turns = [_turn(one.get("from"), supply.split(one.get("value")))
           for one in _list(value, "conversations")]
  return [tuple(part for turn in turns for part in turn)]


def _messages(value: Any, supply: _Supply) -> list[Parts]:
  turns = [_turn(one.get("role"), _content(one.get("content"), supply))
           for one in _list(value, "messages")]
  return [tuple(part for turn in turns for part in turn)]


def _texts(value: Any, supply: _Supply) -> list[Parts]:
  turns = [_turn(role, supply.split(one.get(role)))
           for one in _list(value, "texts") for role in ("user", "assistant")]
  return [tuple(part for turn in turns for part in turn)]


def _page(value: Any, supply: _Supply) -> list[Parts]:
  return [say(_content(value, supply), "text", loss=True)]


def _caption(value: Any, supply: _Supply) -> list[Parts]:
  return [say(supply.split(value) if supply else [_string(value)], "text", loss=True)]


def _captions(value: Any, supply: _Supply) -> list[Parts]:
  value = value.get("text") if isinstance(value, dict) else value
  if not isinstance(value, list | tuple) or not value:
    raise BadExample("wrong_record", "captions is not a list of texts")
  return [say([_string(one)], "text", loss=True) for one in value]


def _content(value: Any, supply: _Supply) -> list[str | Visual]:
  """The items of OpenAI-style content: a text, or a list of text, image and video parts."""
  if not isinstance(value, list | tuple):
    return supply.split(value) if supply else [_string(value)]
  items: list[str | Visual] = []
  for part in _list(value, "content"):
    kind = part.get("type")
    if kind == "text":
      items.append(_string(part.get("text")))
    elif kind == "image_url":
      url = part.get("image_url")
      items.append(image(url.get("url") if isinstance(url, dict) else url))
    elif kind == "image":
      own = next((part[name] for name in ("image", "path", "bytes") if part.get(name)), None)
      items.append(supply.next() if own is None else image(own))
    elif kind == "video":
      items.append(video(part.get("video")))
    else:
      raise BadExample("wrong_record", f"a content part of type '{kind}'")
  return items


WAYS: dict[str, Callable[[Any, _Supply], list[Parts]]] = {
  "conversations": _conversations, "messages": _messages, "texts": _texts, "content": _page,
  "captions": _captions, "caption": _caption, "text": _caption,
}
