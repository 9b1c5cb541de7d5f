"""VQA accuracy as the official evaluation computes it (VQA v2, arXiv:1612.00837, visualqa.org).

The rules have quirks that published numbers depend on; they are kept:
- answers are normalised only when the annotators do not all agree;
- one "digit,digit" anywhere in the text makes every punctuation mark vanish instead of becoming a
  space;
- the period rule was meant to spare decimals by a look-behind that never fires, so "5." and ".x"
  lose the period and "x.5" keeps it; only the first 32 matches are removed;
- words are lower-cased before the contraction table is read, so its "Im" and "Ive" never match;
- "none" is the number 0.
"""

import functools
import re
from collections.abc import Sequence

PUNCTUATION = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@",
               "`", ",", "?", "!")
ARTICLES = frozenset(("a", "an", "the"))
NUMBERS = {
  word: str(number)
  for number, word in enumerate(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
  )
} | {"none": "0"}

_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32

# The table maps a spelling in which exactly one apostrophe was forgotten to the right one.
_CONTRACTED = """
  ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
  haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
  might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
  shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
  someone's something'd something'd've something'll that's there'd there'd've there're there's
  they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
  what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
  won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()


def _forget_one(word: str) -> list[str]:
  """Every spelling of `word` with one of its apostrophes left out."""
  return [word[:at] + word[at + 1 :] for at, letter in enumerate(word) if letter == "'"]


# "somebody'd" loses its apostrophe in the original table; every other entry gains one.
CONTRACTIONS = {wrong: word for word in _CONTRACTED for wrong in _forget_one(word)} | {
  "somebody'd": "somebodyd"
}


def strip_punctuation(text: str) -> str:
  """Removes punctuation next to a space, turns other punctuation into spaces, drops periods."""
  out = text
  comma = _COMMA.search(text) is not None
  for mark in PUNCTUATION:
    gone = comma or f"{mark} " in text or f" {mark}" in text
    out = out.replace(mark, "" if gone else " ")
  return _PERIOD.sub("", out, count=_MAX_PERIODS)


def digits_and_articles(text: str) -> str:
  """Lower-cases, writes number words as digits, drops articles, mends contractions."""
  words = [NUMBERS.get(word, word) for word in text.lower().split()]
  return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def tidy(text: str) -> str:
  """White space as the official evaluation reads it: one line, no margins."""
  return text.replace("\n", " ").replace("\t", " ").strip()


@functools.lru_cache(maxsize=4096)  # answers repeat
def normalise(text: str) -> str:
  """The normal form in which two answers are compared."""
  return digits_and_articles(strip_punctuation(tidy(text)))


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
  """The share of the truth that a prediction earns.

  Args:
    prediction: what the model said.
    answers: what annotators said; ten in VQA v2. One answer (datasets with a single truth) is
      compared in normal form.

  Returns:
    The mean over annotators of min(1, matches among the others / 3), in [0, 1].

  Raises:
    ValueError: no answers.
  """
  if not answers:
    raise ValueError("vqa_accuracy: a question needs at least one answer")
  if len(answers) == 1:
    return float(normalise(prediction) == normalise(answers[0]))
  prediction, answers = tidy(prediction), [tidy(answer) for answer in answers]
  if len(set(answers)) > 1:
    prediction, answers = normalise(prediction), [normalise(answer) for answer in answers]
  matches = [answer == prediction for answer in answers]
  scores = [min(1.0, (sum(matches) - match) / 3) for match in matches]
  return sum(scores) / len(scores)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
  """1.0 when the prediction is one of the answers but for surrounding white space."""
  return float(tidy(prediction) in {tidy(answer) for answer in answers})
