"""Few-shot: what stands before a question, which shots are chosen, and their shuffled control."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from vlm_jax.configs import base
from vlm_jax.core.document import Document, Image, Text
from vlm_jax.core.errors import UsageError
from vlm_jax.evals import asking
from vlm_jax.evals.kinds import few_shot, find_kind, measure
from vlm_jax.evals.reading import Split


@pytest.fixture
def asked(setup):
  """(config, parameters, entry) of two questions a picture, one at a time."""
  config = setup[0].copy_and_resolve_references()
  config.evals.look.update(dict(
    kind="few_shot", form="single", shots=(0, 2), controls=("shuffled_shots",), limit=3,
    shots_split="test"))
  return config, setup[1], config.evals.look


def documents(config, params, entry, count: int, shuffled: bool = False) -> list[Document]:
  """The documents that are asked, before they become tokens."""
  shots = few_shot.Shots(config, params, entry, "real", shuffled)
  opened, found = Split(config, entry, "test", "real"), []
  encode = lambda document, *rest: found.append(document)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(few_shot.template, "encode_prompt", encode)
    list(opened.examples(lambda document: shots.prompts(count, document, opened, entry)))
  return found


def test_each_question_is_asked_behind_every_number_of_shots(asked):
  config, params, entry = asked
  numbers, predictions = measure(find_kind("few_shot"), config, params, entry, "test")
  rows = predictions[""]
  assert numbers["questions"] == len(rows) == 3 and {"accuracy@0", "low@2"} <= numbers.keys()
  assert numbers["accuracy"] == numbers["accuracy@2"] == np.mean([r["score@2"] for r in rows])
  for row in rows:
    assert row["prediction"] == row["prediction@2"] and row["score"] == row["score@2"]
  # Noise says something else behind shots, so the shots are read.
  assert any(row["prediction@0"] != row["prediction@2"] for row in rows)
  assert predictions.keys() == {"", "shuffled_shots"} == {"", *numbers["controls"]}
  # Without shots a question is the one that `vqa` asks.
  plain, _ = asking.ask(config, params, entry, "test", "real")
  assert [row["prediction@0"] for row in rows] == [row["prediction"] for row in plain]


def test_random_shots_are_other_pictures_solved(asked):
  config, params, entry = asked
  for document in documents(config, params, entry, 3):
    shots, question = document.parts[:-3], document.parts[-3:]
    roles = [getattr(part, "role", "image") for part in shots]
    assert roles == ["image", "user", "assistant"] * 3
    pictures = [part.data for part in document.parts if isinstance(part, Image)]
    assert len(set(pictures)) == 4, "a shot shows the picture that is asked about, or two the same"
    assert question[-1].role == "assistant"
  again = documents(config, params, entry, 3)
  assert again == documents(config, params, entry, 3), "not repeatable"
  assert len({str(one.parts[:-3]) for one in again}) > 1, "all questions have the same shots"


def test_similar_shots_are_in_the_order_of_likeness_the_nearest_last(asked):
  config, params, entry = asked
  entry.choose = "similar"
  opened = Split(config, entry, "train", "real")
  frozen = FrozenConfigDict(config)
  look = lambda image: few_shot.features(frozen, params["tower"],
                                         opened.decode_image(image).values[None])[0]
  for document in documents(config, params, entry, 4):
    *shots, mine = (look(part) for part in document.parts if isinstance(part, Image))
    likeness = [float(shot @ mine) for shot in shots]
    assert len(likeness) == 4 and likeness == sorted(likeness) and likeness[-1] < 1 - 1e-6
    assert np.linalg.norm(mine) == pytest.approx(1)


def episode(names: str) -> Document:
  parts = [part for name in names for part in (
    Image(np.full((8, 8, 3), ord(name), np.uint8)), Text(name, "assistant", loss=True))]
  return Document(tuple(parts), "pictures", "episode")


def own(count: int, shuffled: bool = False) -> list[str]:
  """The names in the document that is asked with `count` shots of its own."""
  entry = base.evaluation(choose="own")
  shots = few_shot.Shots(SimpleNamespace(seed=0), {}, entry, "real", shuffled)
  found: list[Document] = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(few_shot.template, "encode_prompt", lambda one, *rest: found.append(one))
    shots.prompts(count, episode("abcdefga"), SimpleNamespace(tokenizer=None, decode_image=None),
                  entry)
  pictures = [chr(part.data[0, 0, 0]) for part in found[0].parts if isinstance(part, Image)]
  names = [part.text for part in found[0].parts if isinstance(part, Text)]
  return ["".join(pictures), "".join(names)]


def test_own_shots_are_the_last_turns_and_shuffling_leaves_all_but_who_is_what():
  assert own(0) == ["a", "a"] and own(3) == ["efga"] * 2 and own(7) == ["abcdefga"] * 2
  pictures, names = own(7, shuffled=True)
  assert pictures == "abcdefga" and names[-1] == "a"
  assert names != pictures and sorted(names) == sorted(pictures)
  with pytest.raises(UsageError, match="asks for 8, more than there are for document episode"):
    own(8)


def test_fields_that_cannot_be(asked):
  config, params, entry = asked
  kind = find_kind("few_shot")
  for field, value, sentence in (
      ("shots", (), "shots is .*whole numbers"), ("shots", (-1,), "whole numbers, 0 or more"),
      ("choose", "similiar", "did you mean 'similar'"), ("form", "fan_out", "asks in branches"),
      ("shots", (40,), "shots asks for 40, more than there are"),
      ("images", "reel", "images of source 'pictures' is 'reel'")):
    wrong = entry.copy_and_resolve_references()
    wrong[field] = value
    with pytest.raises(UsageError, match=sentence):
      measure(kind, config, params, wrong, "test")
  pictureless = dataclasses.replace(episode("ab"), parts=(Text("x", "assistant"),))
  entry.choose = "similar"
  shots = few_shot.Shots(config, params, entry, "real", False)
  with pytest.raises(UsageError, match="has no picture, and choose='similar'"):
    shots.prompts(1, pictureless, Split(config, entry, "test", "real"), entry)
