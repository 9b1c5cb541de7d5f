"""Held to CoCa of OpenCLIP: embeddings, caption logits, losses, gradients, files, both directions.

Three tiny models are drawn from seeds: what was released ("shared", one pooler), the two poolings
that follow the paper, and the mask of the class token as released and as it should be.
"""

import functools
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import open_clip
import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.loss import CoCaLoss

from tests.numbers import error
from vlm_jax.configs import base
from vlm_jax.convert import coca, systems
from vlm_jax.core import fusion
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Encoded, Pixels, Tokens
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.core.tree import flatten
from vlm_jax.data.pack import Packer

TOLERANCE = 2e-4  # of gradients
CLOSE = 2e-5  # of embeddings, logits and losses
VOCAB, LENGTH, SIDE, PAIRS = 61, 9, 12, 4
END = VOCAB - 1
# Pooling, whether the class token's mask is right; the width of pictures is that of text where
# OpenCLIP needs it.
KINDS = {"released": (True, False), "cascade": ("cascade", True), "parallel": ("parallel", False)}


def their_config(kind: str) -> dict:
  pooling = KINDS[kind][0]
  text = dict(context_length=LENGTH, vocab_size=VOCAB, width=32, heads=4)
  return {
    "embed_dim": 32,
    "vision_cfg": dict(image_size=SIDE, layers=2, width=24 if kind == "released" else 32,
                       head_width=8, patch_size=4, attentional_pool=pooling, attn_pooler_queries=5,
                       attn_pooler_heads=2, output_tokens=True),
    "text_cfg": dict(text, layers=2, embed_cls=True, output_tokens=True),
    "multimodal_cfg": dict(text, layers=1),
    "custom_text": True,
    **({"quick_gelu": True} if kind == "parallel" else {}),
  }


def their_model(kind: str) -> CoCa:
  """Every weight overwritten: N(0, 0.1^2), norms around 1, larger where little would depend on."""
  torch.manual_seed(list(KINDS).index(kind))
  model = CoCa(**{name: value for name, value in their_config(kind).items()
                  if name != "custom_text"}).eval()
  model.text.correct_cls_mask = KINDS[kind][1]
  sharp = ("in_proj_weight", "proj_weight", "query", "positional_embedding", "cls_emb",
           "class_embedding", "text_projection", "visual.proj", "c_fc.weight")
  with torch.no_grad():
    for name, weight in model.named_parameters():
      weight.normal_(0, 1.0 if "token_embedding" in name else 0.3 if name.endswith(sharp) else 0.1)
      if ".ln_" in name and name.endswith("weight"):
        weight.add_(1)
    model.logit_scale.fill_(1.5)
  return model


def recipe():
  config = base.get_config()
  config.data.sources.only = base.source(name="only")
  config.data.update(rows=2, tokens=20, images=2)
  config.attention.implementation = "dense"
  return config


def documents(config) -> list[Encoded]:
  """Pictures with texts of several lengths, one of which fills all positions."""
  rng, made = np.random.default_rng(5), []
  for number, length in enumerate((4, LENGTH, 3, 7)):
    ids = np.append(rng.integers(1, END, length - 1), END).astype(np.int32)
    picture = rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    made.append(Encoded((Pixels(picture), Tokens(ids, np.arange(length) > 0)), "only", str(number)))
  return made


def pack(config, documents: list[Encoded]) -> tuple[dict, list[tuple[int, int, int]]]:
  """The flat batch, and the row, first slot and place of every document."""
  module = fusion.find_fusion(config)
  packer = Packer(module.fields(config), module.axes(config), config.data.rows)
  layouts = [module.layout(one, config, np.random.default_rng(0)) for one in documents]
  assert packer.add(layouts)
  packed, where = packer.build(), {}
  for row, content in enumerate(packed.rows):
    start = 0
    for place, layout in enumerate(content):
      where[layout.key] = row, start, place
      start += layout.sizes["text"]
  return packed.arrays, [where[one.key] for one in documents]


class Tensors(dict):
  """Arrays by key as a source of `table.load`."""

  @property
  def shapes(self):
    return {key: value.shape for key, value in self.items()}


class Reference:
  """Theirs, run once: embeddings, logits, losses, and gradients as our tree."""

  def __init__(self, kind: str, directory):
    self.kind, self.model, self.directory = kind, their_model(kind), directory
    described = {"model_cfg": their_config(kind), "preprocess_cfg": {}}
    (directory / coca.CONFIG).write_text(json.dumps(described))
    torch.save(self.model.state_dict(), directory / coca.WEIGHTS[1])
    self.config, self.params = systems.read(directory, recipe())
    if KINDS[kind][1]:
      self.config.fusion.compat = ""
    self.documents = documents(self.config)
    self.lengths = [len(one.parts[1].ids) for one in self.documents]
    self.pixels, self.ids = their_inputs(self.config, self.documents)
    out = self.model(self.pixels, self.ids)
    # Their pooler of one keeps an axis of 1, which their loss cannot read: nobody trained with it.
    image = out["image_features"].reshape(PAIRS, -1)
    losses = CoCaLoss(2.0, 1.0)(image, out["text_features"], out["logits"],
                                out["labels"], out["logit_scale"])
    sum(losses).backward()
    numpy = lambda x: x.detach().numpy()
    self.logits = [numpy(out["logits"][n, : length - 1]) for n, length in enumerate(self.lengths)]
    self.outputs = {"image": numpy(image), "text": numpy(out["text_features"]),
                    "contrast": numpy(losses[0]), "lm": numpy(losses[1])}
    grads = Tensors({name: numpy(weight.grad) for name, weight in self.model.named_parameters()})
    self.grads = systems.load(grads, self.config)


def their_inputs(config, documents: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
  pixels = np.stack([one.parts[0].values for one in documents]) / 255
  pixels = (pixels - np.asarray(config.tower.mean)) / np.asarray(config.tower.std)
  ids = np.zeros((len(documents), LENGTH), np.int64)
  for row, one in zip(ids, documents, strict=True):
    row[: len(one.parts[1].ids)] = one.parts[1].ids
  return torch.tensor(pixels.transpose(0, 3, 1, 2)).float(), torch.tensor(ids)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  return functools.cache(lambda kind: Reference(kind, tmp_path_factory.mktemp(kind)))


@functools.cache
def compiled(config: ml_collections.FrozenConfigDict, gradients: bool):
  module = fusion.find_fusion(config)

  def run(params, flat):
    batch = from_flat(flat)
    output = module.Model(config).apply({"params": params}, batch)
    sums, weights = module.losses(output, batch, config), module.weights(batch, config)
    means = {name: config.fusion.objectives[name] * sums[name].sum() / weights[name].sum()
             for name in sums}
    return sum(means.values()), (means, output.embeddings, output.logits())

  return jax.jit(jax.value_and_grad(run, has_aux=True) if gradients else run)


def ours(one: Reference, config=None, params=None, change=lambda flat: flat, gradients=False):
  """Outputs by name and caption logits by document, and the gradients if asked for."""
  config, params = config or one.config, jax.tree.map(jnp.asarray, params or one.params)
  flat, where = pack(config, one.documents)
  out = compiled(ml_collections.FrozenConfigDict(config), gradients)(params, change(flat))
  (_, (means, embeddings, logits)), grads = out if gradients else (out, None)
  at = tuple(np.array([(row, place) for row, _, place in where]).T)
  logits = [np.asarray(logits)[row, start : start + length - 1]
            for (row, start, _), length in zip(where, one.lengths, strict=True)]
  return {"image": np.asarray(embeddings.image)[at], "text": np.asarray(embeddings.text)[at],
          **jax.tree.map(np.asarray, means)}, logits, grads


@pytest.mark.parametrize("kind", KINDS)
def test_parity(kind, reference):
  one = reference(kind)
  outputs, logits, grads = ours(one, gradients=True)
  found = {name: error(outputs[name], expected) for name, expected in one.outputs.items()}
  for got, expected in zip(logits, one.logits, strict=True):
    assert np.isfinite(expected).all() and expected.std() > 1e-2
    found["logits"] = max(found.get("logits", 0), error(got, expected))
  assert max(found.values()) < CLOSE, found
  assert one.outputs["image"].std() > 1e-2 and one.outputs["text"].std(0).max() > 1e-2
  got, expected = flatten(grads), flatten(one.grads)
  assert got.keys() == expected.keys()
  largest, worst = max(np.abs(leaf).max() for leaf in expected.values()), {}
  for path, leaf in expected.items():
    if path.endswith("key/bias"):  # softmax does not see what all keys share: only rounding is left
      assert np.abs(got[path]).max() < 1e-6 * largest and np.abs(leaf).max() < 1e-6 * largest
    else:
      worst[path] = error(got[path], leaf)
  print(kind, found, max(worst.items(), key=lambda item: item[1]))
  assert max(worst.values()) < TOLERANCE, max(worst.items(), key=lambda item: item[1])


def sees_less(flat: dict) -> dict:
  """The class token without the last token of its text."""
  return flat | {"masks/reads/hi": np.maximum(flat["masks/reads/hi"] - 1, 0)}


def sees_ahead(flat: dict) -> dict:
  """A text with its next token."""
  hi = flat["masks/text/hi"]
  return flat | {"masks/text/hi": np.where(hi > 0, np.minimum(hi + 1, hi.shape[1]), 0)}


def sees_less_of_the_picture(flat: dict) -> dict:
  """A text without the last row of its picture."""
  return flat | {"masks/cross/hi": np.maximum(flat["masks/cross/hi"] - 1, 0)}


TWINS = {
  ("released", "the mask as it should be"): ("fusion.compat", ""),
  ("cascade", "the mask as released"): ("fusion.compat", "open_clip"),
  ("cascade", "pooled in parallel"): ("fusion.pooling", "parallel"),
  ("released", "activation"): ("llm.activation", "quick_gelu"),
  ("released", "norms of the pooler"): ("connector.norm_eps", 1e-1),
  ("released", "position of the class token"): ("llm.positions", LENGTH - 1),
  ("cascade", "class token"): sees_less,
  ("parallel", "text"): sees_ahead,
  ("released", "picture"): sees_less_of_the_picture,
}


@pytest.mark.parametrize("kind, twin", TWINS)
def test_twins_fail_loudly(kind, twin, reference):
  one, change = reference(kind), TWINS[kind, twin]
  config, flat = one.config.copy_and_resolve_references(), lambda flat: flat
  params = one.params
  if callable(change):
    flat = change
  else:
    path, value = change
    node, name = path.split(".")
    config[node][name] = value
    if name == "positions":
      config.llm.positions = LENGTH
      # The class token at the end of every text, as if there were no padding.
      flat = lambda flat: flat | {"streams/summary/positions": np.minimum(
        flat["streams/summary/positions"], LENGTH - 1)}
  outputs, logits, _ = ours(one, config, params, flat)
  moved = max(error(outputs[name], one.outputs[name]) for name in ("image", "text"))
  moved = max(moved, *(error(got, expected) for got, expected in
                       zip(logits, one.logits, strict=True)))
  print(kind, twin, f"{moved / CLOSE:.0f} tolerances")
  assert moved > 100 * CLOSE


@pytest.mark.parametrize("kind", ["released", "parallel"])
def test_files_there_and_back(kind, reference, tmp_path):
  one = reference(kind)
  systems.write(tmp_path / "out", one.config, one.params, image_token=0)
  model = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
  theirs = one.model.state_dict()
  assert model.state_dict().keys() == theirs.keys()
  assert all(torch.equal(leaf, theirs[name]) for name, leaf in model.state_dict().items())
  out = model(one.pixels, one.ids)
  np.testing.assert_array_equal(out["image_features"].detach().numpy().reshape(PAIRS, -1),
                                one.outputs["image"])
  np.testing.assert_array_equal(out["text_features"].detach().numpy(), one.outputs["text"])
  assert tuple(model.visual.preprocess_cfg["mean"]) == one.config.tower.mean
  assert systems.is_published(tmp_path / "out")
  config, params = systems.read(tmp_path / "out", recipe())
  assert config.to_json() == one.config.to_json()
  again, first = flatten(params), flatten(one.params)
  assert all(np.array_equal(again[path], first[path]) for path in first)
  with systems.open_pieces(one.directory, one.config) as pieces:
    assert all(np.array_equal(pieces[path].whole(), first[path]) for path in first)
  (tmp_path / "out" / coca.WEIGHTS[0]).unlink()
  with pytest.raises(DataError, match="holds neither of open_clip_model.safetensors"):
    systems.read(tmp_path / "out", recipe())


def test_what_is_no_such_model(reference):
  theirs = {"model_cfg": their_config("released")}
  changed = lambda node, **fields: {"model_cfg": theirs["model_cfg"] | {
    node: theirs["model_cfg"][node] | fields}}
  for given, sentence in (
    ({"model_cfg": {"embed_dim": 4}}, "only a CoCa"),
    (changed("vision_cfg", attentional_pool=False), "attentional_pool is False"),
    (changed("vision_cfg", timm_model_name="vit"), "timm_model_name is 'vit'"),
    (changed("text_cfg", hf_model_name="roberta-base"), "hf_model_name is 'roberta-base'"),
    (changed("text_cfg", embed_cls=False), "embed_cls is False"),
    (changed("multimodal_cfg", width=48), "multimodal_cfg.width is 48"),
    (changed("multimodal_cfg", heads=2), "multimodal_cfg.heads 2"),
    (theirs | {"preprocess_cfg": {"resize_mode": "longest"}}, "resize_mode is 'longest'"),
  ):
    with pytest.raises(UsageError, match=sentence):
      coca.read_config(given, recipe())
  for field, value in (("fusion.compat", ""), ("tower.read_class", False), ("llm.cross", "inside"),
                       ("llm.activation", "relu"), ("data.decode.fit", "pad")):
    config = reference("released").config.copy_and_resolve_references()
    node, name = field.rsplit(".", 1)
    (config.data.decode if node == "data.decode" else config[node])[name] = value
    with pytest.raises(UsageError, match=f"config.{field}|tower.activation"):
      coca.write_config(config, 0)


def test_released_configs_are_of_the_released_size():
  """Counts of open_clip's own models of these names."""
  for name, count in (("coca_ViT-B-32", 253_560_065), ("coca_ViT-L-14", 638_450_177)):
    theirs = open_clip.get_model_config(name)
    config = coca.read_config({"model_cfg": theirs}, recipe())
    assert sum(int(np.prod(s)) for s in systems.shapes(config).values()) == count
