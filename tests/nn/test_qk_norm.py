"""QK-norm against transformers' models, and what it is for: logits that do not grow."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.core import meta
from transformers import Qwen3Config
from transformers.models.chameleon.modeling_chameleon import ChameleonLayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import (
  Qwen3Attention,
  Qwen3RMSNorm,
  Qwen3RotaryEmbedding,
)

from vlm_jax.core import mask as masks
from vlm_jax.core.errors import UsageError
from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.precision import Precision
from vlm_jax.nn import attention_maps
from vlm_jax.nn.attention import Attention, make_context
from vlm_jax.nn.norms import QK_NORMS, qk_norm
from vlm_jax.ops.rope import rotation, sequence

F32 = Precision(param=jnp.float32, compute=jnp.float32)
HEADS, WIDTH = 3, 8
TOLERANCE = 2e-6
REFERENCES = {
  "rms": lambda: Qwen3RMSNorm(WIDTH, eps=1e-6),
  "rms_offset": lambda: Gemma3RMSNorm(WIDTH, eps=1e-6),
  "layer": lambda: torch.nn.LayerNorm(WIDTH, eps=1e-5),
  "layer_per_head": lambda: ChameleonLayerNorm((HEADS, WIDTH)),
}
EPS = {"rms": 1e-6, "rms_offset": 1e-6, "layer": 1e-5, "layer_per_head": 1e-5}


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


def qwen3():
  """transformers' attention with 4 heads of 2 groups, its inputs, output and parameters as ours."""
  config = Qwen3Config(
    hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8, attention_bias=False,
    rope_parameters=dict(rope_type="default", rope_theta=100.0), rms_norm_eps=1e-6,
    attn_implementation="eager", num_hidden_layers=1,
  )
  torch.manual_seed(0)
  module, turn = Qwen3Attention(config, 0).eval(), Qwen3RotaryEmbedding(config)
  x, positions = torch.randn(2, 9, 24), torch.arange(9)[None].expand(2, 9)
  with torch.no_grad():
    for norm in (module.q_norm, module.k_norm):
      norm.weight.normal_()
    hidden = torch.full((9, 9), -1e30).triu(1)[None, None]
    want = module(x, turn(x, positions), hidden)[0].numpy()
  weight = lambda layer: layer.weight.detach().numpy().T
  params = {name: {"kernel": weight(layer).reshape(24, -1, 8)} for name, layer in (
    ("query", module.q_proj), ("key", module.k_proj), ("value", module.v_proj))}
  params["out"] = {"kernel": weight(module.o_proj).reshape(4, 8, 24)}
  params |= {name: {"scale": norm.weight.detach().numpy()} for name, norm in (
    ("query_norm", module.q_norm), ("key_norm", module.k_norm))}
  return x.numpy(), want, params


def test_attention_with_it_is_qwen3s():
  x, want, params = qwen3()
  causal = masks.causal(9)
  mask = IntervalMask(*(np.broadcast_to(field, (2, 9)) for field in (causal.lo, causal.hi)))
  turn = rotation(np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9)), sequence(8, 100.0))
  context = make_context(mask, turn, (16, 16))
  module = Attention(4, 2, 8, False, "dense", F32, qk_norm="rms")
  run = lambda params: module.apply({"params": params}, x, None, context)[0]
  assert error(run(params), want) < 1e-5
  # Twins: no norm, and the norms of queries and keys exchanged.
  without = Attention(4, 2, 8, False, "dense", F32)
  plain = without.apply({"params": params}, x, None, context)[0]
  assert error(plain, want) > 1e-3
  exchanged = params | {"query_norm": params["key_norm"], "key_norm": params["query_norm"]}
  assert error(run(exchanged), want) > 1e-3


def test_maps_show_the_weights_behind_the_norm():
  x, _, params = qwen3()
  causal = masks.causal(9)
  mask = IntervalMask(*(np.broadcast_to(field, (2, 9)) for field in (causal.lo, causal.hi)))
  context = make_context(mask, None, (16, 16))

  class Under(nn.Module):
    @nn.compact
    def __call__(self, x):
      norm = dict(qk_norm="rms", name="llm")
      return Attention(4, 2, 8, False, "dense", F32, **norm)(x, None, context)[0]

  run = lambda params, x: Under().apply({"params": {"llm": params}}, x)
  (maps,) = attention_maps.record(run, params, x, under="llm")
  (same,) = attention_maps.record(run, params, 7 * x, under="llm")
  assert maps.shape == (2, 4, 9, 9) and maps.std() > 0.1
  np.testing.assert_allclose(same, maps, atol=1e-4)


def test_an_unknown_kind_is_answered_with_those_there_are():
  with pytest.raises(UsageError, match="qk_norm is 'layr'; did you mean 'layer'"):
    qk_norm("layr", 1e-5, F32, "query_norm")
