"""What `vlm-jax predict` is asked: prompts with pictures, from the files that benchmarks come in.

- *.jsonl: lines of {"id", "prompt", "image"}, where "image" may be missing or a list; POPE's and
  LLaVA's question files {"question_id", "text", "image"} are the same under other names
- *.jsonl: lines of {"messages"} as OpenAI's API writes them or of LLaVA's {"conversations"}, in the
  forms that training reads (`data/turns.py`); what stands behind the last question is not shown.
  An "id" may be missing: the line's number is one
- *.json: a list of any of these, VQA v2's {"questions": [{"question_id", "image_id", "question"}]},
  or a COCO caption file's {"images": [{"id", "file_name"}]}
- *.tsv: MMBench's table of index, question, image (base64), A, B, C, D; options are listed
"""

import base64
import binascii
import csv
import dataclasses
import io
import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_jax.core.document import Image, Text, Video
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.data import files, turns
from vlm_jax.data import images as image_files
from vlm_jax.data.bad import BadExample
from vlm_jax.data.sources import Parts
from vlm_jax.evals.kinds.choice import INSTRUCTION
from vlm_jax.evals.predictions import read, read_text

VQA_IMAGE = "COCO_val2014_{:012d}.jpg"
CONVERSATIONS = ("messages", "conversations")


@dataclasses.dataclass(frozen=True)
class Request:
  """One prompt.

  Attributes:
    key: names it; unique in a file.
    prompt: what is asked, "" for a bare caption; of a conversation its last question.
    images: files, or encoded pictures.
    turns: of a conversation of several turns all of them, the question last; the images in it are
      empty places for `images`, in order.
  """

  key: str
  prompt: str
  images: tuple[Path | bytes, ...]
  turns: Parts = ()

  def pictures(self) -> list[bytes]:
    """The encoded pictures; BadExample("missing_file") when one is not there."""
    return [image if isinstance(image, bytes) else image_files.read(str(image))
            for image in self.images]


def read_requests(path: str | Path, *, images: str | Path | None = None, prompt: str = ""
                  ) -> list[Request]:
  """Reads a file of any of the forms above.

  Args:
    path: the file.
    images: the folder of its pictures, or a pattern with a number in it for VQA v2
      ("val2014/COCO_val2014_{:012d}.jpg"); None: the folder of the file.
    prompt: asked where the file has no question.

  Raises:
    DataError: the file is missing, of no known form, empty, or has a key twice.
    UsageError: an image pattern that is none.
  """
  path = Path(path)
  if path.suffix == ".tsv":
    found = [_of_table(row, number, path) for number, row in enumerate(table(path), 2)]
  elif path.suffix == ".json":
    found = list(_of_json(path, images, prompt))
  else:
    found = [_of_line(row, number, path, images, prompt)
             for number, row in enumerate(read(path), 1)]
  seen: set[str] = set()
  for request in found:
    if request.key in seen:
      raise DataError(f"{path} has the id '{request.key}' twice; ids must differ")
    seen.add(request.key)
  if not found:
    raise DataError(f"{path} asks nothing; name another file")
  return found


def table(path: Path) -> list[dict[str, str]]:
  """The rows of a tab-separated table with a header (MMBench's form)."""
  csv.field_size_limit(1 << 30)  # pictures are cells
  return list(csv.DictReader(io.StringIO(read_text(path)), delimiter="\t"))


def options_of(row: dict[str, str]) -> dict[str, str]:
  """Letter to option of a table's row; letters without an option are left out."""
  return {letter: row[letter] for letter in string.ascii_uppercase
          if row.get(letter) and row[letter].strip() not in ("", "nan")}


def _of_line(row: dict[str, Any], number: int, path: Path, images: str | Path | None, prompt: str
             ) -> Request:
  key = next((row[name] for name in ("id", "question_id", "key") if name in row), None)
  if any(name in row for name in CONVERSATIONS):
    try:
      return _of_turns(row, str(number if key is None else key),
                       Path(images) if images else path.parent)
    except BadExample as error:
      raise DataError(f"{path} record {number}: {error}; mend or remove it") from error
  asked = row.get("prompt", row.get("text", row.get("question", prompt)))
  shown = row.get("image") or []
  shown = [shown] if isinstance(shown, str) else shown
  if key is None or not isinstance(asked, str) or not all(isinstance(one, str) for one in shown):
    raise DataError(f"{path} line {number} must have an 'id' and a 'prompt', and may have an "
                    "'image' (a file name or a list of them), or have 'messages'; mend or remove it"
                    )
  if not asked.strip() and not shown:
    raise DataError(f"{path} line {number} asks nothing and shows nothing; give it a 'prompt'")
  folder = Path(images) if images else path.parent
  return Request(str(key), asked, tuple(folder / one for one in shown))


def _of_turns(row: dict[str, Any], key: str, folder: Path) -> Request:
  """A conversation up to its last question; a single question is a prompt like any other."""
  parts = list(turns.documents(row, CONVERSATIONS)[0])
  while parts and isinstance(parts[-1], Text) and parts[-1].role == "assistant":
    parts.pop()
  texts = [part for part in parts if isinstance(part, Text)]
  if not texts or texts[-1].role != "user" or not texts[-1].text:
    raise BadExample("wrong_record", "its last turn but an answer must be a user's question")
  first = max(index for index, part in enumerate(parts)
              if isinstance(part, Text) and not part.continues)
  if any(isinstance(part, Video) for part in parts):
    raise BadExample("wrong_record", "it shows a video, which no request can; ask Bundle.chat")
  images = tuple(_named(str(part.data), folder) for part in parts if isinstance(part, Image))
  written = lambda some: "".join(turns.MARK if isinstance(part, Image) else part.text
                                 for part in some)
  if sum(not part.continues for part in texts) == 1:
    return Request(key, written(parts), images)
  blank = tuple(Image("") if isinstance(part, Image) else part for part in parts)
  return Request(key, written(parts[first:]), images, blank)


def _named(data: str, folder: Path) -> Path | bytes:
  """An image of a record: a file below the folder, or the bytes of a data: URL."""
  if data.startswith("data:") or files.URL.match(data):
    return files.ImageFolder(str(folder)).read(data)
  return folder / data


def _of_json(path: Path, images: str | Path | None, prompt: str) -> Iterator[Request]:
  try:
    whole = json.loads(read_text(path))
    if isinstance(whole, list):
      if not all(isinstance(row, dict) for row in whole):
        raise TypeError("an entry of the list is no object")
      yield from (_of_line(row, number, path, images, prompt)
                  for number, row in enumerate(whole, 1))
      return
    if "questions" in whole:
      for row in whole["questions"]:
        shown = _picture(images or path.parent / VQA_IMAGE, int(row["image_id"]))
        if not isinstance(row["question"], str):
          raise TypeError(f"question {row['question_id']} has no text")
        yield Request(str(row["question_id"]), row["question"], (shown,))
      return
    folder = Path(images) if images else path.parent
    for row in whole["images"]:
      yield Request(str(row["id"]), prompt, (folder / row["file_name"],))
  except (ValueError, KeyError, TypeError) as error:
    raise DataError(f"{path} is neither a list, a VQA v2 question file nor a COCO caption file "
                    f"({error!r}); see `vlm-jax predict --help`") from error


def _picture(pattern: str | Path, number: int) -> Path:
  text = str(pattern if "{" in str(pattern) else Path(pattern) / VQA_IMAGE)
  try:
    return Path(text.format(number))
  except (ValueError, IndexError, KeyError) as error:
    raise UsageError(f"--images {pattern} is no pattern for a number; write it as {VQA_IMAGE}"
                     ) from error


def _of_table(row: dict[str, str], number: int, path: Path) -> Request:
  try:
    image = base64.b64decode(row["image"], validate=True)
    lines = [row["question"]]
    if row.get("hint") and row["hint"] != "nan":
      lines.insert(0, row["hint"])
    options = options_of(row)
    lines += [f"{letter}. {option}" for letter, option in options.items()]
    lines += [INSTRUCTION] if options else []
    return Request(row["index"], "\n".join(lines), (image,))
  except (KeyError, TypeError, binascii.Error) as error:
    raise DataError(f"{path} line {number} must have the columns index, question and image "
                    f"(base64) ({error!r}); mend the table") from error
