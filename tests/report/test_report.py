"""The report: what is shown is what the run's files say, and nothing in it can load or run."""

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tests.evals.tiny_source import CAPTIONS, QUESTIONS
from tests.report.conftest import SOURCE, STEPS, losses
from vlm_jax.cli import main as cli
from vlm_jax.configs import base
from vlm_jax.core.errors import DATA, USAGE
from vlm_jax.data import draw, inspect
from vlm_jax.data.bad import BadExample
from vlm_jax.report import charts, html, page, rows, samples
from vlm_jax.report import run as runs

URL = re.compile(r"url\(|@import|expression\(", re.I)
LOADS = {"src", "href", "srcset", "data", "action", "poster", "background", "xlink:href"}


class Page(HTMLParser):
  """The elements, attributes and text of a page, and what in it could load or run something."""

  def __init__(self, text):
    super().__init__()
    self.elements, self.texts, self.faults, self.images = [], [], [], []
    self.open = []
    self.feed(text)
    self.close()

  def handle_starttag(self, name, pairs):
    self.elements.append(name)
    if name not in html.VOID:
      self.open.append(name)
    if name in ("script", "iframe", "object", "embed", "form", "base", "video", "audio"):
      self.faults.append(name)
    for key, value in pairs:
      if key.startswith("on") or (key == "style" and URL.search(value or "")):
        self.faults.append(f"{name} {key}={value}")
      if key in LOADS and not (value or "").startswith(("data:", "#")):
        self.faults.append(f"{name} {key}={value}")
      elif name == "img" and key == "src":
        self.images.append(base64.b64decode(value.split(",", 1)[1]))

  def handle_endtag(self, name):
    assert self.open and self.open.pop() == name, f"</{name}> closes nothing"

  def handle_data(self, data):
    if self.open and self.open[-1] == "style" and URL.search(data):
      self.faults.append("style loads something")
    self.texts.append(data)

  @property
  def text(self):
    return " ".join(" ".join(self.texts).split())


def written(path, *flags):
  assert cli.main(["report", f"--workdir={path}", "--allow-outside", *flags]) == 0
  return Page((path / "report.html").read_text())


def test_shows_what_the_files_say(run, config, capsys):
  found = written(run)
  assert "report.html" in capsys.readouterr().out
  assert not found.faults and not found.open
  text = found.text
  for words in ("a run", "step 100 of 1,000", "0.73", "0.68 to 0.77", "0.321", "0.3 to 0.35",
                "18 questions", "with another picture", "Waiting for data", "12.5%",
                "question 4?", "yes 4", "with another picture: elsewhere 4", "truth: yes",
                "3f2a", "pictures/test.array_record 1,234 bytes",
                "llm.vocab_size", "270", "seed 0", "none", "tests.evals.tiny_source"):
    assert words in text, words
  # Every logged value is under the pointer: steps and losses of both sources.
  for step in STEPS:
    for name, value in losses(step).items():
      assert f"{name} {html.figure(value)}" in text
  # Pictures: two masks and one picture a sample.
  assert len(found.images) == 2 + 5
  for image in found.images:
    assert Image.open(io.BytesIO(image)).convert("RGB").getextrema() != ((0, 0),) * 3
  versions = json.loads((run / "env.json").read_text())["versions"]
  assert versions["jax"] in text and (run / "command.txt").read_text().strip() in text
  assert "There is no checkpoint" in text


def test_the_twin_that_loads_or_runs_is_found():
  for bad in ('<img src="https://a.b/c.png">', "<script>1</script>", '<p onclick="x()">a</p>',
              '<link rel="stylesheet" href="x.css">', "<style>a{background:url(x)}</style>",
              '<a href="javascript:x()">a</a>', '<p style="background:URL(x)">a</p>'):
    assert Page(bad).faults, bad


EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)> & \'<b>'


def test_everything_is_escaped(run, config):
  """Text from the run that looks like markup is shown as the text it is, wherever it comes from."""
  lines = (run / "predictions" / "look.jsonl").read_text().splitlines()
  rows_of = [json.loads(line) | {"question": EVIL, "prediction": EVIL, "answers": [EVIL],
                                 "key": EVIL} for line in lines]
  (run / "predictions" / "look.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows_of))
  (run / "command.txt").write_text(EVIL)
  frozen = json.loads((run / "config.json").read_text())
  frozen["optim"]["decay_pattern"] = EVIL
  (run / "config.json").write_text(json.dumps(frozen))
  evals = json.loads((run / "evals" / "100.json").read_text())
  evals["evals"][EVIL] = {"main": EVIL, EVIL: 0.5, "source": EVIL, "split": EVIL, "unit": EVIL,
                          "kind": EVIL, "controls": {EVIL: {EVIL: 0.25}}, "origin": {
                            "parameters": EVIL, "files": {EVIL: {"sha256": EVIL}}}}
  (run / "evals" / "100.json").write_text(json.dumps(evals))
  env = json.loads((run / "env.json").read_text())
  env["versions"][EVIL] = EVIL
  (run / "env.json").write_text(json.dumps(env))
  metrics = (run / "metrics.jsonl").read_text().replace("loss/lm/words", "loss/lm/<script>")
  (run / "metrics.jsonl").write_text(metrics)
  found = written(run)
  assert not found.faults and "script" not in found.elements and "b" in found.elements
  assert found.text.count("<script>alert(1)</script>") >= 12
  assert html.escape(EVIL) != EVIL and html.escape(html.Html(EVIL)) == EVIL


def test_a_bare_run_is_said_in_sentences(run, config):
  for name in ("metrics.jsonl", "timing.jsonl", "command.txt", "env.json"):
    (run / name).unlink()
  for folder in ("evals", "predictions"):
    for file in (run / folder).iterdir():
      file.unlink()
  text = written(run, "--root=nowhere").text
  for words in ("No evaluation has been written yet", "No step has been logged yet",
                "No evaluation has left answers", "There is no checkpoint", "env.json is missing",
                "command.txt is missing", "Not shown: nowhere", "manifest is not at nowhere"):
    assert words in text, words


def test_pictures_that_are_gone_do_not_take_the_answers_along(run):
  frozen = json.loads((run / "config.json").read_text())
  frozen["data"]["root"] = "nowhere"
  (run / "config.json").write_text(json.dumps(frozen))
  text = written(run).text
  assert "Pictures are not shown: nowhere" in text and "question 4?" in text


def test_a_config_that_leaves_the_package_runs_no_code_unasked(run, capsys):
  assert cli.main(["report", f"--workdir={run}"]) == 0
  assert "is outside vlm_jax" in Page((run / "report.html").read_text()).text


def test_what_cannot_be_reported(run, tmp_path, capsys):
  assert cli.main(["report", f"--workdir={tmp_path}/none"]) == USAGE
  (run / "evals" / "50.json").write_text("{")
  assert cli.main(["report", f"--workdir={run}"]) == DATA
  assert "evals/50.json is not what an evaluation writes" in capsys.readouterr().err


def test_samples_are_the_documents_that_were_asked(run, config):
  """In the evaluation's own form, also when another evaluation of the source has another one."""
  config.evals.first = base.evaluation(source="pictures", split="test", form="choice")
  read = dataclasses.replace(runs.read(run, outside=True), config=config)
  numbers = {"source": "pictures", "split": "test", "entry": {"form": "caption"}}
  keys = {f"pictures/test/r{record}" for record in range(1, 5)}
  found, why = samples.documents(read, numbers, keys)  # one of them stands behind a broken record
  assert set(found) == keys and not why
  texts = lambda document: [part.text for part in document.parts[1:]]
  assert all(texts(document) == [CAPTIONS[0]] for document in found.values())
  found, _ = samples.documents(read, numbers | {"entry": {"form": ""}}, keys)
  assert all(texts(document)[0] == QUESTIONS[0] for document in found.values())


def test_a_record_that_cannot_be_read_does_not_hide_the_others(run, config, monkeypatch):
  real = draw.Documents.__getitem__

  def broken(split, index):
    if index == 1:
      raise BadExample("wrong_record")
    return real(split, index)

  monkeypatch.setattr(draw.Documents, "__getitem__", broken)
  text = written(run).text
  assert "question 1?" in text and "are not shown" not in text


def test_answers_of_another_step_are_not_shown_as_this_one(run):
  file = run / "predictions" / "look.jsonl"
  lines = [json.loads(line) for line in file.read_text().splitlines()]
  of = lambda step: file.write_text("".join(json.dumps(row | {"step": step}) + "\n"
                                            for row in lines))
  of(50)
  text = written(run).text
  assert "its answers were replaced by those of step 50" in text and "--step=100" in text
  assert "question 4?" not in text
  of(100)
  assert "question 4?" in written(run).text
  file.write_text("{")
  assert "Not shown: " in (text := written(run).text) and "look.jsonl line 1 is not JSON" in text


def test_whose_pictures_they_are_stands_beside_them(run):
  terms = "CC BY-SA 4.0, drawn by somebody"
  whole = runs.read(run, outside=True)
  whole.sources[SOURCE.split(".")[-1]]["licence"] = terms
  found = lambda read: str(page.examples(read, 0))
  assert f"Pictures: {terms}" in found(whole)
  assert "Pictures: " not in found(dataclasses.replace(whole, sources={}))


def test_the_mask_is_the_mask(run, config):
  batch, _ = inspect.batch_at(config, 1)
  mask, kinds = rows.one_row(batch, "text"), inspect.kinds_of(batch, "text", 0)
  slots = len(kinds)
  image = np.asarray(rows.draw(mask, kinds, 0, slots).convert("RGBA"))[rows.STRIP:, rows.STRIP:]
  dense = np.asarray(mask.dense(slots))
  assert 0 < dense.sum() < dense.size
  assert ((image[..., 3] > 0) == dense).all()
  for slot in range(0, slots, 7):
    seen = image[:, slot][dense[:, slot]][:, :3]
    assert (seen == inspect.COLOURS[kinds[slot]]).all()
  first = rows.interesting(batch, "text", mask)
  assert (mask.q_class[first : first + 60] > 0).any()
  near = np.asarray(rows.draw(mask, kinds, first, first + 20, 8).convert("RGBA"))
  corner = near[rows.STRIP :: 8, rows.STRIP :: 8, 3] > 0
  assert (corner == dense[first : first + 20, first : first + 20]).all()


def test_budget_adds_up(run):
  text = Page(str(page.budget(runs.read(run)))).text
  # 240 slots: 6 images of 4, 60 predicted, 200 used.
  assert "image 10.0% (24)" in text and "prompt 48.3% (116)" in text
  assert "predicted 25.0% (60)" in text and "empty 16.7% (40)" in text


def test_the_number_an_evaluation_is_read_by():
  written = {"kind": "caption", "bleu_4": 0.3, "cider": 1.2, "accuracy": 2.0}
  assert page.main(written) == ("cider", 1.2)  # as the kind says
  assert page.main(written | {"main": "bleu_4"}) == ("bleu_4", 0.3)  # as the evaluation said
  name, value = page.main(written | {"kind": "mine.own"})
  assert name == "" and np.isnan(value)
  assert page.bar({"low": 0.9, "high": 1.4}, 1.2, "cider") == ""
  assert "<svg" in page.bar({"low": 0.4, "high": 0.6}, 0.5, "recall")


def test_config_differences_are_marked(run, config):
  fields = runs.fields(config)
  assert fields["llm.vocab_size"] == (270, 1024) and fields["optim.b1"] == (0.9, 0.9)
  assert fields["data.sources.pictures.form"] == ("fan_out", "")
  marked = re.findall(r'class="changed">([^<]*)<', str(page.config(runs.read(run))))
  assert marked.count("270") == 2 and "0.9" not in marked


def test_charts():
  steps = list(range(1, 1001))
  values = [float(step % 7) for step in steps]
  thinned = charts.thin((steps, values))
  assert len(thinned[0]) == charts.POINTS and thinned[0][-1] == 1000
  assert np.mean(thinned[1]) == pytest.approx(np.mean(values), rel=0.01)
  assert charts.ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1] and charts.ticks(5, 5) == [5]
  drawn = str(charts.lines("t", {"a": ([1, 2, 3], [0.001, 1.0, float("nan")])}))
  assert "logarithmic" in drawn and "nan" not in drawn and drawn.count('class="point"') == 2
  assert "No number" in charts.lines("t", {"a": ([1], [float("inf")])})
  # Higher values are drawn higher, and inside the frame.
  points = re.search(r'points="([^"]*)"', charts.lines("t", {"a": ([0, 1], [1.0, 2.0])})).group(1)
  (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in points.split())
  assert charts.LEFT == x0 < x1 <= charts.WIDTH and 0 < y1 < y0 < charts.HEIGHT


def test_samples_show_wrong_answers_first():
  found = [{"document": f"d{i // 2}", "score": float(i % 5 > 0), "key": i} for i in range(100)]
  chosen = samples.choose(found)
  assert len(chosen) == samples.COUNT == len({row["document"] for row in chosen})
  assert [row["score"] for row in chosen] == [0.0] * samples.WRONG + [1.0] * 8
  assert len(samples.choose(found[:3])) == 2 and samples.choose([]) == []


def test_a_caption_is_right_word_for_word():
  row = {"key": "a", "document": "a", "prediction": "a black circle", "answers": ["black bird"],
         "score": 1.7, "rouge_l": 0.4}
  card = str(samples.card(row, {}, None))
  assert 'class="no"' in card and "black bird" in card and "CIDEr-D 1.7, ROUGE-L 0.4" in card
  assert 'class="yes"' in str(samples.card(row | {"rouge_l": 1.0}, {}, None))
  assert samples.choose([row | {"rouge_l": 1.0}, row | {"document": "b"}])[0]["document"] == "b"
