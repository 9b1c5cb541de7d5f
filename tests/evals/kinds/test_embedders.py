"""Strategies that embed are asked for embeddings: retrieval, zero-shot classes, refusals."""

import dataclasses

import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from tests.evals.metrics.test_retrieval import slowly
from tests.evals.tiny_source import CAPTIONS
from tests.fusion import contrast as c
from tests.fusion import testing as t
from vlm_jax.configs import base
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.data import pipeline, template
from vlm_jax.evals import embed, pairs, run
from vlm_jax.generate.prompts import layouts

SOURCE = "tests.evals.tiny_source"


@pytest.fixture(scope="module")
def asked(setup):
  """A config whose evaluations read captions, and a model of noise."""
  config = c.get_config("clip")
  config.data.root, config.data.bad_limit = setup[0].data.root, 0.5
  config.llm.update(vocab_size=setup[0].llm.vocab_size, positions=12, eos=2)
  config.data.sources.pictures = base.source(name=SOURCE, form="caption")
  entry = dict(source="pictures", split="test", batch=3, controls=("shuffled",))
  config.evals.find = base.evaluation(kind="retrieval", **entry)
  config.evals.classes = base.evaluation(
    kind="zero_shot", templates=("{}", "why {}?"), **entry)
  return config, t.noise_params(config)


def by_hand(asked, documents) -> tuple[np.ndarray, np.ndarray]:
  """Embeddings of documents in one batch, each of picture and text."""
  config, params = asked
  encoded = [template.encode(one, pipeline.load_tokenizer(config), pipeline.image_decoder(config))
             for one in documents]
  config = config.copy_and_resolve_references()
  config.data.update(rows=1, images=len(encoded))
  flat, where = c.pack(layouts_of(config, encoded), config)
  out = embed.embeddings(FrozenConfigDict(config), params, flat)
  at = [where[one.key][1] for one in encoded]
  return np.asarray(out.image)[0, at], np.asarray(out.text)[0, at]


def layouts_of(config, encoded):
  module = find_fusion(config)
  return [module.layout(one, config, np.random.default_rng(0)) for one in encoded]


def readable(config):
  opened = pipeline.documents(config, "pictures", "test", "caption")
  return [one for one in map(opened.__getitem__, range(len(opened))) if "broken" not in one.key]


def test_retrieval_ranks_by_cosines(asked, tmp_path):
  config, params = asked
  results = run.evaluate(config, params, tmp_path, names=["find"])["find"]
  documents = readable(config)
  image, text = by_hand(asked, documents)
  keys = [one.key.split("?")[0] for one in documents]
  names = list(dict.fromkeys(keys))
  scores = image[[keys.index(name) for name in names]] @ text.T
  owners = np.array([names.index(key) for key in keys])
  for k in (1, 5, 10):
    expected = slowly(scores, owners, min(k, len(names)))
    assert results[f"text_to_image@{k}"] == pytest.approx(expected[1])
  assert results["captions"] == len(documents) and results["pictures"] == len(names)
  assert "image_to_text_raw@1" not in results and results["bad"] > 0
  rows = [line for line in (tmp_path / "predictions" / "find.jsonl").read_text().splitlines()]
  assert len(rows) == len(documents) and '"cosine"' in rows[0]
  assert "text_to_image@1" in results["controls"]["shuffled"]


def test_classes_are_the_captions_of_the_split(asked):
  config, params = asked
  results = run.evaluate(config, params, None, names=["classes"])["classes"]
  documents = readable(config)
  image, _ = by_hand(asked, documents)
  classes = sorted({one.parts[-1].text for one in documents})
  assert set(classes) == set(CAPTIONS) and results["chance"] == 1 / len(classes)
  vectors = []
  for name in classes:
    told = [type(documents[0])((documents[0].parts[0], type(documents[0].parts[1])(
      pattern.format(name), loss=True)), "pictures", f"{name}{pattern}")
      for pattern in ("{}", "why {}?")]
    mean = by_hand(asked, told)[1].mean(0)
    vectors.append(mean / np.linalg.norm(mean))
  picked = (image @ np.array(vectors).T).argmax(1)
  right = [classes[pick] == one.parts[-1].text for pick, one in zip(picked, documents, strict=True)]
  assert results["accuracy"] == pytest.approx(np.mean(right))
  assert results["low"] <= results["accuracy"] <= results["high"]
  assert results["accuracy@5"] == 1 and results["pictures"] == len(documents)


def test_a_choice_is_the_text_nearest_to_the_picture(asked):
  config, params = asked
  config = config.copy_and_resolve_references()
  config.evals.pick = base.evaluation(
    kind="choice", source="pictures", split="test", form="match", batch=3, controls=())
  rows = run.measure(run.find_kind("choice"), config, params, config.evals.pick, "test")[1][""]
  opened = pipeline.documents(config, "pictures", "test", "match")
  documents = {one.key: one for one in map(opened.__getitem__, range(len(opened)))}
  assert len({tuple(row["matches"]) for row in rows}) == len(rows) > 1
  for row in rows:
    picture, *captions = documents[row["key"]].parts
    alone = [type(documents[row["key"]])((picture, dataclasses.replace(one, branch=0, loss=True)),
                                         "pictures", one.text) for one in captions]
    image, text = by_hand(asked, alone)
    assert row["matches"] == pytest.approx((image * text).sum(1).tolist(), abs=1e-6)
    assert row["prediction"] == row["options"][int(np.argmax(row["matches"]))]
    assert row["score"] == (row["prediction"] == row["answers"][0]) and "tokens" not in row
  for field, value, sentence in (("controls", ("none",), "chooses a text for a picture"),
                                 ("options", "letters", "options is 'letters'.*says nothing")):
    config.evals.pick[field] = value
    with pytest.raises(UsageError, match=sentence):
      run.measure(run.find_kind("choice"), config, params, config.evals.pick, "test")


def test_a_pair_is_what_the_model_says_of_it_where_it_can(asked, monkeypatch):
  config, params = asked
  told = lambda self, batch: np.stack([np.arange(3.0)[:, None], -np.ones((3, 1))], axis=-1)
  monkeypatch.setattr(find_fusion(config).Model, "matching", told, raising=False)
  flat = {path: np.zeros((3, 1, *field.shape), field.dtype)
          for path, field in find_fusion(config).fields(config).items()}
  assert pairs.scores.__wrapped__(FrozenConfigDict(config), params, flat).tolist() == [-1, -2, -3]


def test_who_cannot_be_asked(asked, setup):
  config, params = asked
  config = config.copy_and_resolve_references()
  config.evals.say = base.evaluation(kind="caption", source="pictures", split="test")
  with pytest.raises(UsageError, match="kind 'caption' asks speakers.*'retrieval' or 'choice'"):
    run.evaluate(config, params, None, names=["say"])
  config.evals.classes.templates = ("a drawing",)
  with pytest.raises(UsageError, match=r"templates is \('a drawing',\)"):
    run.evaluate(config, params, None, names=["classes"])
  config.evals.find.controls = ("none",)
  with pytest.raises(UsageError, match="cannot be 'none'"):
    run.evaluate(config, params, None, names=["find"])
  with pytest.raises(UsageError, match="says nothing; ask it by `vlm-jax evaluate`"):
    layouts([], config)
  speaker = setup[0].copy_and_resolve_references()
  speaker.evals.classes = base.evaluation(kind="zero_shot", source="pictures", split="test")
  with pytest.raises(UsageError, match="kind 'zero_shot' asks embedders"):
    run.evaluate(speaker, setup[1], None, names=["classes"])
