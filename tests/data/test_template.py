"""The template, token by token, and what splitting keeps together."""

import numpy as np
import pytest

from vlm_jax.core.document import Document, Image, Pixels, Text
from vlm_jax.core.layout import split
from vlm_jax.data import template, tokenizer
from vlm_jax.data.bad import BadExample

PIXELS = np.zeros((4, 4, 3), np.uint8)


@pytest.fixture(scope="module")
def words():
  return tokenizer.train(["what is it? a cat is here"] * 10, 270)


def encode(words, *parts, function=template.encode):
  return function(Document(parts, "s", "key"), words, lambda image: Pixels(image.data))


def golden(encoded, words):
  """One line a part: branch, turn, every token, predicted ones in brackets."""
  lines = []
  for part in encoded.parts:
    if isinstance(part, Pixels):
      lines.append(f"{part.turn} image")
      continue
    pieces = [words.decode([i], specials=True) for i in part.ids]
    text = "".join(f"[{p}]" if loss else p for p, loss in zip(pieces, part.loss, strict=True))
    lines.append(f"{part.turn} {part.branch} {text}")
  return lines


def test_conversation(words):
  encoded = encode(
    words, Text("be", "system"), Image(PIXELS), Text("hi", "user"), Text("yo", "assistant", True),
    Text("so", "user"), Text("no", "assistant"), Text("go", "user"), Text("xy", "assistant", True))
  assert golden(encoded, words) == [
    "0 0 <bos>be", "0 image", "0 0 <user>hi", "0 0 <assistant>[y][o][<eos>]",
    "1 0 <user>so", "1 0 <assistant>no<eos>", "2 0 <user>go", "2 0 <assistant>[x][y][<eos>]"]


def test_plain_begins_with_a_mark_and_then_every_part_is_a_line(words):
  lines = tokenizer.Tokenizer(words.inner, "plain")
  encoded = encode(lines, Image(PIXELS), Text("hi", "user", branch=1),
                   Text("yo", "assistant", True, 1), Text("be", "user", branch=2),
                   Text("so", "assistant", True, 2))
  assert golden(encoded, lines) == [
    "0 0 <bos>", "0 image", "1 1 \nhi", "1 1 \n[y][o][<eos>]", "2 2 \nbe", "2 2 \n[s][o][<eos>]"]
  prompt = encode(lines, Image(PIXELS), Text("hi", "user"), Text("", "assistant"),
                  function=template.encode_prompt)
  assert golden(prompt, lines) == ["0 0 <bos>", "0 image", "0 0 \nhi", "0 0 \n"]
  caption = encode(lines, Image(PIXELS), Text("yo", loss=True))
  assert golden(caption, lines) == ["0 0 <bos>", "0 image", "0 0 \n[y][o][<eos>]"]


def test_newline_is_paligemmas(words):
  """<bos> opens the prompt, a line break the answer; it is a token of its own and no prediction."""
  lines = tokenizer.Tokenizer(words.inner, "newline")
  encoded = encode(lines, Image(PIXELS), Text("hi", "user"), Text("yo", "assistant", True))
  assert golden(encoded, lines) == ["0 image", "0 0 <bos>hi", "0 0 \n[y][o][<eos>]"]
  prompt = encode(lines, Image(PIXELS), Text("hi", "user"), Text("", "assistant"),
                  function=template.encode_prompt)
  assert golden(prompt, lines) == ["0 image", "0 0 <bos>hi", "0 0 \n"]


def test_fan_out(words):
  encoded = encode(
    words, Image(PIXELS), Text("hi", "user", branch=1), Text("y", "assistant", True, 1),
    Text("so", "user", branch=2), Text("n", "assistant", True, 2))
  assert encoded.branched
  assert golden(encoded, words) == [
    "0 image", "1 1 <user>hi", "1 1 <assistant>[y][<eos>]",
    "2 2 <user>so", "2 2 <assistant>[n][<eos>]"]


def test_text_and_specials_in_text(words):
  encoded = encode(words, Text("ab", "text", loss=True), Image(PIXELS), Text("b", "text"))
  assert golden(encoded, words) == ["0 0 <bos>[a][b][<eos>]", "1 image", "1 0 <bos>b<eos>"]
  encoded = encode(words, Text("<eos>", "text", loss=True))
  assert words.eos not in encoded.parts[0].ids[1:-1]


def test_a_text_that_continues_has_one_mark_and_one_end(words):
  page = (Text("ab", loss=True), Image(PIXELS), Image(PIXELS), Text("c", loss=True, continues=True))
  assert golden(encode(words, *page), words) == [
    "0 0 <bos>[a][b]", "1 image", "1 image", "1 0 [c][<eos>]"]
  turn = (Text("hi", "user"), Image(PIXELS), Text("so", "user", continues=True),
          Text("y", "assistant", True))
  assert golden(encode(words, *turn), words) == [
    "0 0 <user>hi", "0 image", "0 0 so", "0 0 <assistant>[y][<eos>]"]


def test_a_prompt_of_a_page_ends_where_its_last_text_would_go_on(words):
  page = (Text("ab", loss=True), Image(PIXELS), Text("c", loss=True, continues=True))
  prompt = encode(words, *page, function=template.encode_prompt)
  assert golden(prompt, words) == ["0 0 <bos>[a][b]", "1 image", "1 0 "]


def test_prompt_ends_with_the_assistant(words):
  prompt = encode(words, Image(PIXELS), Text("hi", "user"), Text("yo", "assistant", loss=True),
                  function=template.encode_prompt)
  assert golden(prompt, words) == ["0 image", "0 0 <user>hi", "0 0 <assistant>"]


def test_a_caption_is_asked_for_by_its_mark(words):
  caption = Text("a cat", "text", loss=True)
  prompt = encode(words, Image(PIXELS), caption, function=template.encode_prompt)
  assert golden(prompt, words) == ["0 image", "0 0 <bos>"]
  assert golden(encode(words, caption, function=template.encode_prompt), words) == ["0 0 <bos>"]


def test_every_branch_of_a_prompt_is_open(words):
  prompt = encode(words, Text("hi", "user"), Text("y", "assistant", True, 1),
                  Text("so", "user", branch=2), Text(" ", "assistant", True, 2),
                  function=template.encode_prompt)
  assert golden(prompt, words) == [
    "0 0 <user>hi", "1 1 <assistant>", "2 2 <user>so", "2 2 <assistant>"]
  with pytest.raises(BadExample, match="not an answer"):
    encode(words, Text("hi", "user"), function=template.encode_prompt)


@pytest.mark.parametrize("reason, parts", [
  ("unknown_role", [Text("x", "narrator", loss=True)]),
  ("empty_text", [Text("x", "user"), Text(" \n", "assistant", loss=True)]),
  ("zero_loss", [Text("x", "user"), Text("y", "assistant")]),
  ("zero_loss", [Image(PIXELS)]),
])
def test_refuses(words, reason, parts):
  with pytest.raises(BadExample) as caught:
    encode(words, *parts)
  assert caught.value.reason == reason


def test_split_repeats_the_trunk_and_keeps_pairs(words):
  branches = [part for k in range(1, 7) for part in (
    Text("hi ho", "user", branch=k), Text("y", "assistant", True, k))]
  encoded = encode(words, Image(PIXELS), *branches)
  pieces = split(encoded, 40, lambda image: 16, 1)
  assert len(pieces) > 1
  answered = []
  for piece in pieces:
    image, *rest = piece.parts
    assert isinstance(image, Pixels) and sum(len(part.ids) for part in rest) + 16 <= 40
    assert [part.branch for part in rest[::2]] == [part.branch for part in rest[1::2]]
    assert not rest[0].loss.any() and rest[1].loss.any()
    answered += [part.branch for part in rest[::2]]
  assert answered == [1, 2, 3, 4, 5, 6]
  assert split(encoded, 20, lambda image: 16, 1) == []  # the image and one pair do not fit
  assert split(encoded, 40, lambda image: 16, 0) == []


def test_split_windows_lose_no_token(words):
  encoded = encode(words, Text("a cat is here " * 30, "text", loss=True))
  pieces = split(encoded, 17, lambda image: 16, 1)
  ids = np.concatenate([part.ids for piece in pieces for part in piece.parts])
  assert (ids == encoded.parts[0].ids).all() and all(len(p.parts[0].ids) <= 17 for p in pieces)


def test_words_behind_a_picture_continue_the_turn(words):
  encoded = encode(
    words, Text("is", "user"), Image(PIXELS), Text("a", "user", continues=True),
    Text("", "assistant"), function=template.encode_prompt)
  assert golden(encoded, words) == ["0 0 <user>is", "0 image", "0 0 a", "0 0 <assistant>"]
