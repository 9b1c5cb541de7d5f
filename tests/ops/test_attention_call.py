"""`attention` itself: choice, refusals, bad input, debug mode, merging, biases, devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from tests.ops.attention_base import HERE, error, inputs, oracle, random_pack
from vlm_jax.core.errors import UsageError
from vlm_jax.ops.attention import (
  DistanceBias,
  Request,
  attention,
  check,
  choose,
  make_plan,
  merge,
)


def small(policy="cut", seed=0, length=70):
  rng = np.random.default_rng(seed)
  mask, keys = random_pack(rng, 2, length, policy)
  x = inputs(rng, 2, length, keys, 4, 2, 16)
  mask = jax.tree.map(jnp.asarray, mask)
  return mask, x, make_plan(mask, keys, block_q=16, block_k=24)


def test_choose_says_why():
  _, _, plan = small()
  request = Request((2, 70, 4, 16), (2, 70, 2, 16), plan=plan, platform="cpu")
  assert choose(request)[0] == "xla"
  assert "xla" not in choose(request)[1]
  name, refusals = choose(dataclasses.replace(request, plan=None))
  assert name == "dense" and "needs an AttentionPlan" in refusals["xla"]
  few = dataclasses.replace(request, q_shape=(2, 1, 4, 16), plan=None)
  assert choose(few)[0] == "dense"
  with pytest.raises(UsageError, match="declines: xla: it needs an AttentionPlan"):
    choose(few, "xla")
  with pytest.raises(UsageError, match="did you mean 'dense'"):
    choose(request, "dens")


def test_short_rows_go_to_dense_unless_asked():
  mask, x, _ = small(length=30)
  plan = make_plan(mask, 30, block_q=16, block_k=32)
  request = Request((2, 30, 4, 16), (2, 30, 2, 16), plan=plan)
  name, refusals = choose(request)
  assert name == "dense" and "nothing to skip" in refusals["xla"]
  assert choose(request, "xla")[0] == "xla"
  out = [attention(x["q"], x["k"], x["v"], mask, plan=plan, implementation=name) for name in HERE]
  assert error(out[0], out[-1]) < 2e-6


BAD = {
  "H a multiple of G": lambda x: {"k": x["k"][:, :, :1].repeat(3, 2),
                                  "v": x["v"][:, :, :1].repeat(3, 2)},
  "k and v must have one shape": lambda x: {"v": x["v"][:, 1:]},
  "one floating dtype": lambda x: {"v": x["v"].astype(np.float16)},
  r"q is \[B,T,H,C\]": lambda x: {"q": x["q"][0]},
  r"bias \[1 or B,H,T,S\] must be": lambda x: {"bias": np.zeros((2, 2, 70, 70), np.float32)},
  r"k_bias \[B,S\] must be \(2, 70\)": lambda x: {"k_bias": np.zeros((2, 71), np.float32)},
  r"bias.table \[H,N\] must have 4 rows": lambda x: {"bias": DistanceBias(
    np.zeros((3, 8)), np.zeros((2, 70), np.int32), np.zeros((2, 70), np.int32))},
  r"bias.k_position must be \(2, 70\)": lambda x: {"bias": DistanceBias(
    np.zeros((4, 8)), np.zeros((2, 70), np.int32), np.zeros((2, 7), np.int32))},
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_named(message):
  mask, x, _ = small()
  given = {name: x[name] for name in ("q", "k", "v")} | BAD[message](x)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda given: attention(mask=mask, **given), given)


def test_a_mask_that_does_not_fit_is_named():
  mask, x, plan = small()
  call = lambda mask, plan=None: attention(x["q"], x["k"], x["v"], mask, plan=plan)
  replace = lambda **fields: dataclasses.replace(mask, **fields)
  with pytest.raises(ValueError, match=r"mask.lo must be \(2, 70\), got \(2, 69\)"):
    call(replace(lo=mask.lo[:, 1:]))
  with pytest.raises(ValueError, match="mask.k_class must be int32, got float32"):
    call(replace(k_class=mask.k_class.astype(jnp.float32)))
  with pytest.raises(ValueError, match="mask.q_class has 2 classes for each token.*one.*`merge`"):
    call(replace(q_class=jnp.stack([mask.q_class] * 2, -1)))
  with pytest.raises(ValueError, match="plan.kinds of 2 rows, 70 queries .*of another mask"):
    call(mask, make_plan(jax.tree.map(lambda x: x[:1], mask), 70, block_q=16, block_k=24))


def test_debug_mode_finds_what_only_the_data_shows():
  mask, x, plan = small()

  def thrown(mask, plan=plan):
    with check.debug():
      run = checkify.checkify(lambda mask, plan: attention(x["q"], x["k"], x["v"], mask, plan=plan))
      found, out = jax.jit(run)(mask, plan)
    found.throw()
    return out

  replace = lambda **fields: dataclasses.replace(mask, **fields)
  assert error(thrown(mask), oracle(x, jax.tree.map(np.asarray, mask))[0]) < 2e-6
  outside = r"must lie in \[0, 70\], query 64 .* \[0, 90\)"
  with pytest.raises(checkify.JaxRuntimeError, match=outside):
    thrown(replace(hi=mask.hi.at[0, 64].set(90), lo=mask.lo.at[0, 64].set(0)))
  with pytest.raises(checkify.JaxRuntimeError, match="mask.q_class must be"):
    thrown(replace(q_class=mask.q_class.at[1, 3].set(-2)))
  with pytest.raises(checkify.JaxRuntimeError, match="plan is of another mask"):
    other, _, _ = small(seed=1)
    thrown(other)
  # Not in debug mode, nothing is checked: the same program costs nothing.
  attention(x["q"], x["k"], x["v"], replace(hi=mask.hi + 100), plan=plan)


@pytest.mark.parametrize("name", HERE)
def test_disjoint_keys_merge_exactly(name):
  mask, x, _ = small("fan_out")
  host = jax.tree.map(np.asarray, mask)
  # The third part has no key that anybody sees.
  parts = [np.arange(0, 70, 2), np.arange(1, 70, 2), np.full(9, -1)]

  def part(q, k, v, keys):
    keys = np.tile(keys.astype(np.int32), (2, 1))
    own = mask.take(k=keys)
    pick = lambda side: jnp.take_along_axis(side, np.maximum(keys, 0)[:, :, None, None], 1)
    plan = make_plan(own, keys.shape[1], block_q=16, block_k=24)
    return attention(q, pick(k), pick(v), own, plan=plan, return_lse=True, implementation=name)

  def total(q, k, v, parts):
    out, lse = merge([part(q, k, v, keys) for keys in parts])
    finite = jnp.where(jnp.isneginf(lse), 0.0, lse)
    return (out * x["weigh_out"]).sum() + (finite * x["weigh_lse"]).sum(), (out, lse)

  step = jax.jit(lambda q, k, v: jax.grad(
    lambda *sides: total(*sides, parts), (0, 1, 2), has_aux=True)(q, k, v))
  grads, (out, lse) = step(x["q"], x["k"], x["v"])
  want, want_lse, want_grads = oracle(x, host)
  assert error(out, want) < 2e-6 and error(lse, want_lse) < 2e-6
  for got, side in zip(grads, "qkv", strict=True):
    assert error(got, want_grads[side]) < 6e-6
  _, (out, _) = total(x["q"], x["k"], x["v"], parts[:1] + parts[:1])
  assert error(out, want) > 100 * 2e-6, "twin: one part twice"


def test_distances_have_the_buckets_of_t5():
  """Against `T5Attention._relative_position_bucket` of transformers."""
  t5 = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
  torch = pytest.importorskip("torch")
  positions = np.arange(300, dtype=np.int32)[None]
  for both, count, most in ((True, 32, 128), (False, 32, 128), (True, 16, 60)):
    bias = DistanceBias(np.zeros((2, count), np.float32), positions, positions, most, both)
    ahead = torch.tensor(positions[0][None, :] - positions[0][:, None])
    want = t5._relative_position_bucket(ahead, both, count, most).numpy()
    np.testing.assert_array_equal(bias.buckets(positions, positions)[0], want)


@pytest.mark.parametrize("name", HERE)
def test_a_bias_outside_the_mask_is_not_read(name):
  mask, x, plan = small()
  seen = np.asarray(mask.dense(70))[:, None]
  inside = np.random.default_rng(1).normal(size=(2, 4, 70, 70)).astype(np.float32)

  @jax.jit
  def both(bias, k):
    run = lambda bias, k: attention(x["q"], k, x["v"], mask, plan=plan, bias=bias,
                                    implementation=name)
    out, pull = jax.vjp(run, bias, k)
    return out, *pull(x["weigh_out"])

  want = both(inside, x["k"])
  for outside in (1e9, np.inf, np.nan):
    got = both(np.where(seen, inside, outside).astype(np.float32), x["k"])
    assert all(error(a, b) < 2e-6 for a, b in zip(got, want, strict=True)), outside
  assert error(both(inside[:, ::-1], x["k"])[0], want[0]) > 100 * 2e-6


@pytest.mark.parametrize("name", HERE)
def test_a_query_without_keys_has_no_influence_by_its_lse(name):
  """Whatever comes back to a log-sum-exp of -inf; the twin lets it through where keys are seen."""
  mask, x, plan = small()

  @jax.jit
  def grads(weigh_out, weigh_lse):
    run = lambda q, k, v: attention(q, k, v, mask, plan=plan, return_lse=True, implementation=name)
    (_, lse), pull = jax.vjp(run, x["q"], x["k"], x["v"])
    return lse, pull((weigh_out, weigh_lse))

  lse, want = grads(x["weigh_out"], x["weigh_lse"])
  blind = np.isneginf(lse)
  assert blind.any()
  _, got = grads(x["weigh_out"], np.where(blind, np.nan, x["weigh_lse"]))
  assert all(error(a, b) < 1e-6 for a, b in zip(got, want, strict=True))
  _, got = grads(x["weigh_out"], np.where(blind, x["weigh_lse"], np.nan))
  assert np.isnan(got[0]).any()
