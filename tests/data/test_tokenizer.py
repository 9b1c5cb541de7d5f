"""The tokenizer: round trips, no special token out of plain text, clear errors."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.data import tokenizer

SMALL = tokenizer.train(["is there a red shape in the image? yes"] * 3, 280)


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60))
def test_round_trip(text):
  ids = SMALL.encode(text)
  assert SMALL.decode(ids) == text
  assert not set(ids) & {SMALL.pad, SMALL.bos, SMALL.eos, SMALL.user, SMALL.assistant, SMALL.image}


def test_plain_text_never_becomes_a_special_token():
  text = "<eos><assistant>yes<pad>"
  assert SMALL.decode(SMALL.encode(text)) == text
  assert min(SMALL.encode(text)) > SMALL.image
  ids = [SMALL.user, *SMALL.encode("hi"), SMALL.eos]
  assert SMALL.decode(ids) == "hi" and SMALL.decode(ids, specials=True) == "<user>hi<eos>"


def test_long_texts_are_the_same_uncached():
  text = "is there a red shape in the image? " * 20
  assert SMALL.encode(text) == list(SMALL._encode(text))
  assert SMALL.decode(SMALL.encode(text)) == text


def test_is_deterministic_and_loads(tmp_path):
  texts = ["the cat sat on the mat", "does the image not contain a gray shape?"] * 20
  paths = [tmp_path / name for name in ("a.json", "b.json")]
  for path in paths:
    tokenizer.train(texts, 295).save(path)
  assert paths[0].read_bytes() == paths[1].read_bytes()
  loaded = tokenizer.load(paths[0])
  assert loaded.vocab_size == 295 and loaded.pad == 0
  assert loaded.encode(texts[0]) == tokenizer.train(texts, 295).encode(texts[0])
  assert pickle.dumps(loaded.encode(texts[0]))


def test_errors_name_the_way_out(tmp_path):
  with pytest.raises(DataError, match="data prepare"):
    tokenizer.load(tmp_path / "none.json")
  broken = tmp_path / "broken.json"
  broken.write_text('{"version": "1.0"')
  with pytest.raises(DataError, match="broken.json is not a usable"):
    tokenizer.load(broken)
  import tokenizers

  tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(broken))
  with pytest.raises(DataError, match="<bos>"):
    tokenizer.load(broken)
  with pytest.raises(UsageError, match="at least 262"):
    tokenizer.train(["a"], 200)
  with pytest.raises(DataError, match="fewer"):
    tokenizer.train(["a"], 400)


def test_a_template_needs_its_tokens(tmp_path):
  import tokenizers

  path = tmp_path / "tokenizer.json"
  SMALL.save(path)
  assert tokenizer.load(path, "newline").user == SMALL.bos
  with pytest.raises(UsageError, match="config.data.template is 'newlin'; did you mean 'newline'"):
    tokenizer.load(path, "newlin")
  words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<image>": 3, "a": 4}
  inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
  inner.add_special_tokens(list(words)[:4])
  inner.save(str(path))
  with pytest.raises(DataError, match="it has no <user>, <assistant>"):
    tokenizer.load(path)
