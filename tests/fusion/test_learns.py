"""13. The mechanism learns what it is for, and its control does not.

A 2 x 2 grid of four colours; the question names a cell, the answer is the cell's colour. Without
the picture a quarter of the answers can be guessed. For tiles the colours are textures, of which
the picture as a whole, at half the size, shows nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from tests.fusion import testing as t
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Encoded, Pixels, Tiles, Tokens
from vlm_jax.core.fusion import find_fusion

CELLS = COLORS = 4
STEPS, DOCUMENTS = 240, 28
QUESTION, ANSWER = 10, 30  # first token of each kind
PALETTE = np.array([[230, 20, 20], [20, 230, 20], [20, 20, 230], [230, 230, 20]], np.uint8)


TEXTURES = np.array([[[1, -1], [1, -1]], [[1, 1], [-1, -1]], [[1, -1], [-1, 1]],
                     [[-1, 1], [-1, 1]]])  # the mean of each is 0

Shows = Callable[[np.random.Generator, np.ndarray], Pixels]  # the picture of four colours


def grid_config(name: str, fan_out: bool):
  strategy = {"paligemma": "prefix_lm"}.get(name, name)
  config = t.get_config(strategy, "causal", fan_out)
  config.tower.update(depth=1, width=32, heads=4, mlp=64)
  config.data.update(rows=4, tokens=128, images=7)
  if name == "simvlm":
    config.data.update(tokens=64, decoder_tokens=64)  # half of a document is on either side
  if name == "llava_next":
    config.data.update(rows=7, images=20)  # a picture and its four tiles have 24 slots
    config.data.decode.grids = ()  # the test cuts them itself
  if name == "paligemma":
    config.connector.update(name="linear", initial="zeros")
    config.llm.update(name="gemma", head_dim=8)
  config.attention.implementation = "dense"
  return config


def colors_of_cells(rng: np.random.Generator, colors: np.ndarray) -> Pixels:
  """The cells, a patch each."""
  del rng
  return Pixels(PALETTE[colors].reshape(2, 2, 3).repeat(4, 0).repeat(4, 1))


def others(rng: np.random.Generator, colors: np.ndarray) -> Pixels:
  """A picture of other colours."""
  return colors_of_cells(rng, rng.integers(0, COLORS, len(colors)))


def in_tiles(rng: np.random.Generator, colors: np.ndarray) -> Pixels:
  """A tile of 8 x 8 pixels for each cell, and the 16 x 16 pixels at half their size."""
  tiles = 128 + 100 * np.tile(TEXTURES[colors], (1, 4, 4))[..., None].repeat(3, -1)
  half = tiles.reshape(CELLS, 4, 2, 4, 2, 3).mean((2, 4)).reshape(2, 2, 4, 4, 3)
  whole = half.swapaxes(1, 2).reshape(8, 8, 3)
  del rng
  return Pixels(whole.astype(np.uint8), tiles=Tiles(tiles.astype(np.uint8), (2, 2), (16, 16)))


def whole_only(rng: np.random.Generator, colors: np.ndarray) -> Pixels:
  """The same without its tiles."""
  return Pixels(in_tiles(rng, colors).values)


def document(rng, fan_out: bool, number: int, shows: Shows) -> Encoded:
  """A grid and a question about one cell (fan-out: about all)."""
  colors = rng.integers(0, COLORS, CELLS)
  parts: list = [shows(rng, colors)]
  cells = range(CELLS) if fan_out else [int(rng.integers(CELLS))]
  for branch, cell in enumerate(cells, 1):
    ids = np.array([QUESTION + cell, ANSWER + colors[cell]], np.int32)
    parts.append(Tokens(ids, np.array([False, True]), branch if fan_out else 0))
  return Encoded(tuple(parts), "pairs", f"pairs-{number}")


def flat_batch(config, rng, fan_out: bool, shows: Shows) -> dict:
  documents = [document(rng, fan_out, n, shows) for n in range(DOCUMENTS)]
  return t.pack(t.lay_out(documents, config), config)[0]


def accuracy(config, params, flat) -> float:
  stream = from_flat(flat).streams[find_fusion(config).STREAM]
  asked = stream.loss_weights["lm"] > 0
  said = t.logits(config, params, flat).argmax(-1)
  return float((said == stream.targets)[asked].mean())


def trainer(config, fan_out: bool):
  """A function from what pictures show to the parameters after STEPS steps on fresh grids; the
  model and its control are one program, compiled once."""
  module = find_fusion(config)
  model = module.Model(config)
  optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, 4e-3, 20, STEPS))

  @jax.jit
  def step(params, state, flat):
    batch = from_flat(flat)

    def loss(params):
      sums = module.losses(model.apply({"params": params}, batch), batch, config)["lm"]
      return jnp.sum(sums) / jnp.sum(module.weights(batch, config)["lm"])

    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  init = jax.jit(lambda flat: model.init(jax.random.key(0), from_flat(flat))["params"],
                 compiler_options={"xla_backend_optimization_level": 0})

  def train(shows: Shows) -> dict:
    rng = np.random.default_rng(0)
    params = meta.unbox(init(flat_batch(config, rng, fan_out, shows)))
    state = optimizer.init(params)
    for _ in range(STEPS):
      params, state = step(params, state, flat_batch(config, rng, fan_out, shows))
    return params

  return train


@pytest.mark.parametrize("name, fan_out, shows, control", [
  ("concat", False, colors_of_cells, others),
  ("prefix_lm", True, colors_of_cells, others),
  ("simvlm", True, colors_of_cells, others),
  ("paligemma", True, colors_of_cells, others),
  ("llava_next", True, in_tiles, whole_only),
])
def test_learns_to_look(name, fan_out, shows, control, optimized):
  config = grid_config(name, fan_out)
  train = trainer(config, fan_out)
  params = train(shows)
  rng = np.random.default_rng(1)
  assert accuracy(config, params, flat_batch(config, rng, fan_out, shows)) > 0.95
  assert accuracy(config, params, flat_batch(config, rng, fan_out, control)) < 0.5
  trained = train(control)
  assert accuracy(config, trained, flat_batch(config, rng, fan_out, shows)) < 0.5
