"""What a connector that reads is told: whose turn, whose tokenizer, how much."""

import numpy as np
import pytest
import tokenizers

from vlm_jax.configs import base
from vlm_jax.core.document import Document, Image, Pixels, Text
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.data import draw, instruction, template, tokenizer

PICTURE = Image(np.zeros((4, 4, 3), np.uint8))
SAID = Text("yes", "assistant", True)


def document(*parts):
  return Document(parts, "pets", "key")


def asks(*texts, **kwargs):
  return [Text(text, "user", **kwargs) for text in texts]


@pytest.mark.parametrize("parts, told", [
  ((PICTURE, *asks("a cat?"), SAID), ["a cat?"]),
  ((*asks("look"), PICTURE, *asks("a cat?", continues=True), SAID), ["look a cat?"]),
  # Neither what is said nor what is asked once it is said; every turn asks about its own pictures.
  ((PICTURE, *asks("one?"), SAID, PICTURE, PICTURE, *asks("two?"), SAID), ["one?", "two?", "two?"]),
  ((Text("be kind", "system"), PICTURE, *asks("why?"), SAID), ["why?"]),
  ((PICTURE, Text("a cat", "text", True)), [""]),
  ((PICTURE, *asks("a cat?"), Text("no", "assistant", False, 1), SAID), ["a cat?"]),
  ((*asks("a cat?"), SAID), []),
])
def test_an_instruction_is_what_is_asked_in_the_turn(parts, told):
  assert instruction.instructions(document(*parts)) == told


def test_branches_that_ask_for_themselves_are_refused():
  parts = (PICTURE, *asks("a cat?", branch=1), Text("yes", "assistant", True, 1))
  with pytest.raises(UsageError, match="document key of 'pets' asks in branches, but"):
    instruction.instructions(document(*parts))
  assert instruction.instructions(document(*parts[1:])) == []  # there is no picture to read


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
  """A tokenizer.json that lowers words and puts marks at both ends, as BERT's."""
  vocab = {word: row for row, word in enumerate(("[PAD]", "[CLS]", "[SEP]", "a", "cat", "[UNK]"))}
  inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
  inner.normalizer = tokenizers.normalizers.Lowercase()
  inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  inner.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
  inner.post_processor = tokenizers.processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
  inner.enable_truncation(3)
  inner.enable_padding(length=9)
  folder = tmp_path_factory.mktemp("bert")
  inner.save(str(folder / "tokenizer.json"))
  return folder


@pytest.mark.parametrize("whole", [False, True])
def test_ends_stay_where_a_text_is_cut(bert, whole):
  reader = instruction.load(str(bert if whole else bert / "tokenizer.json"), 5)
  assert reader.vocab_size == 6
  assert list(reader.encode("A cat")) == [1, 3, 4, 2]
  assert list(reader.encode("a cat a cat a")) == [1, 3, 4, 3, 2]
  assert list(reader.encode("")) == [1, 2]
  assert 2 not in list(reader.encode("a [SEP]"))[1:-1]  # text is only ever text


def test_both_tokenizers_read_a_document(bert, tmp_path):
  words = tokenizer.train(["is it a cat? yes"] * 10, 270)
  words.save(tmp_path / "tokenizer.json")
  config = base.get_config()
  config.fusion.name = "instructblip"
  config.connector.update(name="qformer", vocab_size=6)
  config.data.update(tokenizer=str(tmp_path / "tokenizer.json"), instruction_tokenizer=str(bert),
                     instruction_tokens=8)
  both = draw.load_tokenizer(config)
  spoken = document(PICTURE, *asks("a cat?"), SAID)
  for encode in (template.encode, template.encode_prompt):
    encoded = encode(spoken, both, lambda image: Pixels(image.data))
    np.testing.assert_array_equal(encoded.parts[0].words, [1, 3, 4, 5, 2])
    assert words.decode(encoded.parts[1].ids) == "a cat?"
  # The language model's own, without ends, where the Q-Former has none.
  config.data.instruction_tokenizer, config.connector.vocab_size = "", 270
  reader = draw.load_tokenizer(config).reader
  assert list(reader.encode("a cat?")) == words.encode("a cat?")[:8]
  # Confused, or of another vocabulary: one sentence that names both.
  config.connector.vocab_size = 6
  with pytest.raises(UsageError, match=r"language model's tokenizer .* has 270 tokens but "
                     r"config.connector.vocab_size is 6; set config.data.instruction_tokenizer"):
    draw.load_tokenizer(config)
  config.data.instruction_tokenizer = str(tmp_path / "tokenizer.json")
  with pytest.raises(UsageError, match=r"tokenizer.json has 270 tokens but config.connector.vocab"):
    draw.load_tokenizer(config)
  # What does not read is told nothing.
  config.fusion.name = "blip2"
  assert draw.load_tokenizer(config).reader is None


def test_files_that_are_no_tokenizer(tmp_path):
  with pytest.raises(DataError, match="set config.data.instruction_tokenizer to"):
    instruction.load(str(tmp_path / "none.json"), 5)
  (tmp_path / "some.json").write_text("{}")
  with pytest.raises(DataError, match="some.json is not a usable tokenizer.json"):
    instruction.load(str(tmp_path / "some.json"), 5)
  with pytest.raises(DataError, match="has no tokenizer.json"):
    instruction.load(str(tmp_path), 5)
