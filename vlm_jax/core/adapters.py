"""Low-rank adapters of linear layers (LoRA, arXiv:2106.09685): which layers have them, how large.

An adapted layer computes x W + (alpha / rank) x A B, equation 3 there, with A [*ins, rank] and
B [rank, *outs] beside its kernel, as leaves "lora_a" and "lora_b". W never trains.
"""

import dataclasses
import re
from collections.abc import Iterable

from ml_collections import ConfigDict

from vlm_jax.core.errors import UsageError, nearest

LEAVES = A, B = "lora_a", "lora_b"


@dataclasses.dataclass(frozen=True)
class Adapters:
  """`config.lora`; see configs/base.py. Rank 0: there are none."""

  rank: int = 0
  alpha: float = 16.0
  dropout: float = 0.0
  targets: tuple[str, ...] = ()

  @property
  def scale(self) -> float:
    """What the product of A and B is multiplied with."""
    return self.alpha / self.rank

  def at(self, path: str) -> bool:
    """Whether the linear layer at a path ("llm/layers/attention/query"), or a parent, is a target.
    """
    return self.rank > 0 and any(matches(pattern, path) for pattern in self.targets)


def adapters(config: ConfigDict) -> Adapters:
  """Reads `config.lora`.

  Raises:
    UsageError: a number that cannot be, or a pattern that is not a regular expression.
  """
  lora = config.lora
  if lora.rank < 0 or not 0 <= lora.dropout < 1:
    raise UsageError(f"config.lora.rank is {lora.rank} and dropout {lora.dropout}; use a rank of 0 "
                     "(off) or more and a dropout from 0 up to 1")
  for pattern in lora.targets:
    try:
      re.compile(pattern)
    except re.error as error:
      raise UsageError(f"config.lora.targets: '{pattern}' is not a regular expression: {error}"
                       ) from error
  return Adapters(lora.rank, lora.alpha, lora.dropout, tuple(lora.targets))


def matches(pattern: str, path: str) -> bool:
  """Whether a pattern matches a path or any parent of it."""
  return re.fullmatch(f"(?:{pattern})(/.*)?", path) is not None


def is_adapter(path: str) -> bool:
  """Whether a leaf belongs to an adapter."""
  return path.rsplit("/", 1)[-1] in LEAVES


def check(lora: Adapters, paths: Iterable[str]) -> None:
  """Refuses a target that is no linear layer of the model whose leaves are at `paths`.

  Raises:
    UsageError: names the pattern and the nearest layers.
  """
  if not lora.rank:
    return
  paths = list(paths)
  adapted = {path.rpartition("/")[0] for path in paths if is_adapter(path)}
  layers = {path.rpartition("/")[0] for path in paths if path.endswith("/kernel")}
  if not lora.targets:
    raise UsageError(f"config.lora.rank is {lora.rank} but targets is empty; name linear layers, "
                     "e.g. config.lora.targets='llm/.*/(query|value)'")
  for pattern in lora.targets:
    if not any(matches(pattern, path) for path in adapted):
      raise UsageError(f"config.lora.targets: '{pattern}' matches no linear layer; "
                       f"{nearest(pattern, layers)}")
