"""13. Which image did this chunk follow? Flamingo's mask answers, that of all images cannot.

A document has two pictures of one colour each, not the same, and a question behind the second,
whose answer is its colour. The control lets every slot read both: what it sees is a set, so half of
the answers can be guessed, and no more. Both are one program, for a mask is data.

And on GridQA: gates leave zero while the language model between them keeps its bits.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from tests.fusion import testing as t
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Encoded, Image, Pixels, Tokens
from vlm_jax.core.mesh import make_mesh
from vlm_jax.core.tree import flatten
from vlm_jax.data.sources import gridqa
from vlm_jax.fusion import flamingo
from vlm_jax.train import state as state_lib
from vlm_jax.train.optimizer import make_optimizer
from vlm_jax.train.step import make_step, place

COLORS, STEPS, DOCUMENTS, GATES = 4, 100, 32, 10.0
FILLER, QUESTION, ANSWER = 9, 10, 30
PALETTE = np.array([[230, 20, 20], [20, 230, 20], [20, 20, 230], [230, 230, 20]], np.uint8)


def config_of():
  config = t.get_config("flamingo", "last")
  config.tower.update(depth=1)
  config.llm.update(depth=2)
  config.data.update(rows=4, tokens=40, images=16)
  config.attention.implementation = "dense"
  return config


def document(rng, number: int) -> Encoded:
  first, second = rng.permutation(COLORS)[:2]
  picture = lambda color: Pixels(np.broadcast_to(PALETTE[color], (t.SIDE, t.SIDE, 3)))
  words = lambda *ids: Tokens(np.array(ids, np.int32), np.array([i >= ANSWER for i in ids]))
  parts = picture(first), words(FILLER), picture(second), words(QUESTION, ANSWER + second)
  return Encoded(parts, "pairs", f"pairs-{number}")


def flat_batch(config, rng, everything: bool) -> dict:
  """A packed step; `everything`: every slot reads all images of its document."""
  layouts = t.lay_out([document(rng, number) for number in range(DOCUMENTS)], config)
  if everything:
    for layout in layouts:
      layout.arrays["masks/media/lo"][:] = 0
      layout.arrays["masks/media/hi"][:] = layout.sizes["table"]
  return t.pack(layouts, config)[0]


@functools.cache
def programs():
  """(model, optimizer, jitted step, jitted share of right answers)."""
  config = config_of()
  model = flamingo.Model(t.same_network(config))
  optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, 4e-3, 10, STEPS))

  def loss(params, flat):
    batch = from_flat(flat)
    sums = flamingo.losses(model.apply({"params": params}, batch), batch, config)["lm"]
    return jnp.sum(sums) / jnp.sum(flamingo.weights(batch, config)["lm"])

  @jax.jit
  def step(params, state, flat):
    updates, state = optimizer.update(jax.grad(loss)(params, flat), state, params)
    faster = lambda path, update: update * (GATES if "gate" in path[-1].key else 1.0)
    updates = jax.tree_util.tree_map_with_path(
      lambda path, update: faster(path, update) if path[0].key == "bridge" else update, updates)
    return optax.apply_updates(params, updates), state

  @jax.jit
  def accuracy(params, flat):
    batch = from_flat(flat)
    text = batch.streams["text"]
    asked = text.loss_weights["lm"] > 0
    said = model.apply({"params": params}, batch).logits().argmax(-1)
    return jnp.sum((said == text.targets) & asked) / jnp.sum(asked)

  return config, model, optimizer, step, accuracy


@pytest.mark.parametrize("everything", [False, True], ids=["last image", "all images"])
def test_which_image_a_chunk_follows(everything):
  config, model, optimizer, step, accuracy = programs()
  rng = np.random.default_rng(0)
  first = from_flat(flat_batch(config, rng, everything))
  params = meta.unbox(jax.jit(model.init)(jax.random.key(0), first)["params"])
  assert not any(np.any(params["bridge"][name]) for name in ("attention_gate", "mlp_gate"))
  state = optimizer.init(params)
  for _ in range(STEPS):
    params, state = step(params, state, flat_batch(config, rng, everything))
  right = np.mean([accuracy(params, flat_batch(config, rng, everything)) for _ in range(8)])
  print(f"all images {everything}: {right:.3f} of {8 * DOCUMENTS}, gates "
        f"{np.tanh(params['bridge']['attention_gate']).ravel().round(2).tolist()}")
  if everything:
    assert right < 0.65  # half, and four standard deviations
  else:
    assert right > 0.95
    assert np.abs(np.tanh(params["bridge"]["attention_gate"])).max() > 0.1


WORDS = (*gridqa.PLACES, *gridqa.COLOURS)


def grid_document(record: dict) -> Encoded:
  """A grid and a question about each of its cells; a word is a token."""
  parts = [Pixels(part.data) if isinstance(part, Image) else
           Tokens(np.array([1 + WORDS.index(part.text)], np.int32), np.array([part.loss]),
                  part.branch) for part in gridqa.parts(record, "fan_out")[0]]
  return Encoded(tuple(parts), "pairs", record["key"])


def train_on_grids(config, steps: int) -> list[dict[str, np.ndarray]]:
  """Path to parameter before the first and after every step, on two fresh grids each."""
  mesh = make_mesh(config)
  init, leaves = state_lib.initializer(flamingo, config)
  optimizer = make_optimizer(config, flamingo.STAGES, leaves)
  abstract = state_lib.abstract_state(leaves, optimizer.init, mesh)
  state = state_lib.create(init, optimizer.init, abstract, config.seed)
  step = make_step(config, flamingo, optimizer, mesh, abstract)
  records, copy = iter(gridqa.prepare()["train"]), lambda state: flatten(
    jax.tree.map(np.array, state.params))
  found = [copy(state)]
  for _ in range(steps):
    documents = map(grid_document, itertools.islice(records, 2))
    state, _ = step(state, place(t.pack(t.lay_out(list(documents), config), config)[0], mesh))
    found.append(copy(state))
  return found


def test_gates_leave_zero_and_what_is_frozen_stays():
  config = t.get_config("flamingo", "last", True)
  config.fusion.stage = "bridge"
  config.tower.update(image_size=16, depth=1)
  config.optim.update(lr=1e-2, schedule="constant", warmup=1, weight_decay=0.0)
  config.attention.implementation = "dense"
  before, first, second, *_, last = train_on_grids(config, 8)
  opened = [np.abs(np.tanh(params[f"bridge/{name}_gate"])) for params in (before, first, last)
            for name in ("attention", "mlp")]
  print(*(gate.ravel().round(4).tolist() for gate in opened))
  assert not np.any(opened[:2]) and np.all(np.array(opened[2:4]) > 0)
  assert np.max(opened[4:]) > 2 * np.max(opened[2:4])
  moved = lambda old, new: {path for path in old if old[path].tobytes() != new[path].tobytes()}
  # What stands behind a closed gate learns nothing, so resampler and layers follow a step later.
  assert moved(before, first) == {"bridge/attention_gate", "bridge/mlp_gate", "new_embed/embedding"}
  learns = {path for path in before if path.startswith(("connector/", "bridge/", "new_embed/"))}
  assert moved(first, second) == moved(before, last) == learns
