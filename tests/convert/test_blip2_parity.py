"""Held to Blip2ForConditionalGeneration: logits, loss, gradients, tokens, files; with OPT and T5.

Measured: logits 4e-7 (OPT) and 4e-6 (T5), gradients 3e-6 and 2e-5.
Theirs runs the documents as a padded batch, ours packed into two rows. Gradients are those of their
own loss, whose labels leave out queries and prompts.
"""

import functools
import os
import re
import tempfile
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests.numbers import error
from vlm_jax.configs import base
from vlm_jax.convert import systems, table
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Encoded, Pixels, Tokens
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.data.pack import Packer
from vlm_jax.fusion import blip2
from vlm_jax.generate.decode import generate
from vlm_jax.generate.prompts import layouts, stack

TOLERANCE = 2e-4  # of gradients
CLOSE = 2e-5  # of logits and loss
LOUD = 100
VOCAB, QUERIES, NEW = 61, 3, 6
IMAGE, BOS, EOS = VOCAB - 1, 2, 1
SIDE, PATCH = 8, 4
KINDS = ("opt", "t5")
SHARP = ("q_proj.weight", "k_proj.weight", "query.weight", "key.weight", "qkv.weight", "q.weight",
         "k.weight", "query_tokens", "position_embedding", "class_embedding", "embed_tokens.weight",
         "projection.weight", "wo.weight", "EncDecAttention.o.weight", "EncDecAttention.v.weight",
         "patch_embedding.weight", "embed_positions.weight")
transformers.utils.logging.disable_progress_bar()


def their_config(kind: str) -> transformers.Blip2Config:
  text = {
    "opt": dict(model_type="opt", vocab_size=VOCAB, hidden_size=32, ffn_dim=50, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=40, word_embed_proj_dim=32,
                pad_token_id=0, bos_token_id=BOS, eos_token_id=EOS, dropout=0.0),
    "t5": dict(model_type="t5", vocab_size=VOCAB, d_model=28, d_kv=6, d_ff=50, num_layers=2,
               num_heads=4, feed_forward_proj="gated-gelu", relative_attention_num_buckets=8,
               relative_attention_max_distance=12, layer_norm_epsilon=0.02, pad_token_id=0,
               eos_token_id=EOS, decoder_start_token_id=0)}[kind]
  return transformers.Blip2Config(
    vision_config=dict(hidden_size=24, intermediate_size=37, num_hidden_layers=2,
                       num_attention_heads=3, image_size=SIDE, patch_size=PATCH,
                       layer_norm_eps=0.03),
    qformer_config=dict(hidden_size=18, num_hidden_layers=2, num_attention_heads=3,
                        intermediate_size=31, layer_norm_eps=0.05, vocab_size=VOCAB),
    text_config=text, num_query_tokens=QUERIES, image_token_index=IMAGE)


def draw(model: torch.nn.Module, seed: int) -> None:
  """Every weight overwritten: N(0, 0.1^2), norms around 1, larger where little would depend on."""
  torch.manual_seed(seed)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      weight.normal_(0, 0.3 if name.endswith(SHARP) else 0.1)
      if "norm" in name.lower() and name.endswith("weight"):
        weight.add_(1)


def recipe():
  config = base.get_config()
  with config.data.sources.unlocked():
    config.data.sources.only = base.source(name="only")
  config.data.update(tokens=32, decoder_tokens=24, images=2, rows=2)
  config.attention.implementation = "dense"
  return config


def documents() -> list[Encoded]:
  """A picture, a prompt and an answer with its end."""
  rng, found = np.random.default_rng(0), []
  for number, (prompt, answer) in enumerate(((4, 7), (2, 4))):
    ids = lambda count: rng.integers(3, IMAGE, count).astype(np.int32)
    asked, said = np.array([BOS, *ids(prompt)], np.int32), np.array([*ids(answer), EOS], np.int32)
    picture = Pixels(rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8))
    found.append(Encoded((picture, Tokens(asked, np.zeros(len(asked), bool)),
                          Tokens(said, np.ones(len(said), bool))), "only", str(number)))
  return found


def padded(rows: list[np.ndarray], value: int = 0, left: bool = False) -> torch.Tensor:
  width = max(map(len, rows))
  pad = lambda row: np.pad(row, (width - len(row), 0) if left else (0, width - len(row)),
                           constant_values=value)
  return torch.tensor(np.stack([pad(row) for row in rows])).long()


def their_inputs(encoded: list[Encoded], config, read: int, left: bool = False) -> dict:
  """Pixels, placeholders and the first `read` texts of every document, padded."""
  picture = np.full(QUERIES, IMAGE)
  rows = [np.concatenate([picture, *(part.ids for part in one.parts[1 : 1 + read])])
          for one in encoded]
  mean, std = np.asarray(config.tower.mean), np.asarray(config.tower.std)
  pixels = (np.stack([one.parts[0].values for one in encoded]) / 255 - mean) / std
  return {"input_ids": padded(rows, left=left),
          "attention_mask": padded([np.ones(len(row)) for row in rows], left=left),
          "pixel_values": torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)}


class Reference:
  """Theirs, run once: config and parameters as read from their files, logits, loss, gradients.

  What another system has in other ways, its test says in a class below this one.
  """

  theirs = transformers.Blip2ForConditionalGeneration
  their_config, make_documents = staticmethod(their_config), staticmethod(documents)
  their_inputs = staticmethod(their_inputs)
  # Gradients that only rounding makes: softmax does not see what all keys share.
  silent = ("key.bias", "k_proj.bias")

  def __init__(self, kind: str, directory: Path):
    torch.manual_seed(0)
    self.kind, self.documents = kind, self.make_documents()
    self.model = self.theirs._from_config(
      self.their_config(kind), attn_implementation="eager").eval()
    draw(self.model, int(kind == "t5"))
    self.model.save_pretrained(directory)
    self.config, self.params = systems.read(directory, recipe())
    answers = [one.parts[2].ids for one in self.documents]
    if kind == "t5":
      self.inputs = self.their_inputs(self.documents, self.config, read=1)
      labels = padded(answers, -100)
      first = [0] * len(answers)  # logits of a decoder are those of the answer alone
    else:
      self.inputs = self.their_inputs(self.documents, self.config, read=2)
      first = [QUERIES + len(one.parts[1].ids) for one in self.documents]
      labels = padded([np.r_[np.full(start, -100), ids]
                       for start, ids in zip(first, answers, strict=True)], -100)
    out = self.model(**self.inputs, labels=labels)
    out.loss.backward()
    self.loss = float(out.loss.detach()) * sum(map(len, answers))
    self.logits = [out.logits[row, : start + len(ids)].detach().numpy()
                   for row, (start, ids) in enumerate(zip(first, answers, strict=True))]
    scale = sum(map(len, answers))
    self.grads = {name: weight.grad.numpy() * scale for name, weight in
                  self.model.named_parameters() if weight.grad is not None}

  def batch(self):
    """The packed rows, and (row, start) of every document in the stream that speaks."""
    module = find_fusion(self.config)
    packer = Packer(module.fields(self.config), module.axes(self.config), 2)
    assert packer.add(layouts(self.documents, self.config))
    packed, where = packer.build(), {}
    for row, content in enumerate(packed.rows):
      start = 0
      for layout in content:
        where[layout.key] = row, start
        start += layout.sizes[module.STREAM]
    return packed.arrays, [where[key] for key in sorted(where)]

  def error(self, logits) -> float:
    """max|a - b| / max|b| over the documents."""
    return max(error(np.asarray(logits)[row, start : start + len(theirs)], theirs)
               for (row, start), theirs in zip(self.batch()[1], self.logits, strict=True))

  @functools.cached_property
  def step(self):
    """The jitted (params, flat) -> ((loss, logits), gradients)."""
    config, module = self.config, find_fusion(self.config)

    def loss(params, flat):
      batch = from_flat(flat)
      output = module.Model(config).apply({"params": params}, batch)
      return module.losses(output, batch, config)["lm"].sum(), output.logits()

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def reference_of(kind: str) -> Reference:
  return Reference(kind, Path(tempfile.mkdtemp()) / "model")


@pytest.fixture(params=KINDS)
def reference(request):
  return reference_of(request.param)


def test_logits_loss_and_gradients(reference):
  (loss, logits), grads = reference.step(
    jax.tree.map(jnp.asarray, reference.params), reference.batch()[0])
  for theirs in reference.logits:
    assert np.isfinite(theirs).all() and theirs.std(axis=0).min() > 1e-3
  worst = reference.error(logits)
  ours = {key: tensor.get() for key, tensor in table.export(
    grads, systems.entries(reference.config)).items()}
  assert set(ours) == set(reference.grads)
  errors = {}
  for key, grad in ours.items():
    theirs = reference.grads[key]
    if key.endswith(reference.silent):
      assert max(np.abs(grad).max(), np.abs(theirs).max()) < 1e-4, key
      continue
    assert np.isfinite(grad).all() and np.abs(theirs).max() > 1e-4, key
    errors[key] = error(grad, theirs)
  print(f"logits {worst:.1e}, loss {abs(float(loss) / reference.loss - 1):.1e}, "
        f"gradients {max(errors.values()):.1e} ({max(errors, key=errors.get)})")
  assert worst < CLOSE and abs(float(loss) / reference.loss - 1) < CLOSE
  assert max(errors.values()) < TOLERANCE


@pytest.mark.parametrize("twin", ["class token", "queries", "positions", "mask", "labels"])
def test_twins_fail_loudly(reference, twin):
  """Each mistake alone, in what goes into the same program."""
  flat, params = dict(reference.batch()[0]), reference.params
  first = "encoder" if reference.kind == "t5" else "text"
  if twin == "class token":
    tower = dict(params["tower"], class_token=-params["tower"]["class_token"])
    params = {**params, "tower": tower}
  elif twin == "queries":
    fill = f"streams/{first}/fill"
    flat[fill] = np.where(flat[fill] > 0, flat[fill] - 1, flat[fill])  # the one before
  elif twin == "positions":
    place = f"streams/{first}/positions"
    flat[place] = np.where(flat[f"streams/{first}/fill"] >= 0, 0, flat[place])
  elif twin == "mask":
    flat[f"masks/{first}/hi"] = flat[f"masks/{first}/hi"] - 1
  elif twin == "labels":
    weight = next(path for path in flat if path.endswith("loss_weights/lm"))
    flat[weight] = np.ones_like(flat[weight])
  (loss, logits), _ = reference.step(jax.tree.map(jnp.asarray, params), flat)
  measured = (abs(float(loss) / reference.loss - 1) if twin == "labels"
              else reference.error(logits))
  print(f"{twin}: {measured / CLOSE:.0f} tolerances")
  assert measured > LOUD * CLOSE


def test_generated_tokens_are_theirs(reference):
  config = reference.config
  asked = [Encoded(one.parts[:2], one.source, one.key) for one in reference.documents]
  ours = generate(config, jax.tree.map(jnp.asarray, reference.params), stack(
    layouts(asked, config), config, rows=2, bucket=1), max_tokens=NEW).tokens[:, 0]
  inputs = reference.their_inputs(asked, config, read=1, left=True)
  out = reference.model.generate(**inputs, do_sample=False, max_new_tokens=NEW, eos_token_id=None,
                                 pad_token_id=0).numpy()
  said = out[:, 1:] if reference.kind == "t5" else out[:, inputs["input_ids"].shape[1] :]
  np.testing.assert_array_equal(np.asarray(ours), said)
  assert len(np.unique(said)) > 2


def test_export_loads_there_and_here(reference, tmp_path):
  config, params = reference.config, reference.params
  systems.write(tmp_path / "ours", config, params, IMAGE, shard_bytes=20_000)
  model, info = reference.theirs.from_pretrained(
    tmp_path / "ours", output_loading_info=True, attn_implementation="eager")
  assert not any(info.values()), info
  with torch.no_grad():
    shift = dict(decoder_input_ids=torch.zeros(2, 1).long()) if reference.kind == "t5" else {}
    ours, theirs = (one(**reference.inputs, **shift).logits for one in (model, reference.model))
  assert torch.equal(ours, theirs)
  again, back = systems.read(tmp_path / "ours", recipe())
  assert again.to_json() == config.to_json()
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_configs_that_are_no_blip2():
  reference = reference_of("opt")
  for field, value in (("connector.name", "mlp"), ("tower.read_class", False)):
    config = reference.config.copy_and_resolve_references()
    node, name = field.split(".")
    config[node][name] = value
    with pytest.raises(UsageError, match=f"config.{field} is {value!r}"):
      systems.converter(config).write_config(config, IMAGE)


def test_stages_leave_the_language_model_alone():
  paths = systems.shapes(reference_of("opt").config)
  moved = {stage.name: {path for path in paths for pattern in stage.trainable
                        if re.fullmatch(pattern, path)} for stage in blip2.STAGES}
  norm = {"tower/post_norm/scale", "tower/post_norm/bias"}
  connector = {path for path in paths if path.startswith("connector/")}
  assert moved["bridge"] == connector | norm
  assert not any(path.startswith("llm/") for path in moved["finetune"])
  assert moved["adapt"] == connector | {path for path in paths if path.startswith("llm/")}
