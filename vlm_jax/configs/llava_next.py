"""LLaVA-NeXT (llava-vl.github.io/blog/2024-01-30-llava-next): LLaVA-1.5 that reads images in tiles.

The first stage is LLaVA-1.5's but for the newline. In the second the tower trains too, at a tenth
of the rate (2e-6 to 2e-5), and an image is seen whole and cut into up to four tiles of 336 pixels:
up to 2928 slots. LLaVA-1.5's file stands for its own mix of 760 thousand conversations. The images
of a row are the squares of one picture. Arguments: those of configs/llava_1_5.py.
"""

from ml_collections import ConfigDict

from vlm_jax.configs import llava_1_5
from vlm_jax.convert import processor


def get_config(arg: str = "") -> ConfigDict:
  """The recipe; `arg` as in configs/llava_1_5.py."""
  config = llava_1_5.get_config(arg)
  config.fusion.name = "llava_next"
  if config.fusion.stage == "projector":
    return config
  config.fusion.stage = "all"
  config.optim.groups = (("tower", 0.1),)
  config.data.decode.grids = processor.grids(processor.PINPOINTS, 336)
  config.data.decode.fit, config.data.decode.border = "stretch", processor.BLACK
  config.data.images = 1 + max(rows * columns for rows, columns in config.data.decode.grids)
  config.data.tokens = 4096 if config.tower.image_size == 336 else 256
  return config
