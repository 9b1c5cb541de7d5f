"""Where in the picture the model looked behind every word of an answer, for a few samples.

The question and the answer are read once more, as `vlm-jax generate --attention-map` does.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image as PIL

from vlm_jax.core.document import Document, Image
from vlm_jax.core.errors import UserError
from vlm_jax.core.typing import Params
from vlm_jax.data import pipeline, template
from vlm_jax.data.bad import BadExample
from vlm_jax.generate import maps
from vlm_jax.report.run import Run

SAID = {"log_prob", "prediction"}  # what the row of a generated answer has
RANKED = {"rank", "log_probs"}  # and that of a chosen one


def draw(run: Run, step: int, rows: Sequence[dict[str, Any]],
         documents: Mapping[str, Document], count: int) -> tuple[dict[str, PIL.Image], str]:
  """The maps of the first rows that have an answer in words and a picture.

  Args:
    run: the run.
    step: of the evaluation and of the checkpoint that answered.
    rows: its samples.
    documents: key to the document that a sample is from, as it was shown.
    count: so many are drawn.

  Returns:
    Key of the row to its maps, and why there are none, "" when there are or nobody said anything.
  """
  chosen = [row for row in rows if SAID <= row.keys() and not RANKED & row.keys()
            and row["prediction"] and row["document"] in documents][:count]
  chosen = [row for row in chosen if any(isinstance(part, Image)
                                         for part in documents[row["document"]].parts)]
  if not chosen:
    return {}, ""
  try:
    maps.check(run.config, 1, ())
    params = run.params(step)
    return {row["key"]: one(run, params, row, documents[row["document"]]) for row in chosen}, ""
  except (UserError, BadExample) as error:
    return {}, str(error).removeprefix("--attention-map: ")


def one(run: Run, params: Params, row: dict[str, Any], document: Document) -> PIL.Image:
  """The maps of one answer."""
  tokenizer = pipeline.load_tokenizer(run.config)
  branch = row["key"].removeprefix(document.key).removeprefix("/")
  kept = {0, int(branch)} if branch.isdigit() else {0}
  parts = tuple(part for part in document.parts if getattr(part, "branch", 0) in kept)
  prompt = template.encode_prompt(dataclasses.replace(document, parts=parts), tokenizer,
                                  pipeline.image_decoder(run.config))
  found = maps.word_maps(run.config, params, prompt, tokenizer.encode(row["prediction"]), tokenizer)
  return maps.draw(found, prompt.images).quantize(64)
