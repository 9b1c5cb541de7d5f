"""What is left to tokamax and cuDNN on a GPU, and what `attention` becomes there; nothing is run.

What they compute is tested in test_attention.py, tokamax where it is installed.
"""

import dataclasses
import importlib.util
import types

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn_calls

from vlm_jax import ops
from vlm_jax.core.errors import UsageError
from vlm_jax.core.mask import IntervalMask
from vlm_jax.ops.attention import Request, attention, choose, cudnn, make_plan, tokamax
from vlm_jax.ops.attention.request import capability

HOPPER = Request((2, 512, 8, 64), (2, 512, 2, 64), dtype=jnp.bfloat16, platform="gpu",
                 capability=9.0)
EITHER = {
  "runs on a GPU, and this is 'cpu'": dict(platform="cpu"),
  "computes in bfloat16 and float16, not in float32": dict(dtype=jnp.float32),
  "wider than": dict(q_shape=(2, 512, 8, 320), k_shape=(2, 512, 2, 320)),
  "bias": dict(has_bias=True),
  " bias ": dict(has_k_bias=True),
  "log-sum-exp has no gradient": dict(needs_lse=True),
}
TOKAMAX = EITHER | {
  "compute capability 9 or 10": dict(capability=8.0),
  "compute capability 9": dict(capability=12.0),
  "compute capability": dict(capability=None),
  "no classes": dict(has_classes=True),
  "no k_index": dict(has_k_index=True),
}
CUDNN = EITHER | {
  "compute capability 8.0": dict(capability=7.5),
  "compute capability": dict(capability=None),
  "wider than 128": dict(q_shape=(2, 512, 8, 136), k_shape=(2, 512, 2, 136)),
  "cannot cap": dict(soft_cap=30.0),
  "takes 1074266112 bytes, more than 1073741824": dict(
    q_shape=(1, 2**15, 8, 64), k_shape=(1, 2**14 + 8, 2, 64)),
  "1 queries are few": dict(q_shape=(2, 1, 8, 64)),
}


@pytest.fixture
def installed(monkeypatch):
  """As if tokamax were there."""
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


@pytest.mark.parametrize("module, reason", [
  *((tokamax, reason) for reason in TOKAMAX), *((cudnn, reason) for reason in CUDNN)])
def test_declines_with_the_reason(module, reason, installed):
  changes = (TOKAMAX if module is tokamax else CUDNN)[reason]
  assert reason in module.declines(dataclasses.replace(HOPPER, **changes))


def test_the_best_that_can_say_the_mask_runs(installed):
  assert choose(HOPPER)[0] == "tokamax"
  assert choose(dataclasses.replace(HOPPER, soft_cap=30.0))[0] == "tokamax"
  name, refusals = choose(dataclasses.replace(HOPPER, has_classes=True))
  assert name == "cudnn" and list(refusals) == ["pallas_tpu", "splash", "tokamax"]
  assert choose(dataclasses.replace(HOPPER, capability=8.0))[0] == "cudnn"
  decode = dataclasses.replace(HOPPER, q_shape=(2, 1, 8, 64), has_k_index=True)
  assert choose(decode)[0] == "dense" and choose(decode, "cudnn")[0] == "cudnn"


def test_without_tokamax_its_reason_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  name, refusals = choose(HOPPER)
  assert name == "cudnn" and "pip install 'vlm-jax[tokamax]'" in refusals["tokamax"]


@pytest.mark.parametrize("said, means", [("9.0", 9.0), ("10.3", 10.3), ("gfx942", None)])
def test_capability(said, means, monkeypatch):
  assert capability() is None, "there is no GPU here"
  device = types.SimpleNamespace(compute_capability=said)
  monkeypatch.setattr(jax, "devices", lambda: [device])
  assert capability() == means


@pytest.mark.parametrize("devices, width", [(1, 64), (2, 72), (2, 20)])
def test_attention_lowers_to_cudnn(devices, width, monkeypatch):
  """Forward and backward become its calls, with the mask as a bias of even lengths."""
  monkeypatch.setattr(cudnn_calls, "check_cudnn_version", lambda: 91500)
  monkeypatch.setattr(ops.attention, "capability", lambda: 9.0)
  batch, length, keys, heads, groups = 2, 255, 333, 4, 2
  device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", platform="gpu", num_cores=132)
  mesh = jax.sharding.AbstractMesh((devices, 1, 1), ("data", "fsdp", "tensor"),
                                   abstract_device=device)
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)
  ids = lambda size: jax.ShapeDtypeStruct((batch, size), jnp.int32)

  def both(q, k, v, mask):
    plan = make_plan(mask, keys, block_q=128, block_k=128)
    out, pull = jax.vjp(lambda *x: attention(*x, mask, plan=plan), q, k, v)
    return out, pull(out)

  given = (shape(batch, length, heads, width), *[shape(batch, keys, groups, width)] * 2,
           IntervalMask(ids(length), ids(length), ids(length), ids(keys)))
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(both).trace(*given)
    out, (_, grad_k, _) = traced.out_info
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert (out.shape, grad_k.shape) == (given[0].shape, given[1].shape)
  calls = [line for line in text.splitlines() if "custom_call @__cudnn$fmha" in line]
  assert ["Backward(" in line for line in calls] == [False, True]
  rows, wide = batch // devices, -(-width // 8) * 8
  for line in calls:
    assert f"tensor<{rows}x1x256x334xbf16>" in line and f"tensor<{rows}x256x{heads}x{wide}x" in line
  # It is refused by name where it would lose a gradient.
  with jax.sharding.use_abstract_mesh(mesh), pytest.raises(UsageError, match="cudnn: its log-sum"):
    jax.eval_shape(lambda *x: attention(*x, return_lse=True, implementation="cudnn"), *given)
