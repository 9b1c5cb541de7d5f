"""A small config that packs the prepared data."""

import sys
from pathlib import Path

import pytest

from vlm_jax.configs import base

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # workers import `tests.data.broken_source` by name


@pytest.fixture
def config(root):
  config = base.get_config()
  config.fusion.name = "prefix_lm"
  config.tower.patch = 16  # 16 slots an image
  config.data.root = root
  config.data.rows, config.data.tokens, config.data.images = 4, 256, 3
  config.data.window, config.data.prefetch = 60, 0
  config.data.sources.easy_vqa = base.source(name="easy_vqa", form="fan_out", ratio=2,
                                             augment=("flip", "translate"))
  config.data.sources.pydoc = base.source(name="pydoc", form="text", ratio=1)
  return config


@pytest.fixture
def two_streams(config):
  """The same data for an encoder-decoder."""
  config.fusion.name, config.connector.name = "simvlm", "linear"
  config.tower.name, config.tower.depths = "resnet", (1, 1, 1)
  config.llm.update(name="encoder_decoder", positions=256)
  return config
