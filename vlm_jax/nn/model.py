"""What the module of every strategy begins with."""

import flax.linen as nn
from ml_collections import ConfigDict, FrozenConfigDict


class Configured(nn.Module):
  """A module that the whole config says.

  Attributes:
    config: every field; it is frozen, so that the module can be hashed.
  """

  config: ConfigDict

  def __post_init__(self):
    self.config = FrozenConfigDict(self.config)
    super().__post_init__()
