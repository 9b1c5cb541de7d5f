"""Retrieval from a COCO file against a computation by hand: each pair alone, from its logits."""

import json

import numpy as np
import pytest

from tests.data.broken_source import png
from tests.evals.metrics.test_retrieval import slowly
from tests.generate.helpers import forward
from vlm_jax.configs import base
from vlm_jax.core.document import Document, Image, Text
from vlm_jax.core.errors import UsageError
from vlm_jax.data import pipeline, template
from vlm_jax.evals import run
from vlm_jax.evals.kinds import retrieval

PICTURES = 4
CAPTIONS = ((0, "yes"), (1, "a noise"), (0, "no no"), (2, "1 2 3"), (3, "why is it"), (2, "yes 4"))


@pytest.fixture(scope="module")
def coco(setup, tmp_path_factory):
  folder = tmp_path_factory.mktemp("coco")
  for number in range(PICTURES):
    (folder / f"{number}.png").write_bytes(png(number, 16))
  (folder / "captions.json").write_text(json.dumps({
    "images": [{"id": number, "file_name": f"{number}.png"} for number in range(PICTURES)],
    "annotations": [{"image_id": owner, "caption": text} for owner, text in CAPTIONS]}))
  config = setup[0].copy_and_resolve_references()
  config.data.sources.coco = base.source(name="coco", path=str(folder / "captions.json"))
  config.evals.find = base.evaluation(kind="retrieval", source="coco", split="train", batch=3,
                                      together=4, controls=("shuffled",))
  return config, setup[1], folder


def measured(coco, images="real", **fields):
  config, params, _ = coco
  config = config.copy_and_resolve_references()
  config.evals.find.update(fields)
  opened = retrieval.Split(config, config.evals.find, "train", images)
  found = retrieval.read(opened)
  return found, retrieval.similarity(config, params, found, config.evals.find)


def by_hand(coco, text, picture, form, off=0):
  """log p of a caption behind a picture, written as a document of its own; `off`: a wrong slot."""
  config, params, folder = coco
  caption = Text(text, loss=True, branch=int(form == "fan_out"))
  document = Document((Image((folder / f"{picture}.png").read_bytes()), caption), "coco", "x")
  encoded = template.encode(document, pipeline.load_tokenizer(config),
                            pipeline.image_decoder(config))
  logits = forward(config, params, [encoded])[0][0].astype(np.float64)
  log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
  ids = encoded.parts[-1].ids[1:]
  at = np.arange(len(logits) - len(ids) - 1, len(logits) - 1)
  return log_p[at - off, ids].sum()


@pytest.mark.parametrize("form", ["single", "fan_out"])
def test_every_pair_is_scored_as_if_alone(coco, form):
  found, scores = measured(coco, form=form)  # rows of fan_out hold four captions, then two
  names = [int(key.rsplit("/", 1)[-1]) for key, _ in found.pictures]
  texts = [text for _, text, _ in found.captions]
  assert sorted(texts) == sorted(text for _, text in CAPTIONS) and scores.shape == (4, 6)
  assert {(names[owner], text) for owner, text in zip(found.owners, texts, strict=True)} == set(
    CAPTIONS)
  for row, column in ((0, 0), (1, 3), (3, 5), (2, 2)):
    want = by_hand(coco, texts[column], names[row], form)
    assert scores[row, column] == pytest.approx(want, abs=2e-3, rel=1e-5)
    assert abs(by_hand(coco, texts[column], names[row], form, off=1) - want) > 0.2
  assert np.ptp(scores, axis=0).min() > 0.01  # pictures matter
  # Twin: other pictures are other numbers.
  assert np.abs(measured(coco, "shuffled", form=form)[1] - scores).max() > 0.2


def test_numbers_rows_and_control(coco):
  config, params, _ = coco
  results = run.evaluate(config, params, None, names=["find"])["find"]
  found, scores = measured(coco)
  raised = scores - np.log(np.exp(scores).mean(0))
  for k in (1, 5, 10):
    k_text, k_image = min(k, len(CAPTIONS)), min(k, PICTURES)
    assert results[f"image_to_text@{k}"] == slowly(raised, found.owners, k_text)[0]
    assert results[f"image_to_text_raw@{k}"] == slowly(scores, found.owners, k_text)[0]
    assert results[f"text_to_image@{k}"] == slowly(scores, found.owners, k_image)[1]
  assert (results["pairs"], results["captions"], results["chance"]) == (24, 6, 0.25)
  assert results["low"] <= results["text_to_image@1"] <= results["high"]
  assert "text_to_image@1" in results["controls"]["shuffled"]
  numbers, rows = retrieval.summary(found, scores, 0)
  for column, row in enumerate(rows):
    order = np.argsort(-scores[:, column])
    assert row["rank"] == 1 + list(order).index(found.owners[column])
    assert row["score"] == (row["prediction"] == row["answers"][0])
  # A model that knows: everything is found, and raising by the mean mends a greedy caption.
  own = found.owners == np.arange(PICTURES)[:, None]
  greedy = np.where(own, -1.0, -9.0) + np.array([0, 50, 0, 0, 0, 0])
  numbers, _ = retrieval.summary(found, greedy, 0)
  assert numbers["text_to_image@1"] == numbers["image_to_text@1"] == 1
  assert numbers["image_to_text_raw@1"] == 0.25


def test_what_cannot_be_ranked(coco, monkeypatch):
  config, params, _ = coco
  config = config.copy_and_resolve_references()
  config.evals.find.controls = ("none",)
  with pytest.raises(UsageError, match="cannot be 'none'; set controls"):
    run.evaluate(config, params, None, names=["find"])
  config.evals.find.update(controls=(), limit=1)
  with pytest.raises(UsageError, match="among 1 pictures and 1 captions"):
    run.evaluate(config, params, None, names=["find"])
  monkeypatch.setattr(retrieval, "PAIRS", 23)
  config.evals.find.limit = 0
  with pytest.raises(UsageError, match="at most 23 pairs with limit"):
    run.evaluate(config, params, None, names=["find"])
  config.evals.find.update(source="words", form="text")
  with pytest.raises(UsageError, match="has no picture"):
    run.evaluate(config, params, None, names=["find"], split="train")
