"""What `vlm-jax generate` prints."""

import numpy as np
import pytest
from PIL import Image as PIL

from tests.data.broken_source import png
from tests.generate.helpers import noise, tiny
from vlm_jax.bundle import Bundle
from vlm_jax.core.document import Image
from vlm_jax.core.errors import DataError, DiskError, UsageError
from vlm_jax.data import tokenizer
from vlm_jax.generate.answer import Speaker, interleave
from vlm_jax.generate.sampling import Sampling


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
  folder = tmp_path_factory.mktemp("answer")
  words = tokenizer.train(["what is it? a picture of a thing, and of no other thing"] * 3, 270)
  words.save(str(folder / "tokenizer.json"))
  for name, seed in (("a.png", 1), ("b.png", 2)):
    (folder / name).write_bytes(png(seed, 40))
  (folder / "text.png").write_text("no picture")
  config = tiny()
  config.llm.vocab_size = 270
  config.data.tokenizer = str(folder / "tokenizer.json")
  return Bundle(config, noise(config)), folder


def test_an_answer_depends_on_the_picture(setup):
  bundle, folder = setup
  said = {name: bundle.answer("what is it?", [folder / name], max_tokens=4)
          for name in ("a.png", "b.png")}
  one = said["a.png"]
  assert one.tokens != said["b.png"].tokens
  words = bundle.tokenizer
  assert one.image_tokens == 4
  assert one.prompt_tokens == 4 + 1 + len(words.encode("what is it?")) + 1
  assert one.stopped or len(one.tokens) == 4
  assert one.log_prob < 0
  again = bundle.answer("what is it?", [folder / "a.png"], max_tokens=4)
  assert again == one
  warm = lambda seed: bundle.answer("what is it?", [folder / "a.png"], max_tokens=4,
                             sampling=Sampling(temperature=3.0, seed=seed)).tokens
  assert warm(1) == warm(1) and len({tuple(warm(seed)) for seed in range(4)}) > 1


def test_no_picture_and_two_pictures(setup):
  bundle, folder = setup
  none = bundle.answer("what is it?", max_tokens=4)
  two = bundle.answer("what is it?", [folder / "a.png", folder / "b.png"], max_tokens=4)
  assert none.image_tokens == 0 and two.image_tokens == 8
  assert two.prompt_tokens == none.prompt_tokens + 8
  assert np.isfinite([none.log_prob, two.log_prob]).all()


def test_a_streamed_answer_is_the_answer(setup):
  bundle, folder = setup
  pieces = []
  whole = bundle.answer("what is it?", [folder / "a.png"], max_tokens=9)
  said = bundle.answer("what is it?", [folder / "a.png"], max_tokens=9,
                write=pieces.append)
  assert said == whole
  assert "".join(pieces) == whole.text and len(whole.tokens) > 1


class Letters:
  """A tokenizer whose tokens are bytes."""

  def decode(self, tokens):
    return bytes(tokens).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
  "text", ["plain", " a  b ", "caf\u00e9 \u4e2d\u6587 \U0001f600 end", "x\u00e9"])
def test_only_whole_characters_are_shown(text):
  pieces, tokens = [], list(text.encode())
  speaker = Speaker(Letters(), pieces.append)
  for count in range(len(tokens) + 1):
    speaker.update(tokens[:count])
    assert text.strip().startswith("".join(pieces)) and "\ufffd" not in "".join(pieces)
  speaker.finish()
  assert "".join(pieces) == text.strip() and all(pieces)
  pieces.clear()
  speaker = Speaker(Letters(), pieces.append)
  speaker.update([*b"cut ", 0xE4])  # an answer that ends inside a character says so
  assert "".join(pieces) == "cut"
  speaker.finish()
  assert "".join(pieces) == "cut \ufffd"


def test_pictures_stand_where_the_prompt_says(setup):
  bundle, folder = setup
  files = [folder / "a.png", folder / "b.png"]
  one, two = Image(b"1"), Image(b"2")
  kinds = lambda prompt, pictures: [
    part.data if isinstance(part, Image) else (part.text, part.branch, part.continues)
    for part in interleave(prompt, pictures, 1)]
  end = lambda branch: ("", branch, False)
  assert kinds("what?", [one, two]) == [b"1", b"2", ("what?", 1, False), end(1)]
  assert kinds("<image><image> what?", [one, two]) == kinds("what?", [one, two])
  assert kinds("is <image> in <image>?", [one, two]) == [
    ("is", 0, False), b"1", ("in", 0, True), b"2", ("?", 0, True), end(0)]
  # The model sees the order of the pictures, and the words between them are one turn.
  said = [bundle.answer("a <image> of <image> thing", chosen, max_tokens=4)
          for chosen in (files, files[::-1])]
  assert said[0].tokens != said[1].tokens or said[0].log_prob != said[1].log_prob
  words = bundle.tokenizer
  count = sum(len(words.encode(text)) for text in ("a", "of", "thing"))
  assert said[0].prompt_tokens == 8 + 1 + count + 1
  for prompt, given in (("is <image>?", []), ("<image> <image>", files[:1]), ("a <image>", files)):
    with pytest.raises(UsageError, match="write one <image> for each"):
      bundle.answer(prompt, given)


def test_an_attention_map_beside_the_answer(setup, tmp_path):
  bundle, folder = setup
  ask = lambda **more: bundle.answer("what is it?", [folder / "a.png"], max_tokens=4,
                              **more)
  plain, drawn = ask(), ask(attention_map=tmp_path / "x.png", attention_layers=[-1])
  assert drawn == plain
  assert np.asarray(PIL.open(tmp_path / "x.png")).std() > 10
  with pytest.raises(UsageError, match="layers 0 to 1, got 5"):
    ask(attention_map=tmp_path / "y.png", attention_layers=[5])
  with pytest.raises(UsageError, match="ends in .png"):
    ask(attention_map=tmp_path / "y.jpg")
  (tmp_path / "folder.png").mkdir()
  with pytest.raises(DiskError, match="folder.png cannot be written"):
    ask(attention_map=tmp_path / "folder.png")
  with pytest.raises(DiskError, match="no directory"):
    ask(attention_map=tmp_path / "none" / "y.png")
  with pytest.raises(UsageError, match="needs a picture"):
    bundle.answer("what?", attention_map=tmp_path / "y.png")


def test_what_cannot_be_answered(setup):
  bundle, folder = setup
  with pytest.raises(UsageError, match="--prompt is empty"):
    bundle.answer("  ")
  with pytest.raises(UsageError, match="--max-tokens is 0"):
    bundle.answer("what?", max_tokens=0)
  with pytest.raises(DataError, match="missing.png: there is no such file"):
    bundle.answer("what?", [folder / "missing.png"])
  with pytest.raises(DataError, match="text.png: .*not an image"):
    bundle.answer("what?", [folder / "text.png"])
