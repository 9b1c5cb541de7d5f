import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.core import meta

from vlm_jax.core.errors import UsageError
from vlm_jax.core.mask import NEVER, IntervalMask
from vlm_jax.core.precision import Precision
from vlm_jax.nn import stack
from vlm_jax.nn.attention import Attention, CrossAttention, make_context
from vlm_jax.nn.linear import Linear
from vlm_jax.nn.mlp import MLP, GatedMLP, activation
from vlm_jax.nn.norms import FrozenNorm, GroupNorm, LayerNorm, RMSNorm
from vlm_jax.nn.relative import GridBias, relations
from vlm_jax.ops.rope import rotation, sequence

F32 = Precision()
BF16 = Precision(jnp.float32, jnp.bfloat16)


def noise(module, *args, seed=0):
  """Parameters of noise in the shapes that the module makes."""
  shapes = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *args))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


def draw(*shape, seed=1, scale=1.0):
  return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


# Linear


def test_linear_contracts_several_axes():
  x = draw(2, 3, 4, 5)
  module = Linear((6, 7), ("heads", "head", "embed", "mlp"), True, F32)
  params = noise(module, x)
  kernel, bias = params["params"]["kernel"], params["params"]["bias"]
  assert kernel.shape == (4, 5, 6, 7) and bias.shape == (6, 7)
  expected = np.einsum("bthc,hcxy->btxy", x, kernel) + bias
  np.testing.assert_allclose(module.apply(params, x), expected, rtol=1e-5, atol=1e-4)


def test_linear_scales_by_all_inputs_and_names_its_axes():
  module = Linear((512,), ("heads", "head", "embed"), True, F32)
  params = module.init(jax.random.key(0), draw(1, 8, 64))["params"]
  assert params["kernel"].names == ("heads", "head", "embed")
  assert params["bias"].names == ("norm",)
  assert abs(float(params["kernel"].value.std()) * np.sqrt(512) - 1) < 0.05
  assert module.apply({"params": meta.unbox(params)}, draw(1, 8, 64)).dtype == jnp.float32
  half = Linear((4,), ("embed", "mlp"), False, BF16)
  params = meta.unbox(half.init(jax.random.key(0), draw(1, 8)))
  assert params["params"]["kernel"].dtype == jnp.float32
  assert half.apply(params, draw(1, 8)).dtype == jnp.bfloat16


# Norms, against torch


@pytest.mark.parametrize("ours, theirs", [
  (RMSNorm, torch.nn.functional.rms_norm), (LayerNorm, torch.nn.functional.layer_norm),
])
def test_norms_are_torchs(ours, theirs):
  x, eps = draw(3, 5, 16, scale=0.1) + 0.3, 1e-2
  module = ours(eps, F32)
  params = noise(module, x)
  leaves = params["params"]
  args = [torch.tensor(leaves["scale"])]
  if "bias" in leaves:
    args.append(torch.tensor(leaves["bias"]))
  expected = theirs(torch.tensor(x), (16,), *args, eps=eps).numpy()
  np.testing.assert_allclose(module.apply(params, x), expected, atol=1e-5)
  # Twin: another eps.
  assert np.abs(ours(1e-4, F32).apply(params, x) - expected).max() > 1e-3


def test_norm_statistics_are_f32():
  # In bf16 the mean square of 4096 equal values would stop growing at 256 of them.
  x = jnp.full((1, 4096), 3, jnp.bfloat16)
  out = RMSNorm(0.0, BF16).apply({"params": {"scale": np.ones(4096, np.float32)}}, x)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(out, np.float32), 1, atol=1e-2)


def test_group_norm_is_torchs_and_frozen_norm_has_no_gradient():
  x = draw(2, 5, 3, 48)
  module = GroupNorm(1e-2, F32)  # 16 groups: the largest number below 33 that divides 32 and 48
  params = noise(module, x)
  leaves = [torch.tensor(params["params"][name]) for name in ("scale", "bias")]
  channels = torch.tensor(x.transpose(0, 3, 1, 2).copy())
  theirs = lambda groups: torch.nn.functional.group_norm(
    channels, groups, *leaves, eps=1e-2).permute(0, 2, 3, 1).numpy()
  np.testing.assert_allclose(module.apply(params, x), theirs(16), atol=1e-5)
  assert np.abs(module.apply(params, x) - theirs(8)).max() > 1e-2  # twin
  module = FrozenNorm(1e-2, F32)
  params = noise(module, x)
  assert all(name.startswith("frozen_") for name in params["params"])
  grads = jax.grad(lambda params: jnp.sum(module.apply(params, x) ** 2))(params)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


# MLPs


@pytest.mark.parametrize("name, theirs", [
  ("gelu", torch.nn.GELU()),
  ("gelu_tanh", torch.nn.GELU("tanh")),
  ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
  ("silu", torch.nn.SiLU()),
  ("relu", torch.nn.ReLU()),
])
def test_activations_are_torchs(name, theirs):
  x = np.linspace(-4, 4, 101, dtype=np.float32)
  expected = theirs(torch.tensor(x)).numpy()
  np.testing.assert_allclose(activation(name)(x), expected, atol=1e-6)
  others = [np.abs(activation(other)(x) - expected).max() for other in ("gelu", "gelu_tanh", "silu")
            if other != name]
  assert min(others) > 1e-4


def test_unknown_activation_names_the_nearest():
  with pytest.raises(UsageError, match="did you mean 'gelu_tanh'"):
    activation("gelu_tan")


def test_mlps():
  x = draw(2, 3, 8)
  module = MLP(5, 12, "relu", True, F32)
  params = noise(module, x)
  up, down = params["params"]["up"], params["params"]["down"]
  expected = np.maximum(x @ up["kernel"] + up["bias"], 0) @ down["kernel"] + down["bias"]
  np.testing.assert_allclose(module.apply(params, x), expected, rtol=1e-4, atol=1e-4)
  module = GatedMLP(8, 12, "relu", F32)
  params = noise(module, x)
  gate, up, down = (params["params"][name]["kernel"] for name in ("gate", "up", "down"))
  expected = (np.maximum(x @ gate, 0) * (x @ up)) @ down
  np.testing.assert_allclose(module.apply(params, x), expected, rtol=1e-4, atol=1e-4)


# Attention


def causal(rows, length, columns=None):
  lo = np.zeros((rows, length), np.int32)
  hi = np.broadcast_to(np.arange(1, length + 1, dtype=np.int32), lo.shape)
  k_index = None
  if columns is not None:
    k_index = np.full((rows, columns), NEVER, np.int32)
    k_index[:, :length] = np.arange(length)
  return IntervalMask(jnp.asarray(lo), jnp.asarray(hi), k_index=k_index)


def test_rotary_attention_sees_only_distances():
  x = draw(1, 6, 16)
  module = Attention(4, 2, 4, False, "dense", F32)
  at = lambda positions: make_context(causal(1, 6), positions, (8, 8))
  run = lambda shift, step=1: at(rotation(jnp.arange(6)[None] * step + shift, sequence(4, 100.0)))
  params = noise(module, x, None, run(0))
  out = lambda context: jax.jit(module.apply)(params, x, None, context)[0]
  np.testing.assert_allclose(out(run(0)), out(run(9)), atol=2e-4)
  assert np.abs(out(run(0)) - out(run(0, step=2))).max() > 0.1
  assert np.abs(out(run(0)) - out(at(None))).max() > 0.1


def test_cache_is_written_at_its_length():
  x = draw(1, 3, 16)
  module = Attention(4, 2, 4, False, "dense", F32)
  columns = tuple(jnp.full((1, 8, 2, 4), 9.0) for _ in range(2))
  context = make_context(causal(1, 3, 8), None, (8, 8), 8, jnp.int32(2))
  params = noise(module, x, columns, context)
  _, (k, _) = jax.jit(module.apply)(params, x, columns, context)
  expected = np.einsum("btd,dgc->btgc", x, params["params"]["key"]["kernel"])
  np.testing.assert_allclose(k[:, 2:5], expected, rtol=1e-4, atol=1e-4)
  assert (np.asarray(k[:, [0, 1, 5, 6, 7]]) == 9).all()


def test_a_cache_needs_an_index_of_its_columns():
  with pytest.raises(ValueError, match=r"k_index must be i32\[B,8\]"):
    make_context(causal(1, 3), None, (8, 8), 8, jnp.int32(0))


def test_cross_attention_reads_another_stream_and_keeps_its_keys():
  x, memory = draw(2, 3, 16), draw(2, 5, 12, seed=2)
  module = CrossAttention(4, 2, 4, True, "dense", F32)
  lo = jnp.asarray([[0, 1, 4], [0, 0, 0]], jnp.int32)
  hi = jnp.asarray([[5, 3, 4], [1, 5, 0]], jnp.int32)  # the last queries see nothing
  context = make_context(IntervalMask(lo, hi), None, (8, 8), keys=5)
  params = noise(module, x, memory, None, context)
  out, columns = jax.jit(module.apply)(params, x, memory, None, context)
  leaves = params["params"]
  split = lambda name, y: y @ leaves[name]["kernel"].reshape(y.shape[-1], -1) + (
    leaves[name]["bias"].reshape(-1))
  q, k, v = split("query", x), split("key", memory), split("value", memory)
  q, k, v = (y.reshape(2, -1, count, 4) for y, count in ((q, 4), (k, 2), (v, 2)))
  for row, query, head in np.ndindex(2, 3, 4):
    seen = np.arange(5)[int(lo[row, query]) : int(hi[row, query])]
    logits = k[row, seen, head // 2] @ q[row, query, head] / 2
    weights = np.exp(logits - logits.max()) if len(seen) else logits
    q[row, query, head] = (weights / weights.sum()) @ v[row, seen, head // 2] if len(seen) else 0
  expected = np.einsum("bthc,hcd->btd", q, leaves["out"]["kernel"]) + leaves["out"]["bias"]
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
  # The kept keys and values stand for the stream.
  again, _ = jax.jit(module.apply)(params, x, None, columns, context)
  np.testing.assert_array_equal(again, out)


def test_grid_bias_is_the_offset_inside_an_image():
  height, width, heads = 2, 3, 2
  image = np.array([[-1, 0, 0, 0, 0, 0, 0, 1, 1, -1]])
  place = np.array([[-1, 0, 1, 2, 3, 4, 5, 4, 0, -1]])
  module = GridBias(heads, (height, width), F32)
  params = noise(module, image, place)
  table = params["params"]["table"]
  assert table.shape == (heads, 3 * 5)
  got = np.asarray(module.apply(params, image, place))[0]
  for i, j in np.ndindex(10, 10):
    if image[0, i] < 0 or image[0, i] != image[0, j]:
      assert not got[:, i, j].any()
      continue
    down = place[0, j] // width - place[0, i] // width
    right = place[0, j] % width - place[0, i] % width
    np.testing.assert_array_equal(got[:, i, j], table[:, (down + 1) * 5 + right + 2])
  # Every offset has a number of its own, and the opposite offset another one.
  assert len(np.unique(relations(height, width))) == 15
  assert (got[:, 1, 2] != got[:, 2, 1]).all()


# Stacks


class Layer(nn.Module):
  """x + tanh(x w + context); the cache counts calls."""

  @nn.compact
  def __call__(self, x, columns, context):
    w = self.param("w", nn.with_logical_partitioning(nn.initializers.normal(), ("embed", "mlp")),
                   (x.shape[-1],) * 2)
    columns = None if columns is None else columns + 1
    return x + jnp.tanh(x @ w + context), columns


class Two(nn.Module):
  """A period of two layers as one."""

  @nn.compact
  def __call__(self, x, columns, context):
    layers = (("first", functools.partial(Layer)), ("second", functools.partial(Layer)))
    return stack.Period(layers, name="period")(x, columns, context)


class Model(nn.Module):
  repeats: int = 3
  remat: str = "none"
  used: int | None = None
  layer: type = Layer

  @nn.compact
  def __call__(self, x, columns, context):
    used = None if self.is_initializing() else self.used
    layers = stack.run(self.layer, self.repeats, remat=self.remat, used=used, name="layers")
    return layers(x, columns, context)


def by_hand(w, x, context):
  for layer in w:
    x = x + np.tanh(x @ layer + context)
  return x


def test_stack_is_a_loop():
  x = draw(2, 5, 4)
  model = Model()
  boxed = model.init(jax.random.key(0), x, None, 0.5)["params"]
  assert boxed["layers"]["w"].names == ("layers", "embed", "mlp")
  params = noise(model, x, None, 0.5)
  w = params["params"]["layers"]["w"]
  assert w.shape == (3, 4, 4)
  out, columns = model.apply(params, x, None, 0.5)
  assert columns is None
  np.testing.assert_allclose(out, by_hand(w, x, 0.5), rtol=1e-5, atol=1e-5)
  _, columns = model.apply(params, x, jnp.arange(3), 0.5)
  np.testing.assert_array_equal(columns, [1, 2, 3])
  # Layers are initialised differently.
  w = boxed["layers"]["w"].value
  assert np.abs(w[0] - w[1]).max() > 0.01


def test_remat_changes_what_is_saved_and_nothing_else():
  x = draw(2, 5, 4)
  params = noise(Model(), x, None, 0.5)
  loss = lambda params, remat: jnp.sum(Model(remat=remat).apply(params, x, None, 0.5)[0] ** 2)
  expected = jax.grad(loss)(params, "none")
  sizes = {}
  for remat in ("none", "dots", "full"):
    got = jax.grad(loss)(params, remat)["params"]["layers"]["w"]
    np.testing.assert_allclose(got, expected["params"]["layers"]["w"], rtol=1e-5)
    _, back = jax.vjp(lambda params, remat=remat: loss(params, remat), params)
    sizes[remat] = sum(np.size(leaf) for leaf in jax.tree.leaves(back))
  assert sizes["full"] < sizes["dots"] < sizes["none"]
  with pytest.raises(UsageError, match="remat is 'ful'"):
    loss(params, "ful")


@pytest.mark.parametrize("layer, repeats, used", [(Layer, 3, None), (Layer, 3, 2),
                                                  (Two, 2, None)])
def test_a_run_taken_apart_is_the_scan(layer, repeats, used):
  x = draw(2, 5, 4)
  model = Model(repeats=repeats, used=used, layer=layer)
  params = noise(model, x, None, 0.5)
  columns = jnp.arange(repeats if used is None else used, dtype=jnp.float32)
  columns = columns if layer is Layer else (columns, -columns)
  wanted, after = model.apply(params, x, columns, 0.5)
  alone = lambda params: {"params": {"layers": stack.apart(params["params"]["layers"])}}
  run = lambda params: model.apply(alone(params), x, stack.apart(columns), 0.5)
  out, split = run(params)
  np.testing.assert_allclose(out, wanted, rtol=1e-6, atol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, split, stack.apart(after))
  assert "scan" not in str(jax.make_jaxpr(run)(params))
  assert model.apply(alone(params), x, None, 0.5)[1] == jax.tree.map(lambda _: None, columns)
  # Twin: two layers in each other's place.
  turned = jax.tree.map(lambda leaf: leaf[::-1], params)
  assert np.abs(run(turned)[0] - wanted).max() > 1e-4


@pytest.mark.parametrize("used", [0, 1, 2])
def test_unused_layers_keep_their_parameters(used):
  x = draw(2, 5, 4)
  model = Model(used=used)
  params = noise(model, x, None, 0.5)
  w = params["params"]["layers"]["w"]
  assert w.shape == (3, 4, 4)
  out, _ = model.apply(params, x, None, 0.5)
  np.testing.assert_allclose(out, by_hand(w[:used], x, 0.5), rtol=1e-5, atol=1e-5)
  grad = jax.grad(lambda params: jnp.sum(model.apply(params, x, None, 0.5)[0] ** 2))(params)
  reached = np.asarray(grad["params"]["layers"]["w"]).any((1, 2))
  np.testing.assert_array_equal(reached, np.arange(3) < used)


def test_a_period_is_scanned_as_one_layer():
  x = draw(2, 5, 4)
  model = Model(repeats=2, layer=Two)
  params = noise(model, x, None, 0.5)
  period = params["params"]["layers"]["period"]
  order = [period[name]["w"][i] for i in range(2) for name in ("first", "second")]
  columns = (jnp.zeros(2), jnp.ones(2))
  out, columns = model.apply(params, x, columns, 0.5)
  np.testing.assert_allclose(out, by_hand(order, x, 0.5), rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(columns[0], [1, 1])
  np.testing.assert_array_equal(columns[1], [2, 2])
