"""The kinds of evaluation, one module each, found by name: `config.evals.NAME.kind = "vqa"`.

A kind offers

    MAIN   the number that one line for people shows, with its interval "low", "high"
    UNIT   what is counted: the name of a count among the numbers
    run(config, params, entry, split) -> (numbers, predictions)

and, when it asks questions whose answers are text, score(rows, seed) -> numbers: the same scores
for predictions that are read from a file.
"""

from typing import Any, Protocol, cast

from ml_collections import ConfigDict

from vlm_jax.core.fusion import find
from vlm_jax.core.typing import Params


class Kind(Protocol):
  """What a module in `vlm_jax/evals/kinds` offers."""

  __name__: str
  MAIN: str
  UNIT: str

  def run(self, config: ConfigDict, params: Params, entry: ConfigDict, split: str
          ) -> tuple[dict[str, Any], dict[str, list[dict]]]:
    """Measures one source: numbers, and rows of predictions by control ("": no control)."""


def find_kind(name: str, outside: bool = True) -> Kind:
  """The kind called `name`, or a user's own by its dotted name; else UsageError."""
  return cast(Kind, find("evals.kinds", name, outside=outside))
