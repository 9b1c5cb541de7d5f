"""GridQA: how few visual tokens a strategy can keep a picture in, and what it loses with fewer.

Sixteen cells of eight colours, one question about each (`data/sources/gridqa.py`), a cell a patch,
and a decoder of three layers from scratch, so that a variant trains in about a minute on two cores
and differs from the others in what stands between picture and text alone. All see the same grids in
the same steps. Arguments, joined by commas:

  full16   every cell is a token ("": this one)
  blind    no picture: one in eight
  mean     the mean of all cells: it counts colours, and the most frequent is right once in four
  pool4    the means of 2 x 2 cells
  concat4  2 x 2 cells side by side, projected: as many tokens as pool4, and nothing is lost
  debug    seconds: few steps, a few test grids; its numbers mean nothing

`VARIANTS` has what accuracy each must reach and what it must not; benchmarks/gridqa.py measures it.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vlm_jax.configs import base


class Variant(NamedTuple):
  """One strategy.

  Attributes:
    low, high: what test accuracy lies between, ends included.
    tokens: visual tokens of a picture in the language model.
    fields: what is different from full16, field to value.
  """

  low: float
  high: float
  tokens: int
  fields: dict[str, Any]


# The bands leave slack around one measurement of each with another program of the same sizes:
# 0.124 blind, 0.264 mean, 0.409 pool4, 1 concat4 and full16.
VARIANTS = {
  "full16": Variant(0.95, 1, 16, {}),
  "blind": Variant(0, 0.15, 0, {"data.sources.gridqa.images": "none", "evals.gridqa.images": "none",
                                "evals.gridqa.controls": ()}),
  "mean": Variant(0.2, 0.35, 1, {"connector.name": "pool", "connector.factor": 4}),
  "pool4": Variant(0.3, 0.5, 4, {"connector.name": "pool"}),
  "concat4": Variant(0.95, 1, 4, {"connector.name": "space_to_depth"}),
}


def get_config(arg: str = "") -> ConfigDict:
  """The recipe; `arg` is a variant and "debug"."""
  variant, debug = base.choose(arg, tuple(VARIANTS), ("", "debug"))
  config = base.get_config()
  config.fusion.name = "concat"
  # The patches as they are embedded, with their places: all mixing of cells is the variant's.
  config.tower.update(image_size=16, patch=4, width=64, depth=1, mlp=64, heads=1, post_norm=False,
                      feature_layer=-2)
  config.llm.update(vocab_size=358, width=64, depth=3, mlp=192, heads=4, kv_heads=4, unroll=3)

  config.data.root = "data/gridqa_only"  # a tokenizer of its own, of which every word is one token
  # Four grids fill a row, with all their questions and the most tokens a picture takes.
  config.data.update(rows=4, tokens=384, images=4)
  config.data.sources.gridqa = base.source(name="gridqa", form="fan_out")
  config.optim.update(lr=2e-3, b2=0.98, weight_decay=0.01, warmup=100)
  config.train.update(steps=600, log_every=50, checkpoint_every=600)
  config.evals.gridqa = base.evaluation(
    source="gridqa", split="test", together=16, batch=32, max_tokens=2, limit=250)

  with config.ignore_type():
    config.update_from_flattened_dict(VARIANTS[variant].fields)
  if debug:
    config.train.update(steps=4, log_every=2, checkpoint_every=4)
    config.optim.warmup = 2
    config.evals.gridqa.limit = 8
  return config
