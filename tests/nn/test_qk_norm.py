"""QK-norm against transformers' models, and what it is for: logits that do not grow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.core import meta
from transformers.models.chameleon.modeling_chameleon import ChameleonLayerNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from vlm_jax.core.errors import UsageError
from vlm_jax.core.precision import Precision
from vlm_jax.nn.norms import QK_NORMS, qk_norm

F32 = Precision(param=jnp.float32, compute=jnp.float32)
HEADS, WIDTH = 3, 8
TOLERANCE = 2e-6
REFERENCES = {
  "rms": lambda: Qwen3RMSNorm(WIDTH, eps=1e-6),
  "layer": lambda: torch.nn.LayerNorm(WIDTH, eps=1e-5),
  "layer_per_head": lambda: ChameleonLayerNorm((HEADS, WIDTH)),
}
EPS = {"rms": 1e-6, "layer": 1e-5, "layer_per_head": 1e-5}


def drawn(kind: str):
  """Queries f[2,5,H,C] far from normal, and noise for the parameters of the kind."""
  rng = np.random.default_rng(len(kind))
  x = (rng.normal(size=(2, 5, HEADS, WIDTH)) * 3 + 1).astype(np.float32)
  norm = qk_norm(kind, EPS[kind], F32, "query_norm")
  params = meta.unbox(norm.init(jax.random.key(0), jnp.asarray(x))["params"])
  return x, norm, {name: rng.normal(size=leaf.shape).astype(np.float32)
                   for name, leaf in params.items()}


def error(got, want) -> float:
  assert np.isfinite(got).all() and np.std(want) > 0.1
  return float(np.abs(np.asarray(got) - want).max() / np.abs(want).max())


@pytest.mark.parametrize("kind", QK_NORMS)
def test_is_what_transformers_computes(kind):
  x, norm, params = drawn(kind)
  reference = REFERENCES[kind]()
  with torch.no_grad():
    reference.weight.copy_(torch.tensor(params["scale"]))
    if "bias" in params:
      reference.bias.copy_(torch.tensor(params["bias"]))
    want = reference(torch.tensor(x)).numpy()
  assert error(norm.apply({"params": params}, x), want) < TOLERANCE
  # Twins: scales of another head or channel, and statistics of all heads together.
  turned = {name: np.roll(leaf, 1, 0) for name, leaf in params.items()}
  assert error(norm.apply({"params": turned}, x), want) > 100 * TOLERANCE
  joined = (x - x.mean((2, 3), keepdims=True)) / x.std((2, 3), keepdims=True)
  joined = joined * params["scale"] + params.get("bias", 0)
  assert error(joined, want) > 100 * TOLERANCE


@pytest.mark.parametrize("kind", QK_NORMS)
def test_larger_projections_change_nothing(kind):
  x, norm, params = drawn(kind)
  before = norm.apply({"params": params}, x)
  assert error(norm.apply({"params": params}, 10 * x), np.asarray(before)) < 1e-5


def test_an_unknown_kind_is_answered_with_those_there_are():
  with pytest.raises(UsageError, match="qk_norm is 'layr'; did you mean 'layer'"):
    qk_norm("layr", 1e-5, F32, "query_norm")
