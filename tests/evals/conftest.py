"""Prepared tiny data, and a tiny model of noise."""

import pytest

from tests.generate.helpers import noise, tiny
from vlm_jax.configs import base
from vlm_jax.data import prepare
from vlm_jax.evals import likelihood

SOURCE = "tests.evals.tiny_source"
VOCAB = 270


@pytest.fixture(autouse=True)
def one_shape(monkeypatch):
  """Short rows are as long as others: every other shape costs a compilation."""
  monkeypatch.setattr(likelihood, "FINE", likelihood.BUCKET)


@pytest.fixture(scope="session")
def setup(tmp_path_factory):
  root = str(tmp_path_factory.mktemp("data"))
  prepare.prepare(root, [SOURCE], VOCAB, log=lambda line: None)
  config = tiny()
  config.llm.vocab_size = VOCAB
  config.data.root, config.data.bad_limit = root, 0.5
  config.data.sources.pictures = base.source(name=SOURCE, form="fan_out")
  config.data.sources.words = base.source(name=SOURCE, form="text")
  config.evals.look = base.evaluation(
    source="pictures", split="test", batch=3, together=5, max_tokens=4, controls=("shuffled",))
  config.evals.read = base.evaluation(kind="perplexity", source="words", split="test", batch=3)
  return config, noise(config)
