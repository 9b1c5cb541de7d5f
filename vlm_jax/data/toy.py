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
  """Writes the files below `folder`; stops when there is a `my.json` already."""
  path = os.path.join(folder, "my.json")
  if os.path.exists(path):
    sys.exit(f"{path} exists; move it away or name another folder")
  os.makedirs(os.path.join(folder, "images"), exist_ok=True)
  records = []
  for number in range(RECORDS):
    colour, name = COLOURS[number % len(COLOURS)], f"{number}.jpg"
    Image.new("RGB", (64, 64), colour).save(os.path.join(folder, "images", name))
    records.append({"id": str(number), "image": name, "conversations": [
      {"from": "human", "value": "<image>\nwhat colour is it?"}, {"from": "gpt", "value": colour}]})
  with open(path, "x", encoding="utf-8") as file:
    json.dump(records, file, indent=1)


if __name__ == "__main__":
  write(sys.argv[1] if len(sys.argv) > 1 else ".")
