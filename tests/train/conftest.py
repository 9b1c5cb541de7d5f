"""Makes `tests.train.tiny_fusion` importable by name and gives all runs one compilation cache."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(cache):
  from tests.train import tiny_fusion

  config = tiny_fusion.get_config()
  config.train.compilation_cache = str(cache)
  return config
