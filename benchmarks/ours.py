"""Our train step as the benchmarks call it: the function of `vlm_jax.train`, nothing around it."""

from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from vlm_jax.core import fusion
from vlm_jax.core import mesh as mesh_lib
from vlm_jax.core.layout import Layout
from vlm_jax.data.pack import Packer, padded
from vlm_jax.train import optimizer as optimizers
from vlm_jax.train import state as states
from vlm_jax.train import step as steps


class Trainer:
  """A model and its optimizer; batches of any shape may be trained on."""

  def __init__(self, config: ConfigDict):
    """Initialises the parameters from config.seed."""
    module, self._mesh = fusion.find_fusion(config), mesh_lib.make_mesh(config)
    init, leaves = states.initializer(module, config)
    optimizer = optimizers.make_optimizer(config, module.STAGES, leaves)
    abstract = states.abstract_state(leaves, optimizer.init, self._mesh)
    self.state = states.create(init, optimizer.init, abstract, config.seed)
    self._step = steps.make_step(config, module, optimizer, self._mesh, abstract)

  def place(self, flat: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch on the device."""
    return steps.place(flat, self._mesh)

  def step(self, batch: dict[str, jax.Array]) -> float:
    """Trains on a placed batch and waits for everything; the loss."""
    self.state, numbers = self._step(self.state, batch)
    jax.block_until_ready(self.state)
    return float(numbers.total)


def pack(layouts: Sequence[Layout], config: ConfigDict, one_a_row: bool = False):
  """The flat batch of all layouts in config.data.rows rows.

  Raises:
    UsageError: they do not fit.
  """
  module = fusion.find_fusion(config)
  axes = module.axes(config)
  packer = Packer(module.fields(config), padded(axes) if one_a_row else axes, config.data.rows)
  packer.add(layouts)
  return packer.build().arrays


def resized(config: ConfigDict, rows: int, tokens: int, images: int) -> ConfigDict:
  """The config with steps of another shape."""
  config = config.copy_and_resolve_references()
  config.data.update(rows=rows, tokens=tokens, images=images)
  return config
