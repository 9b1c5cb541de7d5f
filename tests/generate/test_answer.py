"""What `vlm-jax generate` prints."""

import numpy as np
import pytest

from tests.data.broken_source import png
from tests.generate.helpers import noise, tiny
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.data import tokenizer
from vlm_jax.generate.answer import answer
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
  return config, noise(config), folder


def test_an_answer_depends_on_the_picture(setup):
  config, params, folder = setup
  said = {name: answer(config, params, "what is it?", [folder / name], max_tokens=4)
          for name in ("a.png", "b.png")}
  one = said["a.png"]
  assert one["tokens"] != said["b.png"]["tokens"]
  words = tokenizer.load(config.data.tokenizer)
  assert one["image_tokens"] == 4
  assert one["prompt_tokens"] == 4 + 1 + len(words.encode("what is it?")) + 1
  assert one["stopped"] or len(one["tokens"]) == 4
  assert one["log_prob"] < 0 < one["seconds"]
  again = answer(config, params, "what is it?", [folder / "a.png"], max_tokens=4)
  assert {**again, "seconds": 0} == {**one, "seconds": 0}
  warm = lambda seed: answer(config, params, "what is it?", [folder / "a.png"], max_tokens=4,
                             sampling=Sampling(temperature=3.0, seed=seed))["tokens"]
  assert warm(1) == warm(1) and len({tuple(warm(seed)) for seed in range(4)}) > 1


def test_no_picture_and_two_pictures(setup):
  config, params, folder = setup
  none = answer(config, params, "what is it?", max_tokens=4)
  two = answer(config, params, "what is it?", [folder / "a.png", folder / "b.png"], max_tokens=4)
  assert none["image_tokens"] == 0 and two["image_tokens"] == 8
  assert two["prompt_tokens"] == none["prompt_tokens"] + 8
  assert np.isfinite([none["log_prob"], two["log_prob"]]).all()


def test_what_cannot_be_answered(setup):
  config, params, folder = setup
  with pytest.raises(UsageError, match="--prompt is empty"):
    answer(config, params, "  ")
  with pytest.raises(UsageError, match="--max-tokens is 0"):
    answer(config, params, "what?", max_tokens=0)
  with pytest.raises(DataError, match="missing.png: .*does not exist"):
    answer(config, params, "what?", [folder / "missing.png"])
  with pytest.raises(DataError, match="text.png: .*not an image"):
    answer(config, params, "what?", [folder / "text.png"])
