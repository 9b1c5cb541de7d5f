"""Holds a family to its published implementation: logits, gradients, greedy tokens, files.

Theirs is a tiny random model, saved as it saves itself and read as a user would. Theirs runs a
batch padded on the right, ours the same rows.
"""

import functools
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from ml_collections import FrozenConfigDict

from vlm_jax.configs import base
from vlm_jax.convert import nodes, safetensors_io, table
from vlm_jax.core.document import Encoded, Tokens
from vlm_jax.core.fusion import find_llm
from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.precision import Precision
from vlm_jax.generate.decode import generate
from vlm_jax.generate.prompts import layouts, stack

TOLERANCE = 2e-4  # of gradients
LOGITS = 2e-5  # of logits, whose measured error is below 3e-6
VOCAB, SLOTS = 61, 13
LENGTHS = (13, 9)
NEW = 9  # generated tokens
SHARP = (*(f"{name}_proj.weight" for name in ("q", "k", "o", "gate", "up", "down", "out")),
         *(f".{name}.weight" for name in ("fc1", "fc2", "q", "k", "o", "wi", "wi_0", "wi_1", "wo",
                                          "embed_positions", "relative_attention_bias")))
transformers.utils.logging.disable_progress_bar()


def numbers(seed: int) -> dict:
  """Sizes that divide nothing; groups 2, 4 and 1 of 4 heads for the seeds 0, 1 and 2."""
  rng = np.random.default_rng(seed)
  return dict(
    vocab_size=VOCAB, hidden_size=4 * int(rng.integers(7, 11)),
    intermediate_size=int(rng.integers(50, 70)), num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=(2, 4, 1)[seed], head_dim=2 * int(rng.integers(4, 8)),
    rms_norm_eps=float(10 ** rng.uniform(-2, -1)), max_position_embeddings=256,
    pad_token_id=0, bos_token_id=None, eos_token_id=None)


def rope(seed: int, **more) -> dict:
  """Their rope_parameters: wavelengths that a few positions tell apart."""
  theta = float(10 ** np.random.default_rng(seed + 10).uniform(1, 3))
  return {"rope_type": "default", "rope_theta": theta, **more}


class Reference:
  """Theirs, run once.

  Attributes:
    config, params: of our model, read from their files.
    logits: f32[B,T,V].
    grads: their gradients by key.
  """

  def __init__(self, kind: type, config, directory):
    torch.manual_seed(0)
    self.directory = directory
    self.model = self.make(kind, config)
    with torch.no_grad():
      for name, weight in self.model.named_parameters():
        sharp = 0.3 if name.endswith(SHARP) else 0.1
        around_one = name.endswith("norm.weight") and "Gemma" not in kind.__name__
        weight.normal_(float(around_one), sharp)
    self.model.save_pretrained(directory)
    self.config = base.get_config()
    fields, self.params = nodes.read_node(directory, "llm")
    self.config.llm.update(fields)
    rng = np.random.default_rng(1)
    self.tokens = rng.integers(1, VOCAB, (len(LENGTHS), SLOTS)).astype(np.int32)
    self.real = np.arange(SLOTS) < np.array(LENGTHS)[:, None]
    self.cotangent = (rng.normal(size=(len(LENGTHS), SLOTS, VOCAB)) * self.real[..., None]
                      ).astype(np.float32)
    out = self.forward(self.model)
    (out * torch.tensor(self.cotangent)).sum().backward()
    self.logits = out.detach().numpy()
    self.grads = {name: weight.grad.numpy() for name, weight in self.model.named_parameters()}

  def make(self, kind, config):
    """Their model before its weights are drawn."""
    return kind._from_config(config, attn_implementation="eager").eval()

  def forward(self, model):
    """Their logits."""
    return model(torch.tensor(self.tokens).long(), attention_mask=torch.tensor(self.real),
                 use_cache=False).logits

  def whole(self, model):
    """Our logits, inside `model.apply`."""
    index = np.broadcast_to(np.arange(SLOTS, dtype=np.int32), self.tokens.shape)
    mask = IntervalMask(jnp.zeros(index.shape, jnp.int32), jnp.where(self.real, index + 1, 0))
    return model(model.embed(self.tokens), index, mask).logits()

  def run(self, config=None, params=None, cotangent=None):
    """Our logits, and with a cotangent also the gradients."""
    config = FrozenConfigDict(config or self.config)
    model = find_llm(config).Model(config.llm, config.attention, Precision())

    def logits(params):
      return model.apply({"params": params}, method=self.whole)

    def loss(params):
      out = logits(params)
      return (out * cotangent).sum(), out

    params = jax.tree.map(jnp.asarray, self.params if params is None else params)
    if cotangent is None:
      return jax.jit(logits)(params)
    step = jax.jit(jax.grad(loss, has_aux=True))
    grads, out = step(params)
    return out, grads

  def error(self, logits) -> float:
    """max|a - b| / max|b| over real slots."""
    ours, theirs = np.asarray(logits)[self.real], self.logits[self.real]
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())

  def twin(self, **fields) -> float:
    """The error of a config with wrong fields."""
    config = self.config.copy_and_resolve_references()
    config.llm.update(fields)
    return self.error(self.run(config))


def check_logits_and_gradients(reference: Reference, still: str = "-") -> None:
  """Ours are theirs, tensor by tensor; `still` ends keys that no logit depends on."""
  logits, grads = reference.run(cotangent=reference.cotangent)
  theirs = reference.logits[reference.real]
  assert np.isfinite(theirs).all() and theirs.std(axis=0).min() > 1e-3
  print(f"logits: {reference.error(logits):.1e}")
  assert reference.error(logits) < LOGITS
  ours = {key: tensor.get() for key, tensor in table.export(
    grads, nodes.entries(reference.config.llm, "llm")).items()}
  assert set(ours) == set(reference.grads)
  worst = {}
  for key, grad in ours.items():
    expected = reference.grads[key]
    if key.endswith(still):
      assert max(np.abs(grad).max(), np.abs(expected).max()) < 1e-4, key
      continue
    assert np.isfinite(grad).all() and np.abs(expected).max() > 1e-4, key
    worst[key] = float(np.abs(grad - expected).max() / np.abs(expected).max())
  key = max(worst, key=worst.get)
  print(f"gradients: {worst[key]:.1e} ({key})")
  assert worst[key] < TOLERANCE, worst


def check_greedy_tokens(reference: Reference) -> None:
  """The same tokens after ragged prompts; theirs are padded on the left."""
  config = reference.config.copy_and_resolve_references()
  config.fusion.name, config.fusion.image_attention = "concat", "causal"
  with config.data.sources.unlocked():
    config.data.sources.only = base.source(name="only")
  text = lambda row: Tokens(reference.tokens[row, : LENGTHS[row]], np.zeros(LENGTHS[row], bool))
  encoded = [Encoded((text(row),), "only", str(row)) for row in range(len(LENGTHS))]
  prompts = stack(layouts(encoded, config), config, rows=len(LENGTHS), bucket=1)
  params = {"llm": jax.tree.map(jnp.asarray, reference.params)}
  said = generate(config, params, prompts, max_tokens=NEW).tokens[:, 0]
  ids, seen = np.zeros_like(reference.tokens), np.zeros_like(reference.real)
  for row, length in enumerate(LENGTHS):
    ids[row, SLOTS - length :] = reference.tokens[row, :length]
    seen[row, SLOTS - length :] = True
  expected = reference.model.generate(
    torch.tensor(ids).long(), attention_mask=torch.tensor(seen), max_new_tokens=NEW,
    do_sample=False, pad_token_id=0)
  np.testing.assert_array_equal(said, expected[:, SLOTS:])
  assert len(np.unique(said)) > 2


def check_files(reference: Reference, tmp_path) -> None:
  """Export loads there and says the same; import -> export -> import: bytes are equal."""
  config, params = reference.config.llm, reference.params
  nodes.write_node(tmp_path / "ours", "llm", config, params, {"max_position_embeddings": 256},
                   shard_bytes=20_000)
  model, info = type(reference.model).from_pretrained(
    tmp_path / "ours", output_loading_info=True, attn_implementation="eager")
  assert not any(info.values()), info
  np.testing.assert_array_equal(reference.forward(model).detach().numpy(), reference.logits)
  fields, back = nodes.read_node(tmp_path / "ours", "llm")
  again = config.copy_and_resolve_references()
  again.update(fields)
  assert again.to_json() == config.to_json()
  jax.tree.map(np.testing.assert_array_equal, back, params)
  with safetensors_io.Reader(tmp_path / "ours") as ours, safetensors_io.Reader(
      reference.directory) as theirs:
    assert ours.shapes == theirs.shapes
    for key in theirs.shapes:
      assert ours[key].tobytes() == theirs[key].tobytes(), key


@functools.cache
def parameters(family, name: str) -> int:
  """How many parameters a published size has."""
  fields = {"name": family.__name__.rpartition(".")[2], **family.size(name)}
  config = base.get_config().llm
  config.update(fields)
  return sum(int(np.prod(entry.shape)) for entry in nodes.entries(config, "llm"))
