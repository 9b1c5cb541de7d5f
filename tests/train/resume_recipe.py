"""The quickstart's mix on a model of a few thousand parameters: the real pipeline, quick to kill."""

from vlm_jax.configs import quickstart


def get_config(arg=""):
  config = quickstart.get_config("debug")
  config.tower.update(patch=16, width=16, depth=1, mlp=16, heads=2)
  config.llm.update(width=16, depth=2, mlp=16, heads=2, kv_heads=1)
  config.data.update(tokens=128, rows=4, images=2)
  config.data.sources.easy_vqa.ratio = 2
  config.train.update(steps=40, log_every=1, checkpoint_every=5)
  for name in list(config.evals):
    del config.evals[name]
  return config
