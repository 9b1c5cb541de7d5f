"""The Perceiver Resampler held to the three published ones: outputs and gradients.

transformers' IdeficsPerceiverResampler and Idefics2PerceiverResampler run as they are. That of
open_flamingo is the first with another activation, its tensors under other names, keys and values
in one of them; of videos it adds an embedding to every frame and reads all their patches in a row.
"""

import dataclasses
import functools
import os
import re

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.core import meta
from ml_collections import FrozenConfigDict
from transformers.models.idefics import perceiver as theirs_idefics
from transformers.models.idefics2 import modeling_idefics2 as theirs_idefics2

from tests.numbers import error
from vlm_jax.configs import base
from vlm_jax.connectors import perceiver
from vlm_jax.convert import table
from vlm_jax.core.errors import UsageError
from vlm_jax.core.precision import Precision
from vlm_jax.core.tree import flatten

TOLERANCE = 2e-4
OUTPUTS = 1e-5  # measured: at most 6e-7, of gradients 2e-6; more where theirs is 1 + erf near 0
SILENT = "k_layer_norm.bias"
WIDTH, LATENTS, DEPTH, HEADS, C, FEATURES = 18, 5, 2, 4, 6, 7


def idefics(qk_norm: bool = False, activation=None) -> torch.nn.Module:
  config = transformers.IdeficsConfig(
    vision_config=dict(embed_dim=WIDTH), perceiver_config=dict(qk_layer_norms_perceiver=qk_norm))
  module = theirs_idefics.IdeficsPerceiverResampler(config, WIDTH, DEPTH, HEADS, C, LATENTS)
  for _, mlp in module.blocks:
    mlp.act = activation or mlp.act
  return module


def idefics2() -> torch.nn.Module:
  config = transformers.models.idefics2.Idefics2PerceiverConfig(
    hidden_size=WIDTH, resampler_n_latents=LATENTS, resampler_depth=DEPTH, resampler_n_heads=HEADS,
    resampler_head_dim=C, num_key_value_heads=2, rms_norm_eps=0.03)
  return theirs_idefics2.Idefics2PerceiverResampler._from_config(
    config, attn_implementation="eager")


# How theirs is made, our fields, our table of its keys.
KINDS = {
  "idefics": (idefics, dict(activation="relu"), perceiver.KEYS),
  "idefics, qk norm": (functools.partial(idefics, True), dict(activation="relu", qk_norm="layer"),
                       perceiver.KEYS),
  "open_flamingo": (functools.partial(idefics, False, torch.nn.GELU()), dict(activation="gelu"),
                    perceiver.OPEN_FLAMINGO_KEYS),
  "open_flamingo, tail": (functools.partial(idefics, False, torch.nn.GELU()),
                          dict(activation="gelu"), perceiver.OPEN_FLAMINGO_KEYS),
  "idefics2": (idefics2, dict(activation="silu", feed_forward="gated", norm="rms", norm_eps=0.03,
                              kv_heads=2), perceiver.IDEFICS2_KEYS),
}


def their_names(kind: str, tensors: dict) -> dict:
  """The tensors of a module by the names of a checkpoint of its kind."""
  if not kind.startswith("open_flamingo"):
    return tensors
  rename = table.renamer((
    (r"blocks\.(\d+)\.0\.context_layer_norm", r"layers.\1.0.norm_media"),
    (r"blocks\.(\d+)\.0\.latents_layer_norm", r"layers.\1.0.norm_latents"),
    (r"blocks\.(\d+)\.0\.q_proj", r"layers.\1.0.to_q"),
    (r"blocks\.(\d+)\.0\.output_proj", r"layers.\1.0.to_out"),
    (r"blocks\.(\d+)\.1\.ln", r"layers.\1.1.0"), (r"blocks\.(\d+)\.1\.fc", r"layers.\1.1.1"),
    (r"blocks\.(\d+)\.1\.c_proj", r"layers.\1.1.3"), (r"^layer_norm", "norm")))
  found = {rename(key): value for key, value in tensors.items()}
  for layer in range(DEPTH):
    both = [found.pop(f"blocks.{layer}.0.{name}_proj.weight") for name in "kv"]
    found[f"layers.{layer}.0.to_kv.weight"] = np.concatenate(both)
  return found


def run_ours(fields: dict):
  """(config of the connector, jitted (params, features) -> output)."""
  config = base.get_config().connector
  config.update(name="perceiver", latents=LATENTS, depth=DEPTH, heads=HEADS, head_dim=C)
  config.update(fields)
  model = perceiver.Model(FrozenConfigDict(config), WIDTH, Precision())
  return model, jax.jit(
    lambda params, x, *time: model.apply({"params": params}, x, (1, FEATURES), *time))


def disturb(module: torch.nn.Module) -> None:
  """Overwrites every parameter with noise, around 1 where norms multiply."""
  for name, weight in module.named_parameters():
    weight.normal_(0, 0.3)
    if "norm" in name and name.endswith("weight"):
      weight.add_(1)


def read(tensors: dict, model: perceiver.Model, keys: tuple) -> tuple[dict, list]:
  """Our parameters and the rows of the table, by which their tensors are written again."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 1, FEATURES, WIDTH)), (1, 7))
  rows = table.entries([("", "", keys)], {
    path: leaf.shape for path, leaf in flatten(meta.unbox(shapes)["params"]).items()})
  source = type("Tensors", (dict,), {"shapes": {k: v.shape for k, v in tensors.items()}})(tensors)
  params = table.load(source, rows)
  back = {key: tensor.get() for key, tensor in table.export(params, rows).items()}
  assert back.keys() == tensors.keys()
  assert all(np.array_equal(back[key], tensors[key]) for key in back)
  return params, rows


def to_the_tail(module: torch.nn.Module) -> None:
  """Moves the hidden units to about -2.2, where the two gelus differ by a hundredth of their value.

  The last matrix is scaled up, for there they are small beside the stream that they are added to.
  """
  for _, mlp in module.blocks:
    along = torch.nn.functional.normalize(torch.randn(WIDTH), dim=0)
    mlp.ln.bias.copy_(5 * along)
    weight = 0.3 * mlp.fc.weight
    mlp.fc.weight.copy_(weight - torch.outer(weight @ along + 0.44, along))
    mlp.c_proj.weight.mul_(8)


@functools.cache
def case(kind: str):
  """Features, theirs' output and gradients by key, our parameters, table and jitted function."""
  make, fields, keys = KINDS[kind]
  torch.manual_seed(0)
  module = make().eval()
  with torch.no_grad():
    disturb(module)
    if kind.endswith("tail"):
      to_the_tail(module)
  x = np.random.default_rng(0).normal(size=(2, FEATURES, WIDTH)).astype(np.float32)
  inputs = torch.tensor(x, requires_grad=True)
  seen = (torch.ones(2, FEATURES, dtype=torch.long),) if kind == "idefics2" else ()
  out = module(inputs, *seen)
  weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)  # norms sum to constants
  (out * weights).sum().backward()
  host = lambda tensors: their_names(kind, {key: value.numpy() for key, value in tensors.items()})
  grads = host({key: value.grad for key, value in module.named_parameters()})
  model, run = run_ours(fields)
  params, rows = read(host(module.state_dict()), model, keys)
  return x[:, None], out.detach().numpy(), inputs.grad.numpy(), grads, params, rows, weights, run


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(kind):
  x, out, input_grad, grads, params, rows, weights, run = case(kind)
  loss = lambda params, x: jnp.sum(run(params, x)[:, 0] * weights.numpy())
  got = np.asarray(run(params, x))[:, 0]
  assert np.isfinite(out).all() and out.std(axis=(0, 1)).min() > 1e-2
  worst = error(got, out)
  ours, features = jax.jit(jax.grad(loss, (0, 1)))(params, x)
  errors = {key: error(tensor.get(), grads[key])
            for key, tensor in table.export(ours, rows).items()}
  assert errors.keys() == grads.keys()
  # Softmax does not see what all keys share: of a bias of keys there is only rounding.
  assert all((np.abs(grad).max() > 1e-4) != key.endswith(SILENT) for key, grad in grads.items())
  errors = {key: value for key, value in errors.items() if not key.endswith(SILENT)}
  errors["features"] = error(features[:, 0], input_grad)
  print(f"{kind}: outputs {worst:.1e}, gradients {max(errors.values()):.1e}")
  assert worst < OUTPUTS and max(errors.values()) < TOLERANCE, max(errors, key=errors.get)


@pytest.mark.parametrize("kind, wrong", [
  ("open_flamingo", dict(activation="relu")), ("open_flamingo, tail", dict(activation="gelu_tanh")),
  ("idefics", dict(activation="relu2")), ("idefics", dict(norm_eps=0.2)),
  ("idefics2", dict(norm="rms", norm_eps=0.3)),
], ids=str)
def test_twins(kind, wrong):
  x, out, *_, params, _, _, _ = case(kind)
  got = run_ours(KINDS[kind][1] | wrong)[1](params, x)
  found = error(np.asarray(got)[:, 0], out)
  # The exact and the approximate gelu differ by less than any other mistake.
  least = 100 * (OUTPUTS if wrong.get("activation") == "gelu_tanh" else TOLERANCE)
  print(f"{kind}, {wrong}: {found:.1e}")
  assert found > least


def test_features_alone_are_not_enough():
  """The latents are among the keys: without them another function."""
  x, out, *_, params, _, _, _ = case("idefics")
  model, _ = run_ours(KINDS["idefics"][1])
  original = jnp.concatenate

  def features_only(arrays, axis=0):
    return original(arrays[:1] * 2, axis=axis)[:, : FEATURES + LATENTS]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(perceiver.jnp, "concatenate", features_only)
    got = model.apply({"params": params}, x, (1, FEATURES))
  assert error(np.asarray(got)[:, 0], out) > 100 * TOLERANCE


def test_other_widths_are_projected_and_counts_do_not_matter():
  config = base.get_config().connector
  config.update(latents=LATENTS, depth=1, heads=2, head_dim=4)
  model = perceiver.Model(FrozenConfigDict(config), WIDTH, Precision())
  params = model.init(jax.random.key(0), jnp.ones((1, 2, FEATURES, 11)), (1, FEATURES))
  assert model.apply(params, jnp.ones((3, 1, 9, 11)), (3, 3)).shape == (3, 1, LATENTS, WIDTH)
  np.testing.assert_array_equal(perceiver.slots(config, 1, 3, 3), np.arange(LATENTS))


def test_heads_that_cannot_be_shared_are_refused():
  with pytest.raises(UsageError, match="connector.heads is 4, which must be a multiple of"):
    run_ours(dict(kv_heads=3))[0].init(jax.random.key(0), jnp.ones((1, 1, 4, WIDTH)), (2, 2))


# Videos: the frames of an item are read together.

EMBEDDINGS, SHOWN = 4, (3, 1, 2)  # of theirs; frames of the videos that share a row of ours
TIME = np.array([[0, 1, 2, 0, 0, 1, -1, -1]], np.int32)  # and two empty places


@functools.cache
def videos():
  """A row's features, theirs' outputs and gradients, our parameters, table and weights."""
  torch.manual_seed(1)
  module = idefics(False, torch.nn.GELU()).eval()
  module.frame_embs = torch.nn.Parameter(torch.zeros(EMBEDDINGS, WIDTH))
  with torch.no_grad():
    disturb(module)
  x = np.random.default_rng(1).normal(size=(1, 8, FEATURES, WIDTH)).astype(np.float32)
  inputs = torch.tensor(x[0, : sum(SHOWN)], requires_grad=True)
  timed = lambda one: (one + module.frame_embs[: len(one), None]).flatten(0, 1)[None]
  out = torch.cat([module(timed(one)) for one in inputs.split(SHOWN)])
  weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
  (out * weights).sum().backward()
  host = lambda tensors: their_names(
    "open_flamingo", {key: value.numpy() for key, value in tensors.items()})
  grads = host({key: value.grad for key, value in module.named_parameters()})
  model, _ = run_ours(dict(activation="gelu", frames=EMBEDDINGS))
  params, rows = read(host(module.state_dict()), model, perceiver.OPEN_FLAMINGO_KEYS)
  assert params["time"].shape == (EMBEDDINGS, WIDTH)
  return x, out.detach().numpy(), inputs.grad.numpy(), grads, params, rows, weights.numpy()


def read_row(params, x, time=TIME, **fields) -> np.ndarray:
  """f32[items,K,D] of the items of a row."""
  fields = dict(activation="gelu", frames=EMBEDDINGS) | fields
  return np.asarray(run_ours(fields)[1](params, x, time))[0, : (time == 0).sum()]


def test_videos_of_a_row_are_each_read_as_theirs():
  x, out, input_grad, grads, params, rows, weights = videos()
  run = run_ours(dict(activation="gelu", frames=EMBEDDINGS))[1]
  worst = error(read_row(params, x), out)
  loss = lambda params, x: jnp.sum(run(params, x, TIME)[0, : len(SHOWN)] * weights)
  ours, features = jax.jit(jax.grad(loss, (0, 1)))(params, x)
  errors = {key: error(tensor.get(), grads[key])
            for key, tensor in table.export(ours, rows).items()}
  assert errors.keys() == grads.keys() and np.abs(grads["frame_embs"][:3]).min(-1).max() > 0
  errors["features"] = error(features[0, : sum(SHOWN)], input_grad)
  print(f"videos: outputs {worst:.1e}, gradients {max(errors.values()):.1e}")
  assert worst < OUTPUTS and max(errors.values()) < TOLERANCE, max(errors, key=errors.get)
  # No gradient for empty places, nor for the embedding of a frame that no video has.
  assert not np.any(features[0, sum(SHOWN) :]) and not np.any(ours["time"][3])


def test_twins_of_videos(monkeypatch):
  x, out, *_, params, _, _ = videos()
  still = params | {"time": np.zeros_like(params["time"])}
  assert error(read_row(still, x), out) > 100 * TOLERANCE  # the embedding ignored
  late = np.where(TIME > 0, TIME + 1, TIME)  # another embedding
  assert error(read_row(params, x, late), out) > 100 * TOLERANCE
  masked = perceiver.mask_of_items

  def all_frames(time, patches, latents):
    mask = masked(time, patches, latents)
    return dataclasses.replace(mask, lo=mask.lo * 0, hi=mask.hi * 0 + 8 * (patches + latents))

  monkeypatch.setattr(perceiver, "mask_of_items", all_frames)  # the item ignored
  assert error(read_row(params, x), out) > 100 * TOLERANCE


def test_the_order_of_frames_matters_by_their_time_alone():
  x, out, *_, params, _, _ = videos()
  turned = x.copy()
  turned[0, :3] = x[0, 2::-1]
  got = read_row(params, turned)
  assert error(got[0], out[0]) > 100 * TOLERANCE and error(got[1:], out[1:]) < OUTPUTS
  bare = {name: leaf for name, leaf in params.items() if name != "time"}
  same = read_row(bare, x, frames=0)
  assert error(read_row(bare, turned, frames=0), same) < OUTPUTS  # its control


def test_an_image_is_a_video_of_one_frame():
  x, *_, params, _, _ = videos()
  one = params | {"time": params["time"][:1]}
  bare = {name: leaf for name, leaf in params.items() if name != "time"}
  run = lambda fields, *args: np.asarray(run_ours(dict(activation="gelu") | fields)[1](*args))
  images = run({}, bare, x + params["time"][0])
  np.testing.assert_array_equal(run(dict(frames=1), one, x), images)
  assert error(run(dict(frames=1), one, x, 0 * TIME), images) < OUTPUTS
  assert error(run({}, bare, x), images) > 100 * TOLERANCE


def test_the_mask_of_items():
  """The picture of the docstring: one patch a frame and one latent an item."""
  time = jnp.array([[0, 1, 2, 0]])
  lines = [re.findall(r"[1.]", line) for line in perceiver.__doc__.splitlines()
           if re.fullmatch(r" +[xy]( [1.])+", line)]
  mask = np.asarray(perceiver.mask_of_items(time, 1, 1).dense())[0]
  np.testing.assert_array_equal(mask[:2, :6], np.array(lines) == "1")
  assert not mask[2:].any() and not mask[:, 6:].any()
  # Of every item of a row with empty places: the patches of its frames, and its latents.
  mask = np.asarray(perceiver.mask_of_items(jnp.asarray(TIME), 2, 3).dense())[0]
  assert mask.shape == (8 * 3, 8 * 2 + 8 * 3)
  starts = np.cumsum([0, *SHOWN])
  for item in range(8):
    expected = np.zeros(mask.shape[1], bool)
    if item < len(SHOWN):
      expected[2 * starts[item] : 2 * starts[item + 1]] = True
      expected[16 + 3 * item : 16 + 3 * item + 3] = True
    assert (mask[3 * item : 3 * item + 3] == expected).all()
