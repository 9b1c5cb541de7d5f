"""Held to Blip2QFormerModel and InstructBlipQFormerModel: outputs and gradients of every use.

Measured: outputs 4e-6 (BLIP-2) and 2e-6 (InstructBLIP), gradients 2e-5 and 1e-5.
"""

import dataclasses
import functools
import os
from types import SimpleNamespace

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.core import meta
from ml_collections import FrozenConfigDict
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from tests.numbers import error
from vlm_jax.configs import base
from vlm_jax.connectors import qformer
from vlm_jax.convert import table
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.precision import Precision
from vlm_jax.core.tree import flatten, unflatten
from vlm_jax.train import initial

TOLERANCE = 2e-4  # of gradients
CLOSE = 2e-5  # of outputs
LOUD = 100
WIDTH, SEES, QUERIES, VOCAB, LENGTH, PLACES, ROWS, OUT = 24, 20, 5, 31, 6, 9, 3, 14
REAL = np.array([6, 3, 4])  # words of every row, padding behind them
RNG = np.random.default_rng(3)
FEATURES = RNG.normal(size=(ROWS, PLACES, SEES)).astype(np.float32)
TOKENS = RNG.integers(1, VOCAB, (ROWS, LENGTH)).astype(np.int32)
THERE = np.arange(LENGTH) < REAL[:, None]


def sizes(eps: float) -> dict:
  return dict(hidden_size=WIDTH, encoder_hidden_size=SEES, num_hidden_layers=4,
              num_attention_heads=3, intermediate_size=40, vocab_size=VOCAB,
              max_position_embeddings=12, layer_norm_eps=eps, pad_token_id=0)


class Blip2(torch.nn.Module):
  """Theirs with what lies outside of it in Blip2ForImageTextRetrieval, under the names there."""

  def __init__(self):
    super().__init__()
    config = transformers.Blip2QFormerConfig(use_qformer_text_input=True, **sizes(0.07))
    self.query_tokens = torch.nn.Parameter(torch.zeros(1, QUERIES, WIDTH))
    self.embeddings = Blip2TextEmbeddings(config)
    self.qformer = transformers.Blip2QFormerModel._from_config(config, attn_implementation="eager")
    self.language_projection = torch.nn.Linear(WIDTH, OUT)

  def read(self, words: bool, queries: bool, mask, kind: str = "eager"):
    self.qformer.config._attn_implementation = kind
    ask = self.query_tokens.expand(ROWS, -1, -1) if queries else None
    x = self.embeddings(torch.tensor(TOKENS) if words else None, query_embeds=ask)
    return self.qformer(
      x, query_length=QUERIES if queries else 0, attention_mask=mask,
      encoder_hidden_states=torch.tensor(FEATURES) if queries else None).last_hidden_state


class InstructBlip(torch.nn.Module):
  """The same of InstructBlipForConditionalGeneration, which always has words."""

  def __init__(self):
    super().__init__()
    config = transformers.InstructBlipQFormerConfig(**sizes(0.05))
    self.query_tokens = torch.nn.Parameter(torch.zeros(1, QUERIES, WIDTH))
    self.qformer = transformers.InstructBlipQFormerModel._from_config(
      config, attn_implementation="eager")
    self.language_projection = torch.nn.Linear(WIDTH, OUT)

  def read(self, words: bool, queries: bool, mask):
    return self.qformer(
      torch.tensor(TOKENS) if words else None, attention_mask=mask,
      query_embeds=self.query_tokens.expand(ROWS, -1, -1),
      encoder_hidden_states=torch.tensor(FEATURES)).last_hidden_state


def uses(kind: str) -> dict[str, tuple[bool, bool, torch.Tensor | None, IntervalMask | None]]:
  """Of every use: whether there are words and queries, their mask, ours."""
  ones = np.ones((ROWS, QUERIES), bool)
  padded = torch.tensor(np.concatenate([ones, THERE], 1)).long()
  every = np.broadcast_to((QUERIES + REAL)[:, None], (ROWS, QUERIES + LENGTH))
  found = {"instructed": (True, True, padded, IntervalMask(0 * every, every))}
  if kind == "instructblip":
    return found
  words = np.broadcast_to(REAL[:, None], THERE.shape)
  return found | {
    "alone": (False, True, None, None),
    "words": (True, False, torch.tensor(THERE).long(), IntervalMask(0 * words, words)),
    "says": (True, True, additive(says()), says())}


def says() -> IntervalMask:
  """Queries see queries; words see all queries and the words up to themselves."""
  hi = np.r_[np.full(QUERIES, QUERIES), QUERIES + 1 + np.arange(LENGTH)]
  hi = np.broadcast_to(hi, (ROWS, QUERIES + LENGTH)).astype(np.int32)
  return IntervalMask(0 * hi, hi)


def additive(mask: IntervalMask) -> torch.Tensor:
  seen = torch.tensor(np.asarray(mask.dense()))[:, None]
  return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


class Reference:
  """Theirs with every weight overwritten, run once; ours with their weights."""

  def __init__(self, kind: str):
    torch.manual_seed(1)
    self.uses = uses(kind)
    self.model = (Blip2 if kind == "blip2" else InstructBlip)().eval()
    sharp = ("query.weight", "key.weight", "query_tokens", "embeddings.weight",
             "intermediate.dense.weight", "intermediate_query.dense.weight",
             "output.dense.weight", "output_query.dense.weight")
    with torch.no_grad():
      for name, weight in self.model.named_parameters():
        weight.normal_(0, 0.4 if name.endswith(sharp) else 0.1)
        if "norm" in name.lower() and name.endswith("weight"):
          weight.add_(1)
    rng, loss, self.out, self.cotangents = np.random.default_rng(4), 0, {}, {}
    for name, (words, queries, mask, _) in self.uses.items():
      out = self.model.read(words, queries, mask)
      if name == "alone":
        out = torch.cat([out, out], 1)[:, :QUERIES]  # a view of its own
        self.out["projected"] = self.model.language_projection(out)
      self.out[name] = out
    for name, out in self.out.items():
      real = np.ones(out.shape[:2], bool)
      if self.uses.get(name, (False,))[0]:  # nothing is asked of padding
        real[:, -LENGTH:] = THERE
      self.cotangents[name] = (rng.normal(size=out.shape) * real[..., None]).astype(np.float32)
      loss = loss + (out * torch.tensor(self.cotangents[name])).sum()
    loss.backward()
    self.out = {name: out.detach().numpy() for name, out in self.out.items()}
    spelled = table.renamer(qformer_names(kind))
    weights = dict(self.model.named_parameters())
    self.grads = {spelled(name): weight.grad for name, weight in weights.items()}
    self.config = base.get_config()
    eps = self.model.qformer.config.layer_norm_eps
    self.config.connector.update(
      name="qformer", latents=QUERIES, slot_width=WIDTH, depth=4, hidden=40, heads=3, norm_eps=eps,
      vocab_size=VOCAB, positions=12)
    tensors = {spelled(name): weight.detach().numpy() for name, weight in weights.items()}
    if kind == "instructblip":  # no use of it projects
      tensors = {name: value for name, value in tensors.items() if "language" not in name}
    self.params = table.load(Tensors(tensors), self.entries(tensors))

  def entries(self, tensors: dict | None = None) -> list[table.Entry]:
    shapes = {path: leaf.shape for path, leaf in flatten(shapes_of(self.config)).items()}
    kept = {path: shape for path, shape in shapes.items()
            if "project" not in path or "alone" in self.uses}
    return table.entries([("", "", qformer.KEYS)], kept)

  def run(self, config=None, params=None) -> tuple[dict, dict]:
    """Our outputs of all uses and the gradients of the same sum."""
    config = config or self.config
    model = qformer.Model(config.connector, OUT, Precision())

    def loss(params):
      out = self.forward(model, params)
      if "alone" in out:
        out["projected"] = model.apply({"params": params}, FEATURES[:, None], (3, 3))[:, 0]
      return sum((out[name] * self.cotangents[name]).sum() for name in out), out

    params = jax.tree.map(jnp.asarray, params or self.params)
    grads, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    return out, grads

  def forward(self, model, params, later: int = 0) -> dict:
    """Our outputs of all uses; a twin sees `later` keys more."""
    off = lambda mask: mask and dataclasses.replace(mask, hi=mask.hi + later)
    return {name: model.apply({"params": params}, words, queries, off(mask), method=read)
            for name, (words, queries, _, mask) in self.uses.items()}

  def twin(self, change=lambda flat: flat, later: int = 0, **fields) -> float:
    """The error with other parameters, masks or fields."""
    config = self.config.copy_and_resolve_references()
    config.connector.update(fields)
    out = self.compiled(FrozenConfigDict(config.connector))(
      unflatten(change(flatten(self.params))), later)
    return self.error({"projected": self.out.get("projected"), **out})

  @functools.cache  # noqa: B019
  def compiled(self, config: FrozenConfigDict):
    return jax.jit(functools.partial(self.forward, qformer.Model(config, OUT, Precision())))

  def error(self, out: dict) -> float:
    """The largest of any use; padding is compared with nothing."""
    return max(error(out[name] * (self.cotangents[name] != 0), self.out[name] * (
      self.cotangents[name] != 0)) for name in self.out)


def qformer_names(kind: str) -> tuple:
  return () if kind == "blip2" else (
    (r"^qformer\.embeddings\.layernorm", "qformer.layernorm"), (r"^qformer\.embeddings\.",
                                                               "embeddings."))


def read(model: qformer.Model, words: bool, queries: bool, mask: IntervalMask | None):
  """One use of ours."""
  parts = [model.ask(ROWS)] if queries else []
  if words:
    parts.append(model.spell(TOKENS, np.broadcast_to(np.arange(LENGTH), TOKENS.shape)))
  mask = None if mask is None else jax.tree.map(jnp.asarray, mask)
  return model.read(jnp.concatenate(parts, 1), mask, FEATURES if queries else None)[0]


@functools.cache
def reference(kind: str) -> Reference:
  return Reference(kind)


def shapes_of(config):
  """Of all parameters, both sides and the projection."""
  model = qformer.Model(config.connector, OUT, Precision())

  def every(model):
    return read(model, True, True, says()), model(FEATURES[:, None], (3, 3))

  init = lambda: meta.unbox(model.init(jax.random.key(0), method=every))["params"]
  return jax.eval_shape(init)


class Tensors(dict):
  """Arrays by key as a source of `table.load`."""

  @property
  def shapes(self):
    return {key: value.shape for key, value in self.items()}


@pytest.mark.parametrize("kind", ["blip2", "instructblip"])
def test_outputs_and_gradients_are_theirs(kind):
  theirs = reference(kind)
  out, grads = theirs.run()
  for name, values in theirs.out.items():
    assert np.isfinite(values).all() and values.std(axis=(0, 1)).min() > 1e-2, name
  print(f"outputs: {theirs.error(out):.1e}")
  assert theirs.error(out) < CLOSE
  ours = {key: tensor.get() for key, tensor in table.export(grads, theirs.entries()).items()}
  worst = {}
  for key, grad in theirs.grads.items():
    if grad is None or "language" in key and kind == "instructblip":
      continue
    expected = grad.numpy()
    if key.endswith("key.bias"):  # softmax does not see what all keys share
      assert np.abs(expected).max() < 1e-4 and np.abs(ours[key]).max() < 1e-4
      continue
    assert np.isfinite(ours[key]).all() and np.abs(expected).max() > 1e-3, key
    worst[key] = error(ours[key], expected)
  key = max(worst, key=worst.get)
  print(f"gradients: {worst[key]:.1e} ({key})")
  assert set(ours) == set(worst) | {key for key in ours if key.endswith("key.bias")}
  assert worst[key] < TOLERANCE


def swapped(flat: dict) -> dict:
  """The MLPs of queries and words in one another's places."""
  other = {"query_mlp": "text_mlp", "text_mlp": "query_mlp"}
  return {"/".join(other.get(part, part) for part in path.split("/")): value
          for path, value in flat.items()}


def reversed_layers(flat: dict) -> dict:
  return {path: value[::-1] if path.startswith("layers/") else value
          for path, value in flat.items()}


@pytest.mark.parametrize("twin", [
  dict(norm_eps=1e-12), dict(activation="gelu_tanh"), dict(later=-1), dict(change=swapped),
  dict(change=reversed_layers)], ids=lambda twin: next(iter(twin)))
def test_twins_fail_loudly(twin):
  """Each mistake alone; the kinds of gelu differ least."""
  measured = reference("blip2").twin(**twin)
  print(f"{measured / CLOSE:.0f} tolerances")
  assert measured > LOUD * CLOSE


@pytest.mark.parametrize("twin", [
  "", "queries see no words", "words see no queries", "words see the picture", "the other half"])
def test_told_queries_are_theirs(twin, monkeypatch):
  """Of queries and words what became of the queries is kept; each mistake alone is loud."""
  theirs = reference("instructblip")
  model = qformer.Model(theirs.config.connector, OUT, Precision())
  mask, see_all = qformer.mask_of_told, qformer.see_all
  query = np.arange(QUERIES + LENGTH) < QUERIES
  if twin == "queries see no words":
    monkeypatch.setattr(qformer, "mask_of_told", lambda *args: dataclasses.replace(
      mask(*args), hi=jnp.where(query, QUERIES, mask(*args).hi)))
  elif twin == "words see no queries":
    monkeypatch.setattr(qformer, "mask_of_told", lambda *args: dataclasses.replace(
      mask(*args), lo=jnp.where(query, 0, QUERIES) + mask(*args).lo))
  elif twin == "words see the picture":
    monkeypatch.setattr(qformer, "see_all",
                        lambda queries, *rest: see_all(queries + LENGTH, *rest))

  def run(model):
    if twin != "the other half":
      return model.hear(jnp.asarray(TOKENS), jnp.asarray(REAL), FEATURES)
    x = jnp.concatenate([model.ask(ROWS), model.spell(TOKENS, np.broadcast_to(
      np.arange(LENGTH), TOKENS.shape))], axis=1)
    return model.read(x, mask(jnp.asarray(REAL), QUERIES, LENGTH), FEATURES)[0][:, -QUERIES:]

  out = jax.jit(lambda params: model.apply({"params": params}, method=run))(theirs.params)
  measured = error(out, theirs.out["instructed"][:, :QUERIES])
  print(f"{twin or 'theirs'}: {measured:.1e}")
  assert measured > LOUD * CLOSE if twin else measured < CLOSE


def test_words_see_the_picture_only_through_queries():
  """Behind one layer the words are as before, whatever the picture; the queries are not."""
  config = reference("instructblip").config.connector.copy_and_resolve_references()
  config.update(depth=1, cross_every=1)
  model = qformer.Model(config, OUT, Precision())
  every = lambda model, features: (read(model, True, True, says()), model(features, (3, 3)))
  init = lambda: model.init(jax.random.key(0), FEATURES[:, None], method=every)
  params = meta.unbox(jax.jit(init)())["params"]

  @jax.jit
  def behind(features):
    x = lambda model: model.read(
      jnp.concatenate([model.ask(ROWS), model.spell(TOKENS, TOKENS * 0)], axis=1),
      qformer.mask_of_told(jnp.asarray(REAL), QUERIES, LENGTH), features)[0]
    return model.apply({"params": params}, method=x)

  moved = np.any(np.asarray(behind(FEATURES)) != np.asarray(behind(FEATURES[::-1])), axis=(0, 2))
  np.testing.assert_array_equal(moved, np.arange(QUERIES + LENGTH) < QUERIES)


def test_boolean_masks_are_no_masks_there():
  """Eager attention there adds 0 and 1: held to it, this model would have learned to leak."""
  model = reference("blip2").model
  words = lambda mask, kind: model.read(True, True, mask, kind).detach().numpy()[:, QUERIES:]
  wanted = words(additive(says()), "eager")
  seen = torch.tensor(np.asarray(says().dense()))[:, None]
  with torch.no_grad():
    assert error(words(seen, "sdpa"), wanted) < CLOSE
    assert error(words(seen, "eager"), wanted) > LOUD * CLOSE


def test_words_behind_cached_queries_are_those_beside_them():
  """What captions from a pass of the queries is the concatenated pass, and queries do not move."""
  theirs = reference("blip2")
  model = qformer.Model(theirs.config.connector, OUT, Precision())

  def behind(model, late):
    columns = qformer.columns(model.config, ROWS, QUERIES + LENGTH)
    index = np.arange(QUERIES + LENGTH, dtype=np.int32)
    whole = says().take(k=np.broadcast_to(index, (ROWS, QUERIES + LENGTH)))
    part = lambda where: dataclasses.replace(
      whole, lo=whole.lo[:, where], hi=whole.hi[:, where] + late)
    first, columns = model.read(
      model.ask(ROWS), part(slice(QUERIES)), FEATURES, (columns, jnp.int32(0)))
    words = model.spell(TOKENS, np.broadcast_to(np.arange(LENGTH), TOKENS.shape))
    said, _ = model.read(words, part(slice(QUERIES, None)), None, (columns, jnp.int32(QUERIES)))
    return jnp.concatenate([first, said], axis=1)

  run = jax.jit(lambda late: model.apply({"params": theirs.params}, late, method=behind))
  assert error(run(0), theirs.out["says"]) < CLOSE
  assert error(run(1), theirs.out["says"]) > LOUD * CLOSE


def test_it_computes_in_float32():
  """In bfloat16 only what goes in and the projection are rounded."""
  theirs = reference("blip2")
  half = Precision(compute=jnp.bfloat16)
  model = qformer.Model(theirs.config.connector, OUT, half)
  x = model.apply({"params": theirs.params}, False, True, None, method=read)
  assert x.dtype == jnp.float32 and error(x, theirs.out["alone"]) < CLOSE
  out = model.apply({"params": theirs.params}, FEATURES[:, None], (3, 3))
  assert out.dtype == jnp.bfloat16 and out.shape == (ROWS, 1, QUERIES, OUT)


def test_slots_are_the_queries_and_sizes_must_fit():
  config = base.get_config().connector
  config.update(name="qformer", latents=QUERIES)
  np.testing.assert_array_equal(qformer.slots(config, 2, 4, 6), np.arange(2 * QUERIES))
  for fields, sentence in ((dict(heads=5), "slot_width is 128, which must be a multiple"),
                           (dict(depth=5), "depth is 5, which must be a multiple of")):
    wrong = config.copy_and_resolve_references()
    wrong.update(fields)
    with pytest.raises(UsageError, match=sentence):
      qformer.check(wrong)
  assert len(qformer.keys(3)) > len(qformer.KEYS) > len(qformer.keys(1))


def test_the_second_stage_takes_what_the_first_has(monkeypatch):
  """Of its run: not the words' side, which it has not; its projection stays as it was drawn."""
  first = {"queries": np.ones((2, 3)), "words": np.ones((9, 3)),
           "layers/layer0/text_mlp/up/kernel": np.ones((1, 3, 4))}
  leaves = {"queries": SimpleNamespace(shape=(2, 3)), "project/bias": SimpleNamespace(shape=(5,))}
  contents = SimpleNamespace(arrays={f"params/connector/{path}": array
                                     for path, array in first.items()})
  monkeypatch.setattr(initial.checkpoint_tools, "locate", lambda run: ("", 0))
  monkeypatch.setattr(initial.checkpoint_tools, "sound", lambda *of: contents)
  read = lambda staged: initial._of_run("run", "connector", leaves, np.float32, staged)
  assert set(read(qformer.STAGED)) == {"queries"}
  with pytest.raises(DataError, match="connector/layers/layer0/text_mlp/up/kernel is"):
    read(())
