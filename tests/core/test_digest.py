import jax.numpy as jnp
import numpy as np

from vlm_jax.core import digest


def test_a_digest_is_of_values_shape_and_type():
  values = np.arange(6, dtype=np.float32)
  one = lambda leaf: digest.of_arrays({"a": {"b": leaf}})
  assert set(one(values)) == {"a/b"}
  assert one(values) == one(jnp.asarray(values)) and one(values)["a/b"]["shape"] == [6]
  others = [values + 1e-6, values.reshape(2, 3), values.view(np.int32)]
  assert len({one(leaf)["a/b"]["digest"] for leaf in (values, *others)}) == 4


def test_json_is_the_same_in_any_order():
  assert digest.of_json({"a": 1, "b": [2]}) == digest.of_json({"b": [2], "a": 1})
  assert digest.of_json({"a": 1, "b": [2]}) != digest.of_json({"a": 1, "b": [3]})
