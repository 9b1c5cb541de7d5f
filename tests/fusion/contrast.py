"""Tiny configs and random pairs, for the tests of strategies that compare pictures with texts."""

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tests.fusion import testing as t
from vlm_jax.configs import base
from vlm_jax.core.batch import Batch
from vlm_jax.core.document import Encoded, Tokens
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.tree import flatten, unflatten
from vlm_jax.data.pack import Packer

NAMES = tuple(name for name, row in t.STRATEGIES.items() if row.compares is not None)
# Which compare all pairs at once, and those of them that do nothing else.
PAIRS = tuple(name for name in NAMES if t.STRATEGIES[name].objectives == ("contrast",))
PLAIN = tuple(name for name in PAIRS if not t.STRATEGIES[name].says)
LENGTH = t.COMPARED
END = t.VOCAB - 1


def get_config(name: str, rows: int = 2) -> ConfigDict:
  """Towers of two layers and widths below 50; two sources, rows of four documents."""
  config, row = base.get_config(), t.STRATEGIES[name]
  config.fusion.update(name=name, width=20)
  config.fusion.objectives = ConfigDict(dict.fromkeys(row.objectives, 1.0))
  config.tower.update(image_size=t.SIDE, patch=4, width=24, depth=2, mlp=40, heads=3, pool="map")
  config.llm.update(name="text_tower", vocab_size=t.VOCAB, width=32, depth=2, mlp=48, heads=4,
                    kv_heads=4, positions=LENGTH, activation="gelu", eos=END)
  config.attention.implementation = "dense"
  config.data.update(rows=rows, images=4, tokens=4 * LENGTH)
  config.update(row.compares)
  config.data.sources.pairs = base.source(form="caption")
  config.data.sources.words = base.source(form="caption")
  return config


def sharp_params(config: ConfigDict) -> dict:
  """Noise, but norms that let through what comes: else nearly every picture and text are alike."""
  flat = flatten(t.noise_params(config))
  return unflatten({path: leaf + path.endswith("norm/scale") for path, leaf in flat.items()})


def total(output, batch: Batch, config: ConfigDict):
  """The mean loss of every one of config.fusion.objectives and source, added up."""
  module = find_fusion(config)
  sums, weights = module.losses(output, batch, config), module.weights(batch, config)
  return sum(jnp.sum(sums[name] / jnp.maximum(weights[name], 1))
             for name in config.fusion.objectives)


def text(rng: np.random.Generator, length: int) -> Tokens:
  """Random ids and the end of the text."""
  ids = np.append(rng.integers(1, END, length - 1), END).astype(np.int32)
  return Tokens(ids, np.arange(length) > 0)


def documents(seed: int, count: int = 6) -> list[Encoded]:
  """Pairs with texts of several lengths, one of which is cut; one document without each part."""
  rng = np.random.default_rng(seed)
  made = []
  for number in range(count):
    parts = (t.pixels(rng), text(rng, 2 + 2 * (number % 4)))
    parts = parts[1:] if number == 1 else parts[:1] if number == 4 else parts
    made.append(Encoded(parts, ("pairs", "words")[number % 2], f"{seed}-{number}"))
  return made


def pack(layouts: list, config: ConfigDict) -> tuple[dict, dict[str, tuple[int, int]]]:
  """The flat batch of `config.data.rows` rows, and document key to its (row, place)."""
  module = find_fusion(config)
  packer = Packer(module.fields(config), module.axes(config), config.data.rows)
  assert packer.add(layouts)
  packed = packer.build()
  return packed.arrays, {layout.key: (row, place) for row, content in enumerate(packed.rows)
                         for place, layout in enumerate(content)}


def batch(config: ConfigDict, seed: int = 0) -> dict[str, np.ndarray]:
  """A flat batch whose rows are filled unevenly."""
  count = 3 * config.data.rows
  return pack(t.lay_out(documents(seed, count), config), config)[0]
