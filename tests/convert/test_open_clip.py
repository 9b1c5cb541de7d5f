"""OpenCLIP's CLIP held to open_clip: embeddings, logits, gradients, both towers, files.

Measured: embeddings and logits below 2e-6, gradients below 3e-6.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import open_clip as theirs
import pytest
import torch
from ml_collections import FrozenConfigDict
from safetensors.torch import save_file

from tests.numbers import error
from vlm_jax.configs import base
from vlm_jax.convert import open_clip, sources, systems, table
from vlm_jax.core import fusion
from vlm_jax.core.batch import Batch, Media, Texts
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.core.tree import flatten, unflatten

TOLERANCE, CLOSE, LOUD = 2e-4, 2e-5, 100
VOCAB, LENGTH, PAIRS, EOS = 61, 9, 4, 40
KINDS = {
  "quick": dict(embed_dim=10, quick_gelu=True,
                vision_cfg=dict(layers=2, width=24, head_width=8, patch_size=5, image_size=15,
                                mlp_ratio=1.7, norm_kwargs=dict(eps=0.3)),
                text_cfg=dict(context_length=LENGTH, vocab_size=VOCAB, width=20, heads=2, layers=3,
                              norm_kwargs=dict(eps=0.1))),
  "exact": dict(embed_dim=12,
                vision_cfg=dict(layers=2, width=24, head_width=12, patch_size=4, image_size=12,
                                mlp_ratio=2.0, pool_type="avg", no_ln_pre=True),
                text_cfg=dict(context_length=LENGTH, vocab_size=VOCAB, width=16, heads=4, layers=2,
                              pool_type="eos", eos_id=EOS)),
}


class Tensors(dict):
  """Arrays by key as a source of `table.load`."""

  @property
  def shapes(self):
    return {key: value.shape for key, value in self.items()}


class Reference:
  """Theirs, run once: embeddings, logits, and gradients as our tree."""

  def __init__(self, kind: str):
    torch.manual_seed(len(kind))
    self.kind, self.model = kind, theirs.CLIP(**KINDS[kind]).eval()
    sharp = ("in_proj_weight", "c_fc.weight", "positional_embedding", "proj", "projection")
    with torch.no_grad():
      for name, weight in self.model.named_parameters():
        weight.normal_(0, 1.0 if "token_emb" in name else 0.3 if name.endswith(sharp) else 0.1)
        if "ln_" in name and name.endswith("weight"):
          weight.add_(1)
        if name.endswith("c_fc.bias"):
          weight.sub_(1)  # where the kinds of gelu differ
      self.model.logit_scale.fill_(1.5)
    node = {"model_cfg": KINDS[kind]}
    self.config = open_clip.read_config(node, recipe())
    self.entries = table.entries(open_clip.parts(self.config), systems.shapes(self.config))
    self.state = Tensors({key: value.numpy() for key, value in self.model.state_dict().items()})
    self.params = table.load(self.state, self.entries)
    rng = np.random.default_rng(3)
    side = self.config.tower.image_size
    self.pixels = rng.integers(0, 256, (1, PAIRS, side, side, 3)).astype(np.uint8)
    self.ids = rng.integers(3, EOS, (1, PAIRS, LENGTH)).astype(np.int32)
    for number, row in enumerate(self.ids[0]):
      row[4 + number], row[5 + number :] = EOS, 0
    self.cotangent = rng.normal(size=(PAIRS, PAIRS)).astype(np.float32)
    mean, std = np.array(self.config.tower.mean), np.array(self.config.tower.std)
    x = ((self.pixels[0] / 255 - mean) / std).transpose(0, 3, 1, 2)
    image = self.model.encode_image(torch.tensor(x).float(), normalize=True)
    text = self.model.encode_text(torch.tensor(self.ids[0]).long(), normalize=True)
    logits = self.model.logit_scale.exp() * image @ text.T
    (logits * torch.tensor(self.cotangent)).sum().backward()
    numpy = lambda value: value.detach().numpy()
    self.outputs = {"image": numpy(image), "text": numpy(text), "logits": numpy(logits)}
    grads = {name: numpy(weight.grad) for name, weight in self.model.named_parameters()}
    self.grads = table.load(Tensors(grads), self.entries)

  def run(self, params=None, gradients=True, **changes):
    """Our gradients (or the loss) and outputs; `changes` are of nodes of the config."""
    config = self.config.copy_and_resolve_references()
    for node, fields in changes.items():
      config[node].update(fields)
    run = compiled(FrozenConfigDict(config), gradients)
    params = jax.tree.map(jnp.asarray, self.params if params is None else params)
    return jax.tree.map(np.asarray, run(params, self.pixels, self.ids, self.cotangent))


@functools.cache
def compiled(config, gradients):
  module = fusion.find_fusion(config)

  def run(params, pixels, ids, cotangent):
    ones = jnp.ones(ids.shape[:2], jnp.int32)
    batch = Batch({}, {"images": Media(pixels, ones)}, {},
                  {"captions": Texts(ids, ones, 0 * ones, jnp.zeros((1, PAIRS, 2), jnp.int32))})
    out = module.Model(config).apply({"params": params}, batch)
    image, text = out.image[0], out.text[0]
    logits = out.scale * image @ text.T
    return (logits * cotangent).sum(), {"image": image, "text": text, "logits": logits}

  return jax.jit(jax.grad(run, has_aux=True) if gradients else run)


def recipe():
  config = base.get_config()
  config.data.sources.only = base.source(name="only")
  config.attention.implementation = "dense"
  return config


@pytest.fixture(scope="module", params=KINDS)
def reference(request):
  return Reference(request.param)


def test_parity(reference):
  grads, outputs = reference.run()
  for name, expected in reference.outputs.items():
    assert np.isfinite(expected).all() and expected.std(axis=0).min() > 1e-3
    print(f"{reference.kind}, {name}: {error(outputs[name], expected):.1e}")
    assert error(outputs[name], expected) < CLOSE, name
  got, expected = flatten(grads), flatten(reference.grads)
  assert got.keys() == expected.keys()
  largest = max(np.abs(leaf).max() for leaf in expected.values())
  worst = {}
  for path, leaf in expected.items():
    if path.endswith("key/bias"):  # softmax does not see what all keys share
      assert max(np.abs(got[path]).max(), np.abs(leaf).max()) < 1e-6 * largest
    else:
      assert np.abs(leaf).max() > 1e-4, path
      worst[path] = error(got[path], leaf)
  print(f"{reference.kind}, gradients: {max(worst.values()):.1e} ({max(worst, key=worst.get)})")
  assert max(worst.values()) < TOLERANCE, worst


def test_twins_fail_loudly(reference):
  """Each mistake in both towers, of which an embedding depends on its own."""
  other = "gelu" if reference.kind == "quick" else "quick_gelu"
  flat = flatten(reference.params)
  for node in ("tower", "llm"):
    paths = [f"{node}/layers/attention/{part}/kernel" for part in ("query", "value")]
    flat[paths[0]], flat[paths[1]] = flat[paths[1]], flat[paths[0]]
  both = lambda **fields: reference.run(gradients=False, tower=fields, llm=fields)
  wrong = {"activation": both(activation=other), "eps": both(norm_eps=1.0),
           "parts": reference.run(unflatten(flat))}
  errors = {f"{twin}, {name}": error(outputs[name], reference.outputs[name])
            for twin, (_, outputs) in wrong.items() for name in ("image", "text")}
  print(reference.kind, {name: f"{value / CLOSE:.0f}" for name, value in errors.items()})
  assert min(errors.values()) > LOUD * CLOSE, errors


def test_files_come_back(reference):
  """Export loads there, every key and byte; config and node are each other's inverse."""
  exported = {key: tensor.get() for key, tensor in table.export(
    reference.params, reference.entries).items()}
  assert exported.keys() == reference.state.keys()
  for key, value in reference.state.items():
    assert exported[key].tobytes() == value.tobytes(), key
  node = open_clip.write_config(reference.config)
  again = theirs.CLIP(**node["model_cfg"]).eval()
  again.load_state_dict({key: torch.tensor(value) for key, value in exported.items()})
  ids = torch.tensor(reference.ids[0]).long()
  assert torch.equal(again.encode_text(ids), reference.model.encode_text(ids))
  assert open_clip.read_config(node, recipe()).to_json() == reference.config.to_json()


@pytest.mark.parametrize("name", ["a.pth", "open_clip_model.safetensors", "custom.safetensors"])
def test_towers_start_from_a_file(reference, tmp_path, name):
  """`config.tower.init` and `config.llm.init` find their tower in the file of a whole model."""
  state = reference.model.state_dict()
  if name == "custom.safetensors":  # their class of two towers with a prefix each
    state = {key if key.startswith(("visual.", "logit")) else f"text.{key}": value
             for key, value in state.items()}
  save = torch.save if name.endswith(".pth") else save_file
  save(state, tmp_path / name)
  flat = flatten(reference.params)
  for node in ("tower", "llm"):
    mine = {path.removeprefix(f"{node}/"): leaf for path, leaf in flat.items()
            if path.startswith(f"{node}/")}
    shapes = {path: leaf.shape for path, leaf in mine.items()}
    got = sources.load_node(tmp_path / name, node, reference.config, shapes, np.dtype("float32"))
    assert got.keys() == mine.keys()
    for path, leaf in mine.items():
      np.testing.assert_array_equal(got[path], leaf, err_msg=path)
  shapes = {path: (1, *leaf.shape[1:]) if path.startswith("layers/")
            else leaf.shape for path, leaf in flatten(reference.params["tower"]).items()}
  with pytest.raises(DataError, match="config.tower.init=.*unexpected: transformer.resblocks.1"):
    sources.load_node(tmp_path / name, "tower", reference.config, shapes, np.dtype("float32"))


@pytest.mark.parametrize("node, change, sentence", [
  ("vision_cfg", dict(timm_model_name="vit_x"), "vision_cfg.timm_model_name is 'vit_x'; only None"),
  ("vision_cfg", dict(attentional_pool=True), "vision_cfg.attentional_pool is True"),
  ("vision_cfg", dict(pool_type="none"), "vision_cfg.pool_type is 'none'"),
  ("text_cfg", dict(embed_cls=True), "text_cfg.embed_cls is True"),
  ("text_cfg", dict(pool_type="first"), "text_cfg.pool_type is 'first'"),
])
def test_what_we_lack_is_named(node, change, sentence):
  model = {**KINDS["exact"], node: KINDS["exact"][node] | change}
  with pytest.raises(UsageError, match=sentence):
    open_clip.read_config({"model_cfg": model}, recipe())


def test_what_they_lack_is_named():
  config = open_clip.read_config({"model_cfg": KINDS["quick"]}, recipe())
  config.tower.pool = "map"
  with pytest.raises(UsageError, match="vision_cfg.pool_type is 'map'"):
    open_clip.write_config(config)
  config.tower.update(pool="tok", patch_bias=True)
  with pytest.raises(UsageError, match="config.tower.patch_bias is True; an OpenCLIP checkpoint"):
    open_clip.write_config(config)
  config.llm.activation = "gelu"
  with pytest.raises(UsageError, match="OpenCLIP has quick_gelu in both towers or in neither"):
    open_clip.write_config(config)


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-L-14", "ViT-H-14", "ViT-bigG-14"])
def test_published_sizes_come_back(name):
  config = open_clip.read_config({"model_cfg": theirs.get_model_config(name)}, recipe())
  widths = {"ViT-B-32-quickgelu": (768, 3072, 12), "ViT-L-14": (1024, 4096, 16),
            "ViT-H-14": (1280, 5120, 16), "ViT-bigG-14": (1664, 8192, 16)}
  assert (config.tower.width, config.tower.mlp, config.tower.heads) == widths[name]
  assert config.tower.activation == ("quick_gelu" if "quick" in name else "gelu")
  assert open_clip.read_config(open_clip.write_config(config), recipe()).to_json() == (
    config.to_json())
