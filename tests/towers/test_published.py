"""CLIP, SigLIP, SigLIP 2, DINOv2 and EVA towers held to transformers: values, gradients, files.

Theirs are tiny and random, at a size of their own and, with resized positions, at a larger one.
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.core import meta
from ml_collections import FrozenConfigDict

from tests.numbers import error
from vlm_jax.configs import base
from vlm_jax.convert import nodes, safetensors_io, table
from vlm_jax.core import fusion
from vlm_jax.core.errors import UsageError
from vlm_jax.core.precision import Precision
from vlm_jax.core.tree import flatten
from vlm_jax.towers import vit

TOLERANCE, LOUD = 2e-4, 100  # measured: at most 6e-6, of a gradient
PATCH, NATIVE, LARGER = 4, 12, 22  # 3 x 3 patches; 5 x 5, and two pixels that no patch reads
transformers.utils.logging.disable_progress_bar()

# Where little would depend on a smaller weight.
SIZES = ((1.0, re.compile("position|register")),
         (0.3, re.compile(r"fc[12].weight|(gate|up|down|[qkvo])_proj|attn.(qkv|proj)|token|probe")))
COMMON = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=PATCH,
              layer_norm_eps=0.5)
SIZED = dict(image_size=NATIVE, **COMMON)
# Model, its config.
CASES = {
  "clip": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig(
    intermediate_size=40, hidden_act="quick_gelu", **SIZED)),
  "siglip": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig(
    intermediate_size=40, **SIZED)),
  "siglip2": (transformers.Siglip2VisionModel, transformers.Siglip2VisionConfig(
    intermediate_size=40, num_patches=(NATIVE // PATCH) ** 2, **COMMON)),
  "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config(mlp_ratio=2, **SIZED)),
  "swiglu": (transformers.Dinov2Model, transformers.Dinov2Config(
    mlp_ratio=3, use_swiglu_ffn=True, **SIZED)),
  "registers": (transformers.Dinov2WithRegistersModel, transformers.Dinov2WithRegistersConfig(
    mlp_ratio=2, num_register_tokens=3, **SIZED)),
  "eva": (transformers.Blip2VisionModel, transformers.Blip2VisionConfig(
    intermediate_size=40, **SIZED)),
}


def their_model(name):
  """Every weight overwritten: N(0, 0.1^2), norms and scales around 1, some larger."""
  kind, config = CASES[name]
  torch.manual_seed(len(name))
  model = kind._from_config(config, attn_implementation="eager").eval()
  with torch.no_grad():
    for key, weight in model.named_parameters():
      weight.normal_(0, next((size for size, names in SIZES if names.search(key)), 0.1))
      if "norm" in key and key.endswith("weight") or "lambda" in key:
        weight.add_(1)
      if key.endswith("fc1.bias"):
        weight.sub_(2)  # where the kinds of gelu differ most, relative to their values
  return model


def images(side):
  return np.random.default_rng(side).integers(0, 256, (1, 2, side, side, 3)).astype(np.uint8)


def their_inputs(name, tower, side):
  x = (images(side)[0] / 255 - np.array(tower.mean)) / np.array(tower.std)
  pixels = torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32)
  if name in ("clip", "siglip", "eva"):
    return {"pixel_values": pixels, "interpolate_pos_encoding": True}
  if name != "siglip2":
    return {"pixel_values": pixels}
  rows = side // PATCH
  cells = x[:, : rows * PATCH, : rows * PATCH].reshape(2, rows, PATCH, rows, PATCH, 3)
  cells = cells.transpose(0, 1, 3, 2, 4, 5).reshape(2, rows * rows, -1)
  return {"pixel_values": torch.tensor(cells, dtype=torch.float32),
          "pixel_attention_mask": torch.ones(2, rows * rows, dtype=torch.long),
          "spatial_shapes": torch.full((2, 2), rows)}


def our_config(theirs, **overrides):
  config = base.get_config()
  config.tower.update(nodes.read(theirs.to_dict(), "towers"))
  if config.tower.name == "eva":  # which says nothing by itself
    config.tower.pool = "tok"
  config.tower.update(overrides)
  return config


def rows_of(config):
  """The table of the tower's tensors."""
  module = fusion.find_tower(config)
  frozen = FrozenConfigDict(config)
  model = module.Model(frozen.tower, frozen.attention, Precision())
  values = jax.ShapeDtypeStruct((1, 1, *(config.tower.image_size,) * 2, 3), jnp.uint8)
  shapes = flatten(meta.unbox(jax.eval_shape(model.init, jax.random.key(0), values))["params"])
  return table.entries([("", "", module.KEYS)], {path: leaf.shape for path, leaf in shapes.items()})


@functools.cache
def apply(config):
  """The jitted forward pass of a frozen config."""
  model = fusion.find_tower(config).Model(config.tower, config.attention, Precision())
  return jax.jit(lambda params, values: model.apply({"params": params}, values))


def run(config, params, side):
  return apply(FrozenConfigDict(config))(params, images(side))


class Reference:
  """Theirs at both sizes, and ours read from its files."""

  def __init__(self, name, folder):
    self.name, (_, self.theirs) = name, CASES[name]
    self.model = their_model(name)
    self.files = self.saved(folder / "theirs")
    self.config = our_config(self.theirs)
    self.pool = self.config.tower.pool
    self.rows = rows_of(self.config)
    self.fields, self.params = nodes.read_node(folder / "theirs", "towers")
    tower = self.config.tower
    self.tokens = int(tower.class_token) + tower.registers
    self.out = {}
    for side in (NATIVE, LARGER):
      out = self.model(**their_inputs(name, tower, side), output_hidden_states=True)
      last = out.last_hidden_state
      if name == "clip":  # they norm the class token alone; our patches are normed too
        last = self.model.post_layernorm(last)
      pooled = last[:, 0] if name == "eva" else out.pooler_output  # that is normed twice
      states = [state[:, self.tokens :].detach().numpy() for state in out.hidden_states]
      self.out[side] = last[:, self.tokens :], pooled, states

  def saved(self, folder):
    """The tensors as their files have them."""
    self.model.save_pretrained(folder)
    with safetensors_io.Reader(folder) as reader:
      return Tensors({key: reader[key] for key in reader.shapes})

  def at(self, side, **overrides):
    """Our config at a size, with positions learned at theirs."""
    sizes = dict(image_size=side, position_size=NATIVE)
    return our_config(self.theirs, **sizes | overrides)


class Tensors(dict):
  """Tensors by key in memory, as `table.load` reads them."""

  @property
  def shapes(self):
    return {key: array.shape for key, array in self.items()}


@pytest.fixture(scope="module", params=CASES)
def reference(request, tmp_path_factory):
  return Reference(request.param, tmp_path_factory.mktemp(request.param))


def check_features(got, expected):
  """Patches and pooled output are theirs, finite and not constant."""
  for ours, theirs in ((got.patches[0], expected[0]), (got.pooled[0], expected[1])):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape and np.isfinite(theirs).all() and theirs.std() > 0.1
    print(f"features within {error(ours, theirs):.1e}")
    assert error(ours, theirs) < TOLERANCE
  assert np.asarray(got.patches)[0].std(axis=1).min() > 1e-3  # patches differ


def test_features(reference):
  check_features(run(reference.at(NATIVE), reference.params, NATIVE), reference.out[NATIVE])
  patches, _, states = reference.out[NATIVE]
  before = run(reference.at(NATIVE, pool="none", feature_layer=-2), reference.params, NATIVE)
  assert before.pooled is None and error(before.patches[0], states[-2]) < TOLERANCE
  for other in (states[-3], states[-1], patches.detach().numpy()):  # twins: another layer
    assert error(before.patches[0], other) > LOUD * TOLERANCE


def test_features_and_gradients_at_another_size(reference, tmp_path):
  patches, pooled, _ = reference.out[LARGER]
  rng = np.random.default_rng(0)
  cotangents = [rng.normal(size=out.shape).astype(np.float32) for out in (patches, pooled)]
  config = FrozenConfigDict(reference.at(LARGER))
  model = fusion.find_tower(config).Model(config.tower, config.attention, Precision())

  def loss(params):
    out = model.apply({"params": params}, images(LARGER))
    return (out.patches[0] * cotangents[0]).sum() + (out.pooled[0] * cotangents[1]).sum(), out

  grads, got = jax.jit(jax.grad(loss, has_aux=True))(reference.params)
  check_features(got, reference.out[LARGER])
  ours = {key: tensor.get() for key, tensor in table.export(grads, reference.rows).items()}
  total = (patches * torch.tensor(cotangents[0])).sum()
  (total + (pooled * torch.tensor(cotangents[1])).sum()).backward(retain_graph=True)
  twin = their_model(reference.name)  # its files name the gradients
  with torch.no_grad():
    for weight, source in zip(twin.parameters(), reference.model.parameters(), strict=True):
      weight.copy_(torch.zeros_like(weight) if source.grad is None else source.grad)
  twin.save_pretrained(tmp_path / "grads")
  rename = table.renamer(((r"^vision_model\.", ""),))
  with safetensors_io.Reader(tmp_path / "grads") as reader:
    theirs = {rename(key): reader[key] for key in reader.shapes}
  assert set(ours) == set(theirs)
  worst = 0.0
  for key, grad in ours.items():
    if "mask_token" in key:
      assert not grad.any() and not theirs[key].any()
      continue
    if "key.bias" in key or "k_proj.bias" in key:  # shifts all logits of a query alike
      scale = np.abs(theirs[key.replace("key", "query").replace("k_proj", "q_proj")]).max()
      assert max(np.abs(grad).max(), np.abs(theirs[key]).max()) < TOLERANCE * scale, key
      continue
    if key == "head.attention.in_proj_bias" or key.endswith("qkv.bias"):  # and so in the head
      third = len(grad) // 3
      grad, theirs[key] = (np.delete(g, np.s_[third : 2 * third]) for g in (grad, theirs[key]))
    assert np.abs(theirs[key]).max() > 1e-3, key
    worst = max(worst, error(grad, theirs[key]))
    assert error(grad, theirs[key]) < TOLERANCE, key
  print(f"{reference.name}: gradients within {worst:.1e}")


def test_files_come_back(reference):
  assert reference.fields == nodes.read(reference.theirs.to_dict(), "towers")
  exported = {key: tensor.get() for key, tensor in table.export(reference.params,
                                                                reference.rows).items()}
  rename = table.renamer(((r"^vision_model\.", ""),))
  assert set(exported) == {rename(key) for key in reference.files}
  for key, array in reference.files.items():
    np.testing.assert_array_equal(exported[rename(key)], array, err_msg=key)
  assert nodes.read(dict(model_type="siglip_vision_model", vision_use_head=False),
                    "towers")["pool"] == "none"
  # The node of config.json, also where positions are resized.
  for config in (reference.config, reference.at(LARGER)):
    node = nodes.write(config.tower, "towers")
    again = type(reference.theirs)(**node).to_dict()
    theirs = reference.theirs.to_dict()
    ignored = {"architectures", "dtype", "_name_or_path", "transformers_version"}
    ignored |= {"hidden_act"} if reference.name == "swiglu" else set()  # not read there
    assert {k: v for k, v in again.items() if k not in ignored} == {
      k: v for k, v in theirs.items() if k not in ignored}


OTHER_RESIZE = {"bicubic": "bicubic_antialias", "bicubic_antialias": "bicubic",
                "bilinear_antialias": "bilinear_corners"}
TWINS = {
  "eps": lambda tower: dict(norm_eps=1e-6),
  "activation": lambda tower: dict(
    activation="gelu" if tower.activation == "quick_gelu" else "quick_gelu"),
  "resize": lambda tower: dict(position_resize=OTHER_RESIZE[tower.position_resize]),
}


# Each where the code is another: SigLIP 2 has SigLIP's blocks, a SwiGLU one activation.
WHERE = {"eps": ("clip", "siglip", "dinov2"), "activation": ("clip", "siglip", "dinov2"),
         "resize": ("clip", "siglip2", "dinov2", "registers")}


@pytest.mark.parametrize("twin", TWINS)
def test_twins_fail_loudly(reference, twin):
  if reference.name not in WHERE[twin]:
    return
  config = reference.at(LARGER, **TWINS[twin](reference.config.tower))
  got = run(config, reference.params, LARGER)
  measured = error(got.patches[0], reference.out[LARGER][0].detach().numpy())
  print(f"{reference.name}, {twin}: {measured / TOLERANCE:.0f} tolerances")
  assert measured > LOUD * TOLERANCE


def test_swapped_gate_and_a_moved_register_fail_loudly(reference):
  flat = flatten(reference.params)
  if reference.name == "swiglu":
    for leaf, axis in (("kernel", 2), ("bias", 1)):
      path = f"layers/gated/in/{leaf}"
      flat[path] = np.flip(flat[path], axis)
  elif reference.name == "registers":
    flat["registers"] = np.zeros_like(flat["registers"])
  elif reference.pool == "map":
    flat["pool/key/kernel"], flat["pool/value/kernel"] = (
      flat["pool/value/kernel"], flat["pool/key/kernel"])
  elif reference.name == "eva":  # another order of the three in one matrix
    for leaf in ("kernel", "bias"):
      paths = [f"layers/attention/{name}/{leaf}" for name in ("query", "value")]
      flat[paths[0]], flat[paths[1]] = flat[paths[1]], flat[paths[0]]
  else:
    return
  got = run(reference.at(LARGER), table.unflatten(flat), LARGER)
  ours, theirs = got.patches[0], reference.out[LARGER][0]
  if reference.pool == "map":
    ours, theirs = got.pooled[0], reference.out[LARGER][1]
  assert error(ours, theirs.detach().numpy()) > LOUD * TOLERANCE


@pytest.mark.parametrize("change, sentence", [
  (dict(model_type="dinov2", qkv_bias=False), "dinov2.qkv_bias is False; only True"),
  (dict(model_type="dinov2", use_mask_token=False), "dinov2.use_mask_token is False"),
  (dict(model_type="siglip2_vision_model", num_patches=250), "num_patches is 250; only a square"),
  (dict(model_type="blip_2_vision_model", qkv_bias=False), "vision_model.qkv_bias is False; only"),
  (dict(model_type="dinov2", hidden_act="tanh"), "dinov2.hidden_act is 'tanh'"),
])
def test_what_we_lack_is_named(change, sentence):
  with pytest.raises(UsageError, match=sentence):
    nodes.read(change, "towers")


@pytest.mark.parametrize("name, change, sentence", [
  ("dinov2", dict(mlp=41), "config.tower.mlp is 41; a dinov2 checkpoint of width 24"),
  ("dinov2", dict(position_resize="bicubic_offset"), "can only say 'bicubic'"),
  ("siglip2", dict(position_resize="bicubic"), "not SigLIP 2's"),
  ("eva", dict(pre_norm=True), "config.tower.pre_norm is True; a checkpoint of model_type 'blip_2"),
])
def test_what_they_lack_is_named(name, change, sentence):
  config = our_config(CASES[name][1], **change)
  with pytest.raises(UsageError, match=sentence):
    nodes.write(config.tower, "towers")


def test_defaults_of_a_sparse_node_are_theirs():
  for name, (_, theirs) in CASES.items():
    full = type(theirs)()
    tower = our_config(full).tower
    sparse = base.get_config().tower
    sparse.update(nodes.read({"model_type": full.model_type}, "towers"))
    sparse.pool = tower.pool if name == "eva" else sparse.pool
    assert sparse.to_json() == tower.to_json(), name


def test_instructblips_tower_is_blip2s():
  """The same keys and values by another name, and 39 blocks of EVA's 40 where a node is silent."""
  theirs = their_model("eva")
  config = transformers.InstructBlipVisionConfig(intermediate_size=40, **SIZED)
  other = transformers.InstructBlipVisionModel._from_config(config, attn_implementation="eager")
  other.eval().load_state_dict(theirs.state_dict())
  inputs = their_inputs("eva", our_config(config).tower, NATIVE)
  assert torch.equal(other(**inputs).last_hidden_state, theirs(**inputs).last_hidden_state)
  assert nodes.read(config.to_dict(), "towers") == nodes.read(CASES["eva"][1].to_dict(), "towers")
  full = nodes.read({"model_type": "instructblip_vision_model"}, "towers")
  assert (full["depth"], full["width"], full["heads"], full["mlp"]) == (39, 1408, 16, 6144)


def test_a_tower_says_what_it_reads():
  config = our_config(CASES["registers"][1]).tower
  module = fusion.find("towers", "dinov2")
  assert module.unread(config) == ("mask_token",)
  assert module.attention_shape(config) == (9 + 1 + 3, 2, 2, 12)
  config.update(feature_layer=-2, pool="none")
  assert module.unread(config) == ("layers[1:]", "post_norm", "mask_token")
  with pytest.raises(UsageError, match="feed_forward is 'gatd'; did you mean 'gated'"):
    config.update(feed_forward="gatd")
    rows_of(our_config(CASES["dinov2"][1], feed_forward="gatd"))
  assert vit.MODEL_TYPES == ("clip_vision_model", "siglip_vision_model")
