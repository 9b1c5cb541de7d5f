"""Every kind is found by its name and offers what a kind must."""

import pkgutil

import pytest

from vlm_jax.core.errors import UsageError
from vlm_jax.evals import kinds

NAMES = [info.name for info in pkgutil.iter_modules(kinds.__path__)]


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_loads_by_name(name):
  kind = kinds.find_kind(name)
  assert kind.__name__ == f"vlm_jax.evals.kinds.{name}"
  assert all(isinstance(getattr(kind, offer), str) for offer in ("MAIN", "UNIT"))
  assert callable(getattr(kind, "run", None) or kind.score)


def test_names_that_are_not_kinds():
  assert {"vqa", "perplexity", "caption", "choice", "pope", "anls", "relaxed",
          "retrieval", "zero_shot", "few_shot"} == set(NAMES)
  with pytest.raises(UsageError, match="did you mean 'caption'"):
    kinds.find_kind("captions")
  with pytest.raises(UsageError, match="outside vlm_jax"):
    kinds.find_kind("os.path", outside=False)
