"""Trains the resume recipe: `python -m tests.train.real_run WORKDIR [field=value ...]`."""

import sys

from tests.train import resume_recipe
from vlm_jax.cli.config import override
from vlm_jax.train.loop import train

if __name__ == "__main__":
  config = resume_recipe.get_config()
  override(config, [tuple(field.split("=")) for field in sys.argv[2:]])
  train(config, sys.argv[1])
