"""BLIP-2 of the pieces of `llava_smollm2`, with its data and steps: another connector, no more.

A Q-Former's four queries take the places of LLaVA's four slots. What reads what and what trains is
as there, adapters included, so that only the connector differs; a BLIP-2 as published leaves the
language model alone: stop after the first stage, or lengthen it. Arguments as of `llava_smollm2`.
"""

from ml_collections import ConfigDict

from vlm_jax.configs import llava_smollm2


def get_config(arg: str = "") -> ConfigDict:
  """The recipe; `arg` is words of `llava_smollm2`."""
  config = llava_smollm2.get_config(arg)
  config.fusion.name = "blip2"
  config.fusion.stage = {"projector": "bridge", "finetune": "adapt"}[config.fusion.stage]
  narrow = config.llm.width < 128  # the argument "debug"
  config.connector.update(name="qformer", latents=4, depth=2, norm_eps=1e-12,
                          **(dict(slot_width=48, heads=3) if narrow
                             else dict(slot_width=256, heads=4)))
  return config
