"""`python -m vlm_jax.data.toy [FOLDER]`: forty records in LLaVA's form, to try one's hand on.

Writes `my.json` and `images/`, a square of one colour each.
"""

import json
import os
import sys

from PIL import Image

COLOURS = ("red", "green", "blue", "black")
RECORDS = 40


def write(folder: str) -> None:
  """Writes the files below `folder`; stops when there is a `my.json` already, or no such folder."""
  path = os.path.join(folder, "my.json")
  if os.path.exists(path):
    sys.exit(f"{path} exists; move it away or name another folder")
  try:
    os.makedirs(os.path.join(folder, "images"), exist_ok=True)
  except OSError as error:
    sys.exit(f"{folder} cannot be written ({error.strerror}); name another folder")
  records = []
  for number in range(RECORDS):
    colour, name = COLOURS[number % len(COLOURS)], f"{number}.jpg"
    Image.new("RGB", (64, 64), colour).save(os.path.join(folder, "images", name))
    records.append({"id": str(number), "image": name, "conversations": [
      {"from": "human", "value": "<image>\nwhat colour is it?"}, {"from": "gpt", "value": colour}]})
  with open(path, "x", encoding="utf-8") as file:
    json.dump(records, file, indent=1)


def main(argv: list[str]) -> None:
  """Writes below the one folder named, by default this one."""
  if len(argv) > 1 or argv and argv[0].startswith("-"):
    sys.exit(__doc__)
  write(argv[0] if argv else ".")


if __name__ == "__main__":
  main(sys.argv[1:])
