"""13. The mechanism learns what it is for, and its control does not.

A 2 x 2 grid of four colours; the question names a cell, the answer is the cell's colour. Without
the picture a quarter of the answers can be guessed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from tests.fusion import testing as t
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Encoded, Pixels, Tokens
from vlm_jax.core.fusion import find_fusion

CELLS = COLORS = 4
STEPS, DOCUMENTS = 240, 28
QUESTION, ANSWER = 10, 30  # first token of each kind
PALETTE = np.array([[230, 20, 20], [20, 230, 20], [20, 20, 230], [230, 230, 20]], np.uint8)


def grid_config(name: str, fan_out: bool):
  config = t.get_config(name, "causal", fan_out)
  config.tower.update(depth=1, width=32, heads=4, mlp=64)
  config.data.update(rows=4, tokens=128, images=7)
  if name == "simvlm":
    config.data.update(tokens=64, decoder_tokens=64)  # half of a document is on either side
  config.attention.implementation = "dense"
  return config


def document(rng, fan_out: bool, number: int, shown: np.ndarray | None = None) -> Encoded:
  """A grid and a question about one cell (fan-out: about all); `shown` replaces the picture."""
  colors = rng.integers(0, COLORS, CELLS)
  picture = PALETTE[colors if shown is None else shown].reshape(2, 2, 3)
  parts: list = [Pixels(picture.repeat(4, 0).repeat(4, 1))]
  cells = range(CELLS) if fan_out else [int(rng.integers(CELLS))]
  for branch, cell in enumerate(cells, 1):
    ids = np.array([QUESTION + cell, ANSWER + colors[cell]], np.int32)
    parts.append(Tokens(ids, np.array([False, True]), branch if fan_out else 0))
  return Encoded(tuple(parts), "pairs", f"pairs-{number}")


def flat_batch(config, rng, fan_out: bool, blind: bool) -> dict:
  shown = lambda: rng.integers(0, COLORS, CELLS) if blind else None
  documents = [document(rng, fan_out, n, shown()) for n in range(DOCUMENTS)]
  return t.pack(t.lay_out(documents, config), config)[0]


def accuracy(config, params, flat) -> float:
  stream = from_flat(flat).streams[find_fusion(config).STREAM]
  asked = stream.loss_weights["lm"] > 0
  said = t.logits(config, params, flat).argmax(-1)
  return float((said == stream.targets)[asked].mean())


def train(config, fan_out: bool, blind: bool) -> dict:
  """Parameters after STEPS steps on fresh grids; blind: the pictures are of other grids."""
  module = find_fusion(config)
  model = module.Model(config)
  rng = np.random.default_rng(0)
  first = from_flat(flat_batch(config, rng, fan_out, blind))
  params = meta.unbox(jax.jit(model.init)(jax.random.key(0), first)["params"])
  optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, 4e-3, 20, STEPS))

  @jax.jit
  def step(params, state, flat):
    batch = from_flat(flat)

    def loss(params):
      sums = module.losses(model.apply({"params": params}, batch), batch, config)["lm"]
      return jnp.sum(sums) / jnp.sum(module.weights(batch, config)["lm"])

    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  for _ in range(STEPS):
    params, state = step(params, state, flat_batch(config, rng, fan_out, blind))
  return params


@pytest.mark.parametrize(
  "name, fan_out", [("concat", False), ("prefix_lm", True), ("simvlm", True)])
def test_learns_to_look(name, fan_out):
  config = grid_config(name, fan_out)
  params = train(config, fan_out, blind=False)
  rng = np.random.default_rng(1)
  assert accuracy(config, params, flat_batch(config, rng, fan_out, blind=False)) > 0.95
  assert accuracy(config, params, flat_batch(config, rng, fan_out, blind=True)) < 0.5
  control = train(config, fan_out, blind=True)
  assert accuracy(config, control, flat_batch(config, rng, fan_out, blind=False)) < 0.5
