"""Caption words as the COCO caption evaluation counts them (Penn Treebank conventions).

The COCO evaluation lower-cases captions, splits them with a Java program (Stanford's PTBTokenizer
of CoreNLP 3.4.1) and drops punctuation. The rules here were found by asking that program; on
English captions the words are the same, which a test asserts where Java is. Known differences:
telephone numbers and HTML tags with spaces are one word there and several here, file names and
paths of many parts are cut elsewhere, a single letter loses its period there before a sentence that
starts with a word like "The", and scripts that need combining marks are not treated.
"""

import functools
import re

NAME = "ptb"

# Characters that the program rewrites before it splits; "" and " " take them away.
_REWRITE = str.maketrans({
  "’": "'", "‘": "`", "“": '"', "”": '"', "«": '"', "»": '"', "…": " ", "–": "--", "—": "--",
  "―": "--", "‒": "--", "£": "#", "€": "$", "¤": "$", "¢": " cents ", "½": " 1/2 ", "¼": " 1/4 ",
  "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 ", "\u00ad": "", "\u200b": " ", "\u200d": " ",
  "\ufe0f": "", "₹": " ",
})
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&nbsp;": " "}
_ENTITY = re.compile("|".join(_ENTITIES))
_ASTRAL = re.compile("[\U00010000-\U0010ffff]")  # emoji vanish

# Words that keep their period: in any case, only capitalised, only before a number.
_ABBREVIATIONS = """
  adj adm adv al ala alex apr ariz assn assoc asst aug ave bhd bldg blvd brig bros calif capt cf
  cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext
  feb fla fri ft ga gen gov govs hon inc ind insp intl jan jos jr jul jun kan kans ky lieut lt ltd
  maj mar md messrs mfg mich minn mlle mme mo mon mont mr mrs ms msgr mt mtg natl neb nev nov oct
  okla penn pfc ph plc prof pte pty pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr
  st ste supt sys tel tenn thu thurs tue tues univ va vs vt wed wis wm wyo
""".split()
_CAPITALISED = "Ark Del Ill La Mass Miss Ore Pa Tex Wash".split()
_NUMBERED = "art ca fig no nos op pp prop".split()

_LETTER = r"[^\W\d_²³¹ªº⅐-⅞]"
_WORD = r"[^\W_²³¹ªº⅐-⅞]"
_NOT = rf"(?:(?!n't(?!{_WORD})){_WORD})"  # a letter of a word, up to "n't"
_any = lambda words: "|".join(words)
# The longest match wins; of equally long ones the first.
_RULES = [re.compile(rule, re.IGNORECASE) for rule in (
  rf"{_NOT}+",
  rf"{_NOT}+(?:[-_]{_NOT}+)+",
  rf"{_NOT}+(?:/{_NOT}+){{1,2}}",
  rf"{_LETTER}+(?:-{_LETTER}+){{0,2}}/{_LETTER}+(?:[-/]{_LETTER}+){{0,2}}",
  r"\d+-\d+/\d+|-{5,}",
  rf"{_WORD}(?:{_WORD}|[.,])*(?:-(?:{_NOT}+|{_LETTER}(?:\.{_LETTER})+\.))+",
  r"[-+]?\d*(?:[.:,]\d+)+|[-+]?\d+",
  rf"{_LETTER}+(?:[.!?]{_LETTER}+)+",
  rf"(?:{_LETTER}|ph)(?:\.{_LETTER})*\.(?!{_LETTER})",
  rf"(?:{_any(_ABBREVIATIONS)})\.",
  rf"(?:{_any(_NUMBERED)})\.(?=\d)",
  rf"(?:[dlon]'(?={_LETTER}{{2}}))?{_NOT}+(?:[-_]{_NOT}+)*\.(?=[,;:])",
  rf"n't(?!{_WORD})|'(?:s|m|d|re|ve|ll)(?!{_WORD})",
  rf"[dlon]'{_LETTER}{{2,}}|(?:qu|ma)'(?:{_LETTER}{{2,}}|a)|[dljy]'(?={_LETTER})|ol'(?!{_WORD})",
  rf"'n'|'n(?!{_WORD}|\.{_WORD})|'(?:em|till?|cause)(?!{_WORD})|'t(?=(?:is|was)(?!{_WORD}))",
  rf"'\d\ds(?!{_WORD})|'\d\d$",
  rf"can(?=not(?!{_WORD}))|(?:gon|wan)(?=na(?!{_WORD}))|got(?=ta(?!{_WORD}))",
  rf"(?:gim|lem)(?=me(?!{_WORD}))",
  r"c\+\+|[cf]#|#[a-z]+|@[a-z_]\w*|(?:us|hk|nz|[ac])\$",
  r"[^\W_][\w.]*@\w+(?:\.\w+)*|https?://[^\s()<>\"]*[^\s.,!?)\"'<>]|</?[a-z][^<>\s]*>",
  r"[!?]+|---?-?|''|``|\*+|_+|@+|#+|<<|>>",
  rf"[:=;][-']?[()|\[\]{{}}dp](?!{_WORD})",
)]
_EXACT = [re.compile(rule) for rule in (
  rf"(?:{_any(_CAPITALISED)})\.",
  r"[A-Z]+(?:&[A-Z]+)+(?:\.(?=[,;:]))?",
)]
_SPLIT_WORD = re.compile(r"(can)(not)|(gon|wan)(na)|(got)(ta)|(gim|lem)(me)", re.IGNORECASE)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_ROUND = {"(": "-lrb-", ")": "-rrb-"}
_DROPPED = frozenset(("--", "---", "----", "''", "``", *"'\"`.?!,:;-"))


def tokenize(caption: str) -> list[str]:
  """The words of a caption, lower-cased, without punctuation.

  Args:
    caption: any text; line breaks are spaces.

  Returns:
    Words. Brackets are words ("-lrb-"), and so are runs like "!!": the original keeps both.
  """
  text = _ENTITY.sub(lambda match: _ENTITIES[match[0]], caption)
  chunks = _ASTRAL.sub(" ", text.translate(_REWRITE)).split()
  words: list[str] = []
  for index, chunk in enumerate(chunks):
    after = chunks[index + 1] if index + 1 < len(chunks) else ""
    words += _chunk(chunk, after[:1].isdigit())
  return words


@functools.lru_cache(maxsize=1 << 16)  # words repeat
def _chunk(chunk: str, before_number: bool) -> tuple[str, ...]:
  """The words of text without white space; `before_number`: the next chunk is a number."""
  if before_number and chunk.lower().removesuffix(".") in _NUMBERED:
    return (chunk.lower(),)
  words, at = [], 0
  while at < len(chunk):
    word = _longest(chunk, at)
    at += len(word)
    if word not in _DROPPED:
      words.append(_written(word))
  return tuple(words)


def _longest(chunk: str, at: int) -> str:
  """The longest token that starts at a place; a single character when no rule fits."""
  best = chunk[at]
  split = _SPLIT_WORD.match(chunk, at)
  for rule in (*_RULES, *_EXACT):
    match = rule.match(chunk, at)
    if match and len(match[0]) > len(best):
      best = match[0]
  if split and split[0] == best:
    return next(part for part in split.groups() if part)
  return best


def _written(word: str) -> str:
  """How a token is spelled in the end."""
  if word in _BRACKETS:
    return _BRACKETS[word]
  return "".join(_ROUND.get(letter, letter) for letter in word.lower())
