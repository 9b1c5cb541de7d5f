"""T5 and T5 v1.1 held to transformers, distances longer than the buckets included.

Measured: logits below 2e-6, gradients below 2e-5.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests.fusion import testing as contract
from tests.llm import published
from vlm_jax.configs import base
from vlm_jax.convert import nodes, safetensors_io, sources
from vlm_jax.core.document import Encoded, Tokens
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.tree import flatten, unflatten
from vlm_jax.generate.decode import generate
from vlm_jax.generate.prompts import layouts, stack
from vlm_jax.llm import t5

READ = (17, 11)  # tokens of the encoder's two rows
SOURCE = np.random.default_rng(2).integers(1, published.VOCAB, (2, max(READ))).astype(np.int32)
SEEN = np.arange(max(READ)) < np.array(READ)[:, None]
KINDS = {
  "first": dict(feed_forward_proj="relu", num_decoder_layers=3),
  "v1.1": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}


class Reference(published.Reference):
  """Both sides of theirs; a head of its own is one before the weights are drawn."""

  def make(self, kind, config):
    model = super().make(kind, config)
    if not config.scale_decoder_outputs:
      model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model

  def forward(self, model):
    long = lambda tokens: torch.tensor(tokens).long()
    return model(input_ids=long(SOURCE), attention_mask=torch.tensor(SEEN),
                 decoder_input_ids=long(self.tokens),
                 decoder_attention_mask=torch.tensor(self.real), use_cache=False).logits

  def whole(self, model):
    places = lambda tokens: np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32),
                                            tokens.shape)
    read, written = places(SOURCE), places(self.tokens)
    see = lambda hi: IntervalMask(jnp.zeros(hi.shape, jnp.int32), jnp.asarray(hi, jnp.int32))
    length = np.array(READ, np.int32)[:, None]
    memory = model.encode(model.embed(SOURCE, read, "encoder"), read,
                          see(np.where(SEEN, length, 0)))
    own = see(np.where(self.real, written + 1, 0))
    cross = see(np.broadcast_to(length, written.shape))
    x = model.embed(self.tokens, written, "decoder")
    return model(x, written, memory, own, cross).logits()


@pytest.fixture(scope="module", params=KINDS)
def reference(request, tmp_path_factory):
  theirs = transformers.T5Config(
    vocab_size=published.VOCAB, d_model=24, d_kv=10, d_ff=41, num_layers=2, num_heads=3,
    relative_attention_num_buckets=8, relative_attention_max_distance=10, dropout_rate=0.0,
    layer_norm_epsilon=1e-2, decoder_start_token_id=t5.START, eos_token_id=None,
    **KINDS[request.param])
  return Reference(transformers.T5ForConditionalGeneration, theirs,
                   tmp_path_factory.mktemp("theirs") / "model")


def test_logits_and_gradients(reference):
  published.check_logits_and_gradients(reference)


def test_files(reference, tmp_path):
  published.check_files(reference, tmp_path)


def test_old_files_hold_more(reference, tmp_path):
  """The embedding under three names, and distances of cross-attention that nobody reads."""
  node = safetensors_io.read_json(reference.directory / "config.json")
  safetensors_io.write_json(tmp_path / "config.json", node)
  with safetensors_io.Reader(reference.directory) as reader:
    arrays = {key: reader[key] for key in reader.shapes}
  arrays |= {key: arrays["shared.weight"] for key in t5.UNREAD}
  safetensors_io.write(tmp_path, {
    key: safetensors_io.Tensor(array.shape, array.dtype, lambda array=array: array)
    for key, array in arrays.items()})
  fields, params = nodes.read_node(tmp_path, "llm")
  jax.tree.map(np.testing.assert_array_equal, params, reference.params)
  flat = flatten(params)
  shapes = {path: leaf.shape for path, leaf in flat.items()}
  load = lambda config: sources.load_node(tmp_path, "llm", config, shapes, np.dtype("float32"))
  assert load(reference.config).keys() == flat.keys()
  if not fields["tie_embeddings"]:
    config = reference.config.copy_and_resolve_references()
    config.llm.tie_embeddings = True
    with pytest.raises(DataError, match="lm_head.weight differs from shared.weight"):
      load(config)


def test_greedy_tokens(reference):
  """Ragged texts in the encoder, the cache's distances in the decoder."""
  config = reference.config.copy_and_resolve_references()
  config.fusion.name = "simvlm"
  with config.data.sources.unlocked():
    config.data.sources.only = base.source(name="only")
  text = lambda row: Tokens(SOURCE[row, : READ[row]], np.zeros(READ[row], bool))
  encoded = [Encoded((text(row),), "only", str(row)) for row in range(len(READ))]
  prompts = stack(layouts(encoded, config), config, rows=len(READ), bucket=1)
  params = {"llm": jax.tree.map(jnp.asarray, reference.params)}
  said = generate(config, params, prompts, max_tokens=12).tokens[:, 0]
  # Without their cache, which counts the layers of the encoder.
  expected = reference.model.generate(
    torch.tensor(SOURCE).long(), attention_mask=torch.tensor(SEEN), max_new_tokens=12,
    do_sample=False, use_cache=False)
  np.testing.assert_array_equal(expected[:, 0], t5.START)
  np.testing.assert_array_equal(said, expected[:, 1:])
  assert len(np.unique(said)) > 2


def test_twins_fail_loudly(reference, monkeypatch):
  llm = reference.config.llm
  wrong = {"norm_eps": 1e-6, "query_scalar": 0.0, "relative_distance": 20}
  if llm.feed_forward == "plain":
    wrong["activation"] = "gelu_tanh"
  errors = {name: reference.twin(**{name: value}) for name, value in wrong.items()}
  flat = flatten(reference.params)
  for side in ("encoder", "decoder"):
    path = f"{side}/relative/table"
    turned = unflatten(flat | {path: np.roll(flat[path], 1, axis=1)})
    errors[side] = reference.error(reference.run(params=turned))
  if llm.tie_embeddings:
    monkeypatch.setattr(t5.Model, "__call__", t5.encoder_decoder.Model.__call__)
    errors["scale"] = reference.error(reference.run())
  print({name: f"{error:.1e}" for name, error in errors.items()})
  assert min(errors.values()) > 100 * published.LOGITS, errors


@pytest.mark.parametrize("name, count", [
  ("small", 60_506_624), ("base", 222_903_552), ("large", 737_668_096), ("flan-base", 247_577_856),
  ("flan-xl", 2_849_757_184), ("flan-xxl", 11_135_332_352)])
def test_sizes_have_as_many_parameters_as_published(name, count):
  assert published.parameters(t5, name) == count


def test_a_sparse_node_means_the_defaults_there():
  full = transformers.T5Config(decoder_start_token_id=0).to_dict()
  assert t5.read_hf({"model_type": "t5"}) == t5.read_hf(full)


@pytest.mark.parametrize("change, sentence", [
  (dict(feed_forward_proj="gated-tanh"), "t5.feed_forward_proj is 'gated-tanh'; did you mean"),
  (dict(decoder_start_token_id=5), "t5.decoder_start_token_id is 5; only 0"),
])
def test_what_we_lack_is_refused(change, sentence):
  with pytest.raises(UsageError, match=sentence):
    t5.read_hf({"model_type": "t5", **change})


def test_what_theirs_cannot_say_is_refused():
  config = base.get_config().llm
  config.update(t5.size("flan-xl"))
  assert not t5.read_hf(t5.write_hf(config))["tie_embeddings"]
  config.norm = "layer"
  with pytest.raises(UsageError, match="config.llm.norm is 'layer'; a checkpoint of model_type"):
    t5.write_hf(config)
  config.update(norm="rms", activation="quick_gelu")
  with pytest.raises(UsageError, match="feed_forward and activation are .'gated', 'quick_gelu'"):
    t5.write_hf(config)


def test_packed_rows_are_the_documents_alone():
  """Distances are those within a document, whatever stands before it; images have biases, too."""
  config = contract.get_config("simvlm")
  config.llm.update(t5.size("small") | dict(
    name="t5", vocab_size=contract.VOCAB, width=32, depth=2, mlp=48, heads=4, kv_heads=4,
    head_dim=8, relative_buckets=8, relative_distance=10))
  layouts = contract.lay_out(contract.documents(0), config)
  params = contract.noise_params(config)
  flat, where = contract.pack(layouts, config)
  packed = contract.logits(config, params, flat)
  assert len({row for row, _ in where.values()}) < len(where)
  for layout in layouts:
    expected = contract.logits(config, params, contract.alone(layout, config))
    expected = expected[0, : layout.sizes["decoder"]]
    assert contract.error(packed[where[layout.key]], expected) < 2e-6
