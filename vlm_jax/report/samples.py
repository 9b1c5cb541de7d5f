"""Questions of an evaluation with their pictures, answers, and what the controls answered."""

from typing import Any

from PIL import Image as PIL

from vlm_jax.core.document import Document, Video, Visual
from vlm_jax.core.errors import UserError
from vlm_jax.data import images, pipeline
from vlm_jax.data.bad import BadExample
from vlm_jax.evals import predictions
from vlm_jax.report import looks
from vlm_jax.report.html import Html, figure, picture, tag
from vlm_jax.report.run import Run

COUNT, WRONG = 12, 4  # samples shown, of which at most so many that are wrong
SHOWN = {"key", "document", "prediction", "score"}  # what a row needs to be a sample
SIDE = 144  # pixels of the longer side of a picture
CONTROLS = {"none": "without the picture", "shuffled": "with another picture",
            "shuffled_shots": "with the answers of its shots shuffled"}


def section(run: Run, label: str, step: int, numbers: dict[str, Any], maps: int) -> Html | None:
  """Samples of one evaluation, `maps` of them with the attention behind every word.

  None when it left no predictions of answers.
  """
  rows = read(run, label)
  if not rows or not SHOWN <= rows[0].keys():
    return None
  if (said := rows[0].get("step", step)) != step:
    return tag("p", f"Not shown: its answers were replaced by those of step {said:,}; `vlm-jax "
               f"evaluate --step={step}` writes them again.", class_="muted")
  controls = {}
  for name in numbers.get("controls", {}):
    controls[name] = {row["key"]: row for row in read(run, f"{label}_{name}")}
  chosen = choose(rows)
  shown, missing = documents(run, numbers, {row["document"] for row in chosen})
  cards = [card(row, controls, thumbnail(shown.get(row["document"]))) for row in chosen]
  note = tag("p", f"Pictures are not shown: {missing}") if missing else ""
  if shown and (terms := licence(run, numbers["source"])):
    note += tag("p", f"Pictures: {terms}", class_="muted")
  looked, why = looks.draw(run, step, chosen, shown, maps) if maps else ({}, "")
  note += tag("p", f"Attention is not shown: {why}", class_="muted") if why else ""
  asked = {row["key"]: row.get("question", "") for row in chosen}
  drawn = [tag("figure", tag("div", picture(image, "where the model looked"), class_="scroll"),
               tag("figcaption", tag("b", asked[key]), " Bright: a large attention weight behind "
                   "that word, a mean over layers and heads."))
           for key, image in looked.items()]
  return Html(note + tag("div", cards, class_="cards") + tag("div", drawn, class_="maps"))


def read(run: Run, name: str) -> list[dict[str, Any]]:
  """The rows of a predictions file, [] without one."""
  path = run.path / "predictions" / f"{name}.jsonl"
  return predictions.read(path) if path.exists() else []


def licence(run: Run, source: str) -> str:
  """Licence and attribution of a source's pictures, "" when nobody has said it."""
  entry = run.config.data.sources.get(source)
  name = entry.name.split(".")[-1] if entry is not None else ""  # a user's own module: its last
  return run.sources.get(name, {}).get("licence", "")


def choose(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """A few wrong ones and some right ones, spread over the file, each of another document."""

  def spread(candidates: list, count: int, used: set) -> list:
    picked = []
    stride = max(len(candidates) // max(count, 1), 1)
    for row in [*candidates[::stride], *candidates]:
      if len(picked) < count and row["document"] not in used:
        picked.append(row)
        used.add(row["document"])
    return picked

  used: set[str] = set()
  wrong = spread([row for row in rows if not right(row)], WRONG, used)
  good = spread([row for row in rows if right(row)], COUNT - len(wrong), used)
  more = spread([row for row in rows if not right(row)], COUNT - len(wrong) - len(good), used)
  return [*wrong, *more, *good]


def right(row: dict[str, Any]) -> bool:
  """Whether an answer is all right; a caption only word for word: its CIDEr-D goes up to 10."""
  return row.get("rouge_l", row["score"]) >= 1


def documents(run: Run, numbers: dict[str, Any], keys: set[str]
              ) -> tuple[dict[str, Document], str]:
  """Key to document of some documents with their pictures, and why there are none."""
  if numbers.get("images") == "none":
    return {}, "this evaluation asks without them."
  found: dict[str, Document] = {}
  try:
    source = run.config.data.sources[numbers["source"]]
    form = numbers.get("entry", {}).get("form") or source.form  # as the evaluation was asked
    split = pipeline.documents(run.config, numbers["source"], numbers["split"], form,
                               numbers.get("images", "real"))
    for index in range(len(split)):
      try:
        document = split[index]
      except BadExample:
        continue
      key = document.key if document.key in keys else document.key.split("?")[0]
      if key in keys:  # of the captions of one record the first stands for all
        found.setdefault(key, document)
      if len(found) == len(keys):
        break
  except (UserError, KeyError) as error:
    return {}, f"{str(error).rstrip('.')}."
  return found, ""


def thumbnail(document: Document | None) -> PIL.Image | None:
  """A small copy of few colours of a document's first picture; None without a readable one."""
  image = next((part for part in document.parts if isinstance(part, Visual)), None) \
    if document else None
  image = image.frames[0] if isinstance(image, Video) else image
  if image is None:
    return None
  try:
    pixels = images.decode(image.data) if isinstance(image.data, bytes) else image.data
  except BadExample:
    return None
  small = PIL.fromarray(pixels)
  small.thumbnail((SIDE, SIDE))
  return small.quantize(64)


def card(row: dict[str, Any], controls: dict[str, dict], image: PIL.Image | None) -> Html:
  """One question."""
  answer = tag("p", row["prediction"] or "(nothing)", class_="yes" if right(row) else "no")
  lines = [tag("p", row.get("question", ""), class_="asked"), answer]
  if not right(row):
    truth = ", ".join(dict.fromkeys(row.get("answers", [])))
    lines.append(tag("p", "truth: ", tag("b", truth)))
  if "rouge_l" in row:
    lines.append(tag("p", f"CIDEr-D {figure(row['score'])}, ROUGE-L {figure(row['rouge_l'])}",
                     class_="muted"))
  if "log_prob" in row:
    lines.append(tag("p", f"log-probability {figure(row['log_prob'])}", class_="muted"))
  for name, rows in controls.items():
    if row["key"] in rows:
      said = rows[row["key"]]
      lines.append(tag("p", f"{CONTROLS.get(name, name)}: ", said["prediction"] or "(nothing)",
                       class_="muted"))
  body = [picture(image, "the picture asked about", class_="pixel")] if image else []
  return tag("div", *body, tag("div", lines), class_="card", title=row["key"])
