"""VQAv2 (arXiv:1612.00837): a JSON of questions (path) and one of their answers (annotations).

The answer that is learned is `multiple_choice_answer`, the one most annotators gave; evaluations
score against all `answers`, when the file has them. A record is an image with all
its questions. Images are named as COCO names them, after the files' `data_subtype`:
COCO_val2014_000000000042.jpg, or 000000000042.jpg when it is not one of 2014.

Forms:
  conversation  one document an image: the questions follow one another
  fan_out       one document an image: every question is a branch, answered as if asked alone
  single        one document a question
"""

import sys
from collections.abc import Sequence

from ml_collections import ConfigDict

from vlm_jax.core.document import Image, Text
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.data import files
from vlm_jax.data.bad import BadExample
from vlm_jax.data.sources import Parts, Record

FORMS = ("conversation", "fan_out", "single")
EXPECTS = ('a JSON object of "questions": [{"image_id", "question", "question_id"}], and one of '
           '"annotations": [{"question_id", "multiple_choice_answer"}]')


def reader(entry: ConfigDict, split: str) -> Sequence[Record]:
  """The images of `entry.path` and `entry.annotations`, in the order of their first question."""
  del split
  if not entry.annotations:
    raise UsageError("source vqav2: set `annotations` to the JSON file of answers")
  questions, answers = (files.paths(entry[field], EXPECTS) for field in ("path", "annotations"))
  if len(questions) != len(answers):
    raise UsageError(f"source vqav2: {len(questions)} files of questions but {len(answers)} of "
                     "answers; `path` and `annotations` must match")
  records: dict[tuple[str, int], Record] = {}
  for asked, answered in zip(questions, answers, strict=True):
    value = files.json_object(asked, ("questions",), EXPECTS)
    said = files.json_object(answered, ("annotations",), EXPECTS)
    subtype = str(value.get("data_subtype", ""))
    prefix = f"COCO_{subtype}_" if subtype.endswith("2014") else ""
    try:
      known = {one["question_id"]: _answers(one) for one in said["annotations"]}
      for one in value["questions"]:
        name = f"{prefix}{int(one['image_id']):012d}.jpg"
        record = records.setdefault((asked, one["image_id"]), {
          "key": name, "image": name, "questions": []})
        record["questions"].append((one["question"], *known.get(one["question_id"], (None, ()))))
    except (KeyError, TypeError, ValueError) as error:
      raise DataError(f"{asked} or {answered}: {type(error).__name__} {error}; expected {EXPECTS}"
                      ) from error
  return list(records.values())


def _answers(annotation: dict) -> tuple[str, tuple[str, ...]]:
  """The answer that most gave, and what everybody said; equal strings are one in memory."""
  everybody = (str(one["answer"]) for one in annotation.get("answers", ()))
  return annotation["multiple_choice_answer"], tuple(map(sys.intern, everybody))


def parts(record: Record, form: str) -> list[Parts]:
  """The documents of one image; see the module for the forms."""
  image, pairs = Image(record["image"]), record["questions"]
  if not all(isinstance(text, str) for pair in pairs for text in pair[:2]):
    raise BadExample("wrong_record", "a question has no answer in the annotations")
  turns = lambda branch, pair: (
    Text(pair[0].strip(), "user", branch=branch),
    Text(pair[1].strip(), "assistant", loss=True, branch=branch, answers=pair[2])
  )
  if form == "single":
    return [(image, *turns(0, pair)) for pair in pairs]
  numbers = range(1, len(pairs) + 1) if form == "fan_out" else [0] * len(pairs)
  return [(image, *(part for k, pair in zip(numbers, pairs, strict=True)
                    for part in turns(k, pair)))]
