"""A few pictures with questions of very different lengths, and a few pages of text."""

import numpy as np

from tests.data.broken_source import png
from vlm_jax.core.document import Image, Text

FORMS = ("fan_out", "single", "text", "choice", "caption", "match")
LICENCE = "none"
PACKAGE = "none"
RECORDS, BAD = 7, 3
# Short: all five of them, with the picture, fit the smallest bucket.
QUESTIONS = ("red?", "how many?", "big", "why", "what is it?")

OPTIONS = ("yes", "a noise", "no")
CAPTIONS = ("yes noise no", "a noise", "noise, no!", "no 1 2 3", "yes")


def prepare():
  records = [dict(key=f"r{i}", image=png(i, 16), questions=QUESTIONS[: 1 + i % 5],
                  text=" ".join(QUESTIONS[i % 5 :] * (2 + i))) for i in range(RECORDS)]
  broken = dict(key="broken", image=png()[:500], questions=QUESTIONS[:2], text=" ")
  return {"train": records[:5], "test": [*records[:BAD], broken, *records[BAD:]]}


def texts(record):
  yield from QUESTIONS
  yield "yes no noise " + " ".join(map(str, np.arange(40)))


def parts(record, form):
  if form == "text":
    return [(Text(record["text"], "text", loss=True),)]
  image = Image(record["image"])
  turns = lambda branch, text: (
    Text(text, "user", branch=branch), Text("yes", "assistant", loss=True, branch=branch))
  if form == "choice":  # branches ask and answer, or the trunk asks and branches answer
    ask = lambda k: () if k % 2 else (Text(QUESTIONS[k % 5], "user"),)
    option = lambda k, n: (*((Text(QUESTIONS[k % 5], "user", branch=n),) if k % 2 else ()),
                           Text(OPTIONS[n - 1], "assistant", loss=n == 1 + k % 3, branch=n))
    return [(image, *ask(k), *(part for n in (1, 2, 3) for part in option(k, n)))
            for k in range(len(record["questions"]))]
  if form == "match":
    return [(image, Text(CAPTIONS[0], branch=1, loss=True), Text(CAPTIONS[1], branch=2))]
  if form == "caption":
    return [(image, Text(caption, loss=True)) for caption in CAPTIONS[: len(record["questions"])]]
  if form == "single":
    return [(image, *turns(0, question)) for question in record["questions"]]
  return [(image, *(part for k, question in enumerate(record["questions"], 1)
                    for part in turns(k, question)))]
