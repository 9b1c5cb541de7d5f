"""Two real sources on a model of few parameters: the real pipeline and strategy, quick to kill."""

from vlm_jax.configs import base


def get_config(arg=""):
  del arg
  config = base.get_config()
  config.tower.update(patch=16, width=16, depth=1, mlp=16, heads=2)
  config.llm.update(width=16, depth=2, mlp=16, heads=2, kv_heads=1)
  config.data.update(tokens=128, rows=4, images=2)
  config.data.sources.easy_vqa = base.source(
    name="easy_vqa", form="fan_out", ratio=2, augment=("flip", "translate"))
  config.data.sources.pydoc = base.source(name="pydoc", form="text", weight=0.2)
  config.train.update(steps=40, log_every=1, checkpoint_every=5)
  config.optim.warmup = 2
  return config
