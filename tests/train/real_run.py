"""Trains the resume recipe: `python -m tests.train.real_run WORKDIR [field=value ...]`."""

import sys

if __name__ == "__main__":  # a loader's workers import this file again and need none of it
  from tests.train import resume_recipe
  from vlm_jax.cli.config import override
  from vlm_jax.train.loop import train

  config = resume_recipe.get_config()
  override(config, [tuple(field.split("=")) for field in sys.argv[2:]])
  train(config, sys.argv[1])
