"""The kinds of evaluation, one module each, found by name: `config.evals.NAME.kind = "vqa"`.

A kind offers

    MAIN   the number that one line for people shows, with its interval "low", "high"
    UNIT   what is counted: the name of a count among the numbers

and one of the two, or both:

    score(rows, seed) -> numbers
           for answers in words, of the model or read from a file; rows are those of `asking.ask`
    run(config, params, entry, split) -> (numbers, predictions)
           when questions are not simply asked and their answers scored, see `asking.run`

    ASKS   whom it can ask: "speakers", strategies that predict words (left out: these alone), and
           "embedders", strategies that compare pictures with texts; some strategies are both
"""

from typing import Any, Protocol, cast

from ml_collections import ConfigDict

from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import embeds, find, find_fusion, speaking
from vlm_jax.core.typing import Params
from vlm_jax.evals import asking


class Kind(Protocol):
  """What a module in `vlm_jax/evals/kinds` offers."""

  __name__: str
  MAIN: str
  UNIT: str


def find_kind(name: str, outside: bool = True) -> Kind:
  """The kind called `name`, or a user's own by its dotted name; else UsageError."""
  return cast(Kind, find("evals.kinds", name, outside=outside))


def measure(kind: Any, config: ConfigDict, params: Params, entry: ConfigDict, split: str
            ) -> tuple[dict[str, Any], dict[str, list[dict]]]:
  """Measures one source: numbers, and rows of predictions by control ("": no control).

  Raises:
    UsageError: the kind cannot ask this strategy; and as its `run` or `score`.
  """
  asks = getattr(kind, "ASKS", ("speakers",))
  if "embedders" not in asks:
    config = speaking(config)
  module = find_fusion(config)
  can = ["speakers"] * bool(module.STREAM) + ["embedders"] * embeds(module)
  if not set(can) & set(asks):
    asked = can[0]
    name = kind.__name__.rpartition(".")[2]
    raise UsageError(f"config.evals: kind '{name}' asks {asks[0]}, but config.fusion.name "
                     f"'{config.fusion.name}' is one of the {asked}; use kind "
                     + ("'zero_shot', 'retrieval' or 'choice'" if asked == "embedders"
                        else "'vqa', 'choice' or 'retrieval'"))
  if hasattr(kind, "run"):
    return kind.run(config, params, entry, split)
  return asking.run(config, params, entry, split, kind.score)
