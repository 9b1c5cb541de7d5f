"""Flamingo of published pieces on a laptop: those of `llava_smollm2`, its data and its steps.

EfficientNet-Lite0 and SmolLM2-135M stay as they are. What trains is a resampler, 16 patches to
four rows that never enter the text, and a gated layer before every sixth of the decoder's 30. One
stage has the steps of LLaVA's two. A picture has one slot of text. Arguments, joined by commas:

  debug   seconds: tiny modules with random weights; its numbers mean nothing
"""

from ml_collections import ConfigDict

from vlm_jax.configs import base, llava_smollm2


def get_config(arg: str = "") -> ConfigDict:
  """The recipe; `arg` is words of the list above."""
  (debug,) = base.choose(arg, ("", "debug"))
  config = llava_smollm2.pieces()
  config.fusion.name = "flamingo"
  config.fusion.image_attention = "last"
  config.fusion.stage = "bridge"
  config.connector.update(name="perceiver", latents=4, depth=2, heads=8, head_dim=64,
                          activation="relu2")
  config.bridge.update(every=6, norm_eps=1e-5)
  # A step moves a gate by the rate itself: at that of the rest, these steps would leave them shut.
  config.optim.groups = (("bridge/.*_gate", 10.0),)
  config.train.steps = sum(llava_smollm2.STEPS.values())
  llava_smollm2.ask(config)
  return shrink(config) if debug else config


def shrink(config: ConfigDict) -> ConfigDict:
  """The recipe at the size of a test: the same parts, narrow and few, and no published weights."""
  config = llava_smollm2.shrink(config)
  config.connector.update(latents=2, depth=1, heads=2, head_dim=16)
  config.bridge.every = 2
  return config
