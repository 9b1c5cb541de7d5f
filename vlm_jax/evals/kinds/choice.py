"""Multiple choice, by the likelihood of the options.

A document of choices is a fan-out document: every branch ends with an option as the assistant's
text, or a caption, and the right option is the one that carries loss. What every option answers,
image and question, stands in the trunk, or the question in each branch when the model learned it
that way. All options are scored in one forward pass; each sees the trunk and itself, and the trunk
none of them.

    option "text"     the options' own words are scored
    option "letters"  the options are listed in the question and their letters are scored, once for
                      every rotation of the list: CircularEval (MMBench, arXiv:2307.06281) counts a
                      question only when every rotation is right

An option is scored with the end of its turn, so it is the probability that the model says exactly
that. A strategy without branches is given every option in a row of its own. One that only compares
pictures with texts (CLIP, BLIP-2's first stage) picks the text that belongs to the picture best.
"""

import dataclasses
import re
import string
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core.document import Document, Encoded, Text
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.typing import Params
from vlm_jax.data import template
from vlm_jax.evals import pairs
from vlm_jax.evals.likelihood import of_branches
from vlm_jax.evals.questions import branches
from vlm_jax.evals.reading import Split, check, mean_score, with_controls

MAIN, UNIT = "accuracy", "questions"
ASKS = ("speakers", "embedders")
OPTIONS = ("text", "letters")
INSTRUCTION = "Answer with the option's letter from the given choices directly."


@dataclasses.dataclass(frozen=True)
class Choice:
  """A question with its options.

  Attributes:
    key: of its document.
    question: the text asked.
    options: what can be answered; where every branch asks for itself, question and answer.
    right: the number of the right option.
  """

  key: str
  question: str
  options: tuple[str, ...]
  right: int


def read(document: Document) -> Choice:
  """The choice that a document poses.

  Raises:
    UsageError: its branches are not options of which exactly one carries loss.
  """
  ends = [parts[-1] for parts in branches(document).values()]
  right = [number for number, end in enumerate(ends) if end.loss]
  if len(ends) < 2 or len(right) != 1 or not {end.role for end in ends} <= {"assistant", "text"}:
    raise UsageError(
      f"document {document.key} is no choice: each branch must end with an option, and exactly one "
      "option must carry loss; set the evaluation's form to one that writes choices")
  users = [part.text for part in document.parts
           if isinstance(part, Text) and part.role == "user" and part.branch < 2]
  options = [end.text for end in ends]
  if len(set(options)) < len(options):  # "lion?" "yes", "taxi?" "yes"
    options = [" ".join(part.text for part in parts) for parts in branches(document).values()]
    users = []
  return Choice(document.key, users[-1] if users else "", tuple(options), right[0])


def rotate(document: Document, choice: Choice, shift: int) -> Document:
  """The document with its options listed from option `shift` on, and letters for answers.

  The option of branch k stands at place k - shift of the list, and its letter is the answer.

  Raises:
    UsageError: more options than letters, or no one question that they answer.
  """
  count, letters = len(choice.options), string.ascii_uppercase
  if count > len(letters):
    raise UsageError(f"document {choice.key} has {count} options, more than there are letters; set "
                     "the evaluation's options to 'text'")
  listed = [choice.options[(place + shift) % count] for place in range(count)]
  if not choice.question:
    raise UsageError(f"document {choice.key} asks no one question that letters could answer; set "
                     "the evaluation's options to 'text'")
  lines = [choice.question, *(f"{letter}. {option}" for letter, option in
                              zip(letters[:count], listed, strict=True)), INSTRUCTION]
  ends = {id(parts[-1]): (number - shift) % count
          for number, parts in enumerate(branches(document).values())}

  def change(part: Any) -> Any:
    if id(part) in ends:
      return dataclasses.replace(part, text=letters[ends[id(part)]])
    if isinstance(part, Text) and part.role == "user" and part.text == choice.question:
      return dataclasses.replace(part, text="\n".join(lines))
    return part

  return dataclasses.replace(document, parts=tuple(change(part) for part in document.parts))


def run(config: ConfigDict, params: Params, entry: ConfigDict, split: str
        ) -> tuple[dict[str, Any], dict[str, list[dict]]]:
  """Scores every choice as `entry.images` says, then with each control.

  Args:
    config: of the run.
    params: the parameters.
    entry: one of `config.evals`; `options` says what is scored.
    split: which split is read.

  Returns:
    The numbers {"accuracy", "low", "high", "accuracy_per_token", "chance", "questions", "bad",
    "seconds", "controls"}, with letters also "circular", "circular_low" and "circular_high";
    accuracy picks the option of the highest log p, accuracy_per_token that of the highest mean
    log p of a token; chance is what a blind guess gets. The predictions have {"key", "document",
    "question", "options", "answers", "prediction", "log_probs", "tokens", "score"} (of the list as
    it is written, rotation 0), "score_per_token", and with letters "circular". Of a strategy that
    only compares there is nothing per token, and "matches" in place of "log_probs".

  Raises:
    UsageError: a field of the entry that cannot be, or documents that are no choices.
    DataError: too many documents cannot be read, or there is no choice.
  """
  check(entry, "batch")
  if entry.options not in OPTIONS:
    raise UsageError(f"config.evals: options is '{entry.options}'; "
                     f"{nearest(entry.options, OPTIONS)}")
  if not find_fusion(config).STREAM:
    if entry.options == "letters":
      raise UsageError(f"config.evals: options is 'letters', but config.fusion.name "
                       f"'{config.fusion.name}' says nothing; set it to 'text'")
    if "none" in (entry.images, *entry.controls):
      raise UsageError(f"config.evals: config.fusion.name '{config.fusion.name}' chooses a text "
                       "for a picture, so images and controls cannot be 'none'; set "
                       "controls=('shuffled',)")

  def measure(images: str) -> tuple[dict[str, Any], list[dict], int]:
    rows, bad = decide(config, params, entry, split, images)
    return summary(rows, config.seed), rows, bad

  return with_controls(entry, measure)


def score(rows: list[dict], seed: int) -> dict[str, Any]:
  """Scores answers in words, of a model that was shown lettered options.

  Args:
    rows: {"document", "prediction", "options": {letter: option}, "answers": [letter]}; rows of one
      document are rotations of one question. Get "score".
    seed: of the bootstrap.

  Returns:
    {"accuracy", "low", "high", "chance", "circular", "circular_low", "circular_high",
    "questions"}: accuracy over rows, circular over questions of which every row must be right.

  Raises:
    UsageError: a row without options.
  """
  if not all("options" in row for row in rows):
    raise UsageError("choice needs the options of every question, which only an MMBench table "
                     "has; give one (*.tsv) as --references")
  whole: dict[str, float] = {}
  for row in rows:
    row["score"] = float(letter_of(row["prediction"], row["options"]) == row["answers"][0])
    whole[row["document"]] = min(whole.get(row["document"], 1.0), row["score"])
  accuracy, low, high = mean_score(rows, seed)
  questions = [{"document": key, "score": value} for key, value in whole.items()]
  circular, circular_low, circular_high = mean_score(questions, seed)
  return {"accuracy": accuracy, "low": low, "high": high,
          "chance": float(np.mean([1 / len(row["options"]) for row in rows])),
          "circular": circular, "circular_low": circular_low, "circular_high": circular_high,
          "questions": len(questions)}


def letter_of(answer: str, options: Mapping[str, str]) -> str:
  """The letter that an answer names: "B", "(b) two", or the text of an option; "" otherwise.

  A letter counts when it stands alone or before one of ").:", so "A dog" names no letter.
  """
  plain = lambda text: text.strip().rstrip(".").lower()
  for letter, option in options.items():
    if plain(option) == plain(answer):
      return letter
  found = re.match(r"\(?([A-Za-z])(?:[).:]|$)", answer.strip())
  return found[1].upper() if found and found[1].upper() in options else ""


def summary(rows: list[dict], seed: int) -> dict[str, Any]:
  """The numbers of rows that `decide` returned."""
  accuracy, low, high = mean_score(rows, seed)
  mean = lambda values: float(np.mean(list(values)))
  numbers = {"accuracy": accuracy, "low": low, "high": high,
             "chance": mean(1 / len(row["options"]) for row in rows), "questions": len(rows)}
  if "score_per_token" in rows[0]:
    numbers["accuracy_per_token"] = mean(row["score_per_token"] for row in rows)
  if "circular" in rows[0]:
    circular, low, high = mean_score(rows, seed, "circular")
    numbers |= {"circular": circular, "circular_low": low, "circular_high": high}
  return numbers


def decide(config: ConfigDict, params: Params, entry: ConfigDict, split: str, images: str
           ) -> tuple[list[dict], int]:
  """Scores the options of every choice: rows of predictions, and how many documents were bad."""
  opened = Split(config, entry, split, images)

  def encode(document: Document) -> tuple[Choice, list[Encoded]]:
    choice = read(document)
    shifts = len(choice.options) if entry.options == "letters" else 0
    asked = [rotate(document, choice, shift) for shift in range(shifts)] or [document]
    return choice, [_encode(one, opened) for one in asked]

  choices, encoded = [], []
  for _, _, (choice, asked) in opened.examples(encode):
    choices += [choice]
    encoded += [asked]
  if not choices:
    raise opened.nothing("choice")
  everything = [one for asked in encoded for one in asked]
  speaks = bool(find_fusion(config).STREAM)
  scores = iter((of_branches if speaks else pairs.of_branches)(
    config, params, everything, entry.batch))
  row = _row if speaks else _compared
  rows = [row(choice, [next(scores) for _ in asked], entry.options == "letters")
          for choice, asked in zip(choices, encoded, strict=True)]
  return rows, opened.bad


def _encode(document: Document, opened: Split) -> Encoded:
  """Every option carries loss: all of them are scored."""
  ends = {id(parts[-1]) for parts in branches(document).values()}
  parts = tuple(dataclasses.replace(part, loss=id(part) in ends) if isinstance(part, Text) else part
                for part in document.parts)
  return template.encode(dataclasses.replace(document, parts=parts), opened.tokenizer,
                         opened.decode_image)


def _row(choice: Choice, scored: list[tuple[np.ndarray, np.ndarray]], letters: bool) -> dict:
  """The record of one question; the first rotation is the list as it is written."""
  sums, tokens = scored[0]
  picked = int(np.argmax(sums))
  row = {
    "key": choice.key, "document": choice.key, "question": choice.question,
    "options": list(choice.options), "answers": [choice.options[choice.right]],
    "prediction": choice.options[picked], "log_probs": sums.tolist(), "tokens": tokens.tolist(),
    "score": float(picked == choice.right),
    "score_per_token": float(np.argmax(sums / tokens) == choice.right),
  }
  if letters:
    row["circular"] = float(all(np.argmax(one) == choice.right for one, _ in scored))
  return row


def _compared(choice: Choice, scored: list[tuple[np.ndarray, np.ndarray]], letters: bool) -> dict:
  """`_row` of scores that are not likelihoods."""
  row = _row(choice, scored, letters)
  row["matches"] = row.pop("log_probs")
  return {name: value for name, value in row.items() if name not in ("tokens", "score_per_token")}
