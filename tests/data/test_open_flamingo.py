"""The template "open_flamingo" writes the ids of the texts that OpenFlamingo was trained on.

Its training code writes a page as one string, sentence after sentence, with both marks before each
that has a picture, takes the first <|endofchunk|> away, and closes it; a caption is a page of one
sentence.
"""

import numpy as np
import pytest
import transformers
from tokenizers import processors

from tests.data import tokenizers_of_others as others
from vlm_jax.core.document import Document, Image, Pixels, Text, Tokens
from vlm_jax.core.errors import DataError
from vlm_jax.data import template, tokenizer

EOS, CHUNK, IMAGE, BOS = "<|endoftext|>", "<|endofchunk|>", "<image>", "<s>"
PICTURE = Image(np.zeros((4, 4, 3), np.uint8))


@pytest.fixture(scope="module", params=["no bos", "bos"])
def both(request, tmp_path_factory):
  """The tokenizer here and there; Llama's begins a text with a mark, GPT-NeoX's does not."""
  inner = others.bytes_of(400, (EOS, BOS, CHUNK, IMAGE))
  if request.param == "bos":
    inner.post_processor = processors.TemplateProcessing(
      single=f"{BOS} $A", special_tokens=[(BOS, inner.token_to_id(BOS))])
  folder = others.save(inner, tmp_path_factory.mktemp("words"), eos_token=EOS, pad_token=EOS)
  return (tokenizer.load(str(folder), "open_flamingo"),
          transformers.PreTrainedTokenizerFast.from_pretrained(folder))


def encode(parts, words, function=template.encode):
  """ids, and which of them are predicted; a picture is its token there."""
  encoded = function(Document(tuple(parts), "s", "k"), words, lambda image: Pixels(image.data))
  ids, loss = [], []
  for part in encoded.parts:
    ids += part.ids.tolist() if isinstance(part, Tokens) else [words.image]
    loss += part.loss.tolist() if isinstance(part, Tokens) else [False]
  return ids, loss


PAGES = [  # theirs, sentence by sentence: pictures before it, and it; and ours
  ([(0, "a small circle."), (1, "the fox"), (0, "jumps over"), (1, "a lazy dog!")],
   (Text("a small circle.", loss=True), PICTURE,
    Text("the fox jumps over", loss=True, continues=True), PICTURE,
    Text("a lazy dog!", loss=True, continues=True))),
  ([(2, "red circle and blue square")],
   (PICTURE, PICTURE, Text("red circle and blue square", loss=True))),
  ([(1, "a photo")], (PICTURE, Text("a photo", loss=True))),
]


@pytest.mark.parametrize("sentences, parts", PAGES, ids=["page", "two pictures", "caption"])
def test_a_page_is_theirs(both, sentences, parts):
  words, theirs = both
  text = " ".join(f"{CHUNK}{IMAGE}" * count + sentence for count, sentence in sentences)
  whole = text.replace(CHUNK, "", 1)
  for mark, plain in ((f" {CHUNK}", CHUNK), (f"{IMAGE} ", IMAGE), (f" {IMAGE}", IMAGE)):
    whole = whole.replace(mark, plain)
  expected = theirs(f"{whole}{CHUNK}{EOS}")["input_ids"]
  ids, loss = encode(parts, words)
  assert ids == expected
  # Predicted is all but pictures and what a tokenizer puts in front.
  unsaid = {theirs.convert_tokens_to_ids(IMAGE), theirs.convert_tokens_to_ids(BOS)}
  assert loss == [number not in unsaid for number in expected]
  # Twin: the first mark left where it was.
  assert ids != theirs(f"{text}{CHUNK}{EOS}")["input_ids"]


def test_questions_and_answers_are_theirs(both):
  words, theirs = both
  asked = [("what is in this picture?", "a dog"), ("one or two?", "two")]
  text = "".join(f"{IMAGE}Question:{question} Short answer:{answer}{CHUNK}"
                 for question, answer in asked)
  parts = [part for question, answer in asked
           for part in (PICTURE, Text(question, "user"), Text(answer, "assistant", loss=True))]
  ids, loss = encode(parts, words)
  assert ids == theirs(text)["input_ids"]
  said = [theirs.decode([number]) for number, learned in zip(ids, loss, strict=True) if learned]
  assert "".join(said) == f"a dog{CHUNK}two{CHUNK}"
  prompt, _ = encode((*parts[:-1], Text("", "assistant")), words, template.encode_prompt)
  assert prompt == theirs(text[: text.rindex("two")])["input_ids"]
  assert set(words.stops) == {theirs.convert_tokens_to_ids(name) for name in (CHUNK, EOS)}
  caption, _ = encode((PICTURE, Text("", "text")), words, template.encode_prompt)
  assert caption == theirs(IMAGE)["input_ids"]


def test_a_tokenizer_without_the_mark_is_refused(tmp_path):
  tokenizer.train(["what is it? a cat is here"] * 10, 270).save(str(tmp_path / "words.json"))
  with pytest.raises(DataError, match=r"it has no '<\|endofchunk\|>'"):
    tokenizer.load(str(tmp_path / "words.json"), "open_flamingo")
