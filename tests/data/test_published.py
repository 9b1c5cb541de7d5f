"""Texts of CLIP, SigLIP and SigLIP 2: the ids that the tokenizers of transformers give."""

import dataclasses
import json
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import pytest
import transformers

from tests.data import tokenizers_of_others as others
from vlm_jax.configs import base
from vlm_jax.core.document import Document, Text
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.data import published, spiece, template, tokenizer
from vlm_jax.data.pipeline import load_tokenizer

LENGTH = 16
WRITTEN = (
  "a photo of a circle", "A Photo, of the BLUE Square!!", "  two   blanks ", "it's\tdon't\nwhat?",
  "é çà ß 你好 ﬁne", "ΟΔΥΣΣΕΥΣ", "▁a mark", "¨ a", "what is in this picture? " * 9, "x", "!?",
  "a </s x> b", "12 345")
KINDS = {"clip": (others.clip, transformers.CLIPTokenizer),
         "siglip": (others.siglip, transformers.SiglipTokenizer),
         "siglip2": (others.siglip2, transformers.Siglip2Tokenizer)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Kind to the folder of its tokenizer and the config of a model that reads it."""
  found = {}
  for kind, (make, _) in KINDS.items():
    folder = tmp_path_factory.mktemp(kind)
    config = base.get_config()
    config.fusion.name = "clip" if kind == "clip" else "siglip"
    config.llm.update(name="text_tower", positions=LENGTH, vocab_size=make(folder, LENGTH))
    config.data.update(tokenizer=str(folder), template="caption")
    config.data.sources.only = base.source(name="only")
    found[kind] = folder, config
  return found


def our_ids(config, words, text):
  encoded = template.encode(Document((Text(text, loss=True),), "only", "key"), words, None)
  layout = find_fusion(config).layout(encoded, config, np.random.default_rng(0))
  return layout.arrays["documents/captions/tokens"][0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_theirs(kind, made):
  folder, config = made[kind]
  theirs, words = KINDS[kind][1].from_pretrained(folder), load_tokenizer(config)
  seen = set()
  for text in WRITTEN:
    expected = theirs(text, padding="max_length", max_length=LENGTH, truncation=True)["input_ids"]
    assert our_ids(config, words, text) == expected, text
    seen.update(expected)
  assert len(seen) > 30 and {words.eos, words.pad} <= seen


TWINS = {
  ("clip", "no ends"): lambda found: setattr(found.inner, "post_processor", None),
  ("clip", "case"): lambda found: setattr(found.inner, "normalizer", None),
  ("siglip", "class"): lambda found: dataclasses.replace(found, kind="", pieces=False),
  ("siglip", "first mark"): lambda found: dataclasses.replace(found, pieces=False),
  ("siglip", "padding"): lambda found: dataclasses.replace(
    found, settings={**found.settings, "pad_token": "<unk>"}),
  ("siglip2", "case"): lambda found: setattr(
    found.inner, "normalizer", found.inner.normalizer[1]),
  ("siglip2", "side"): lambda found: dataclasses.replace(
    found, settings={**found.settings, "padding_side": "left"}),
  ("siglip2", "no end"): lambda found: setattr(found.inner, "post_processor", None),
}


@pytest.mark.parametrize("kind, twin", TWINS)
def test_twins_are_seen(kind, twin, made):
  """Every convention matters: without it most of the texts are others."""
  folder, config = made[kind]
  found = published.read(folder)
  found = TWINS[kind, twin](found) or found
  broken = tokenizer.Tokenizer(found.inner, "caption", found, LENGTH)
  theirs = KINDS[kind][1].from_pretrained(folder)
  other = [text for text in WRITTEN if our_ids(config, broken, text) != theirs(
    text, padding="max_length", max_length=LENGTH, truncation=True)["input_ids"]]
  assert len(other) >= (2 if twin == "case" else 9), other


def test_without_its_directory_it_is_ours(made):
  """A caption of our own tokenizer keeps <bos>, words, <eos>, padded with zeros."""
  _, config = made["clip"]
  words = tokenizer.train(["a photo of a circle"] * 20, 270)
  caption = tokenizer.Tokenizer(words.inner, "caption")
  ids = our_ids(config, caption, "a photo")
  text = caption.encode("a photo")
  assert ids == [words.bos, *text, words.eos] + [0] * (LENGTH - len(text) - 2)


def test_what_is_missing_or_damaged_is_named(made, tmp_path):
  with pytest.raises(DataError, match="has no tokenizer.json"):
    tokenizer.load(tmp_path, "caption")
  folder, _ = made["siglip"]
  (tmp_path / published.CONFIG).write_text(json.dumps({"tokenizer_class": "SiglipTokenizer"}))
  whole = (folder / "spiece.model").read_bytes()
  for damaged in (whole[:-3], b"\xff" * 20, b""):
    (tmp_path / "spiece.model").write_bytes(damaged)
    with pytest.raises(DataError, match="spiece.model"):
      spiece.read(tmp_path / "spiece.model")
  with pytest.raises(UsageError, match="is a directory of a checkpoint; use 'checkpoint'"):
    tokenizer.load(folder, "marks")
  with pytest.raises(UsageError, match="no directory with a chat template"):
    tokenizer.load(folder, "checkpoint")
