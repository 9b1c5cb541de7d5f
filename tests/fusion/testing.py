"""Tiny configs, random documents and a loud set of parameters, for every test of a strategy."""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from ml_collections import ConfigDict, FrozenConfigDict

from vlm_jax.configs import base
from vlm_jax.core import batch as batches
from vlm_jax.core.batch import Batch, from_flat
from vlm_jax.core.document import Encoded, Pixels, Tiles, Tokens
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.layout import TOLD, Layout, heard, mask_axes, streams_of
from vlm_jax.core.tree import flatten, unflatten
from vlm_jax.data.pack import Packer

VOCAB, SIDE, SLOTS, K = 61, 8, 48, 4  # images are 2 x 2 patches of 4 pixels
COMPARED = 7  # tokens of the longest text that is compared

SILENT = "/key/bias"

QFORMER = dict(name="qformer", latents=K, slot_width=18, heads=3, depth=2, hidden=24)
POOLED = dict(name="attention_pool", latents=K, heads=2)
T5 = dict(name="t5", norm="rms", activation="gelu_tanh", query_scalar=1.0, kv_heads=4,
          relative_buckets=8, relative_distance=12, encoder_depth=2)
READS = 37  # ids of a connector that reads
INSTRUCTED = dict(connector=dict(QFORMER, vocab_size=READS, positions=8),
                  data=dict(instruction_tokens=6))
EITHER = ((None, False), (None, True))  # plain documents, and those that fan out

Nodes = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Row:
  """What the tests of all strategies know of one; a new strategy adds its row and no more.

  Attributes:
    says: (config.fusion.image_attention or None where it is not read, fan-out documents) of every
      variant whose logits are tested; empty: it does not speak.
    nodes: node of the config to fields, where those of `get_config` do not do.
    compares: the same for `contrast.get_config`; None: it does not compare pictures with texts.
    objectives: what comparing is made of, each with a weight of 1.
    captions: beginnings of the paths of parameters that comparing does not reach.
  """

  says: tuple[tuple[str | None, bool], ...] = ()
  nodes: Nodes = dataclasses.field(default_factory=dict)
  compares: Nodes | None = None
  objectives: tuple[str, ...] = ("contrast",)
  captions: tuple[str, ...] = ()


STRATEGIES = {
  "concat": Row((("causal", False), ("bidirectional", False),
                 ("causal", True), ("bidirectional", True))),
  "prefix_lm": Row(EITHER),
  "simvlm": Row(EITHER, dict(llm=dict(
    name="encoder_decoder", norm="layer", feed_forward="plain", activation="gelu",
    linear_bias=True, positions=64, encoder_depth=2))),
  "blip2": Row(EITHER, dict(connector=QFORMER)),
  "blip2_t5": Row(EITHER, dict(connector=QFORMER, llm=T5)),
  "instructblip": Row(((None, True),), INSTRUCTED),
  "instructblip_t5": Row(((None, True),), dict(INSTRUCTED, llm=T5)),
  "llava_next": Row((("causal", False), ("causal", True)), dict(
    data=dict(tokens=64, images=12, decode=dict(grids=((1, 2),))))),
  "flamingo": Row((("last", False), ("all", False), ("last", True)), dict(
    connector=dict(name="perceiver", width=24, latents=K, depth=1, heads=2, head_dim=6, hidden=20),
    bridge=dict(mlp=40), data=dict(tokens=40))),
  "clip": Row(compares=dict(tower=dict(pool="gap"))),
  "siglip": Row(compares=dict(llm=dict(attends="full", pool="last"))),
  "coca": Row(
    ((None, False),),
    dict(connector=POOLED,
         llm=dict(name="two_halves", kv_heads=4, positions=24, activation="gelu")),
    compares=dict(tower=dict(pool="none"), connector=POOLED,
                  llm=dict(name="two_halves", tie_embeddings=False)),
    captions=("llm/second", "llm/norm", "llm/head")),
  "blip2_qformer": Row(
    compares=dict(tower=dict(pool="none"),
                  connector=dict(QFORMER, vocab_size=VOCAB, positions=COMPARED)),
    objectives=("itc", "itm", "itg")),
}
# Strategy, image_attention, whether documents fan out.
VARIANTS = [(name, *variant) for name, row in STRATEGIES.items() for variant in row.says]


def get_config(name: str, image_attention: str | None = None, fan_out: bool = False) -> ConfigDict:
  """A model of two layers and widths below 50; two sources, one of which fans out if asked."""
  config = base.get_config()
  config.fusion.name = name
  if image_attention:
    config.fusion.image_attention = image_attention
  config.tower.update(image_size=SIDE, patch=4, width=24, depth=2, mlp=40, heads=3)
  config.llm.update(vocab_size=VOCAB, width=32, depth=2, mlp=48, heads=4, kv_heads=2)
  config.attention.update(block_q=16, block_k=16)
  config.data.update(rows=2, tokens=SLOTS, decoder_tokens=SLOTS // 2, images=4)
  config.update(STRATEGIES[name].nodes)
  config.data.sources.pairs = base.source(form="fan_out" if fan_out else "conversation")
  config.data.sources.words = base.source()
  return config


def tokens(rng: np.random.Generator, prompt: int, answer: int = 0, branch: int = 0) -> Tokens:
  """Random ids, the last `answer` of them predicted."""
  ids = rng.integers(1, VOCAB, prompt + answer).astype(np.int32)
  return Tokens(ids, np.arange(prompt + answer) >= prompt, branch)


def pixels(rng: np.random.Generator) -> Pixels:
  """A random image."""
  return Pixels(rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8))


def documents(seed: int, fan_out: bool = False) -> list[Encoded]:
  """What fits into two rows: plain text, image first, in the middle, several images, fan-out."""
  rng = np.random.default_rng(seed)
  text = lambda *args, **kwargs: tokens(rng, *args, **kwargs)
  image = lambda: pixels(rng)
  parts = {
    "words": [(text(1, 8),), (text(4, 5),)],
    "pairs": [
      (image(), text(3, 4)),
      (text(2), image(), text(3, 3)),
      (text(1), image(), image(), text(2, 3), text(2, 2)),
    ],
  }
  if fan_out:
    branches = [text(3, 2, branch=1), text(2, 3, branch=2), text(4, 1, branch=3)]
    parts["pairs"].append((image(), text(2), *branches))
  return [
    Encoded(tuple(content), source, f"{source}-{number}")
    for source, contents in parts.items()
    for number, content in enumerate(contents)
  ]


def tiled(document: Encoded) -> Encoded:
  """Every image of 16 x 16 pixels in two tiles side by side, made of its whole; but for pictures
  (`test_contract.picture_document`), which are drawn without."""
  def cut(part):
    if not isinstance(part, Pixels) or document.key == "picture":
      return part
    values = np.stack([part.values[::-1], 255 - part.values])
    return dataclasses.replace(part, tiles=Tiles(values, (1, 2), (16, 16)))

  return dataclasses.replace(document, parts=tuple(map(cut, document.parts)))


def told(document: Encoded, length: int) -> Encoded:
  """Words for every image, at most `length`; drawn from its pixels."""
  def tell(part):
    if not isinstance(part, Pixels):
      return part
    rng = np.random.default_rng(int(part.values.sum()))
    words = rng.integers(0, READS, rng.integers(1, length + 1)).astype(np.int32)
    return dataclasses.replace(part, words=words)

  return dataclasses.replace(document, parts=tuple(map(tell, document.parts)))


def lay_out(documents: list[Encoded], config: ConfigDict, seed: int = 0) -> list[Layout]:
  """The layouts; what a strategy draws for a document depends on its key and the seed."""
  module = find_fusion(config)
  if config.data.decode.grids:
    documents = list(map(tiled, documents))
  if field := module.fields(config).get(TOLD):
    documents = [told(document, field.shape[0]) for document in documents]
  return [
    module.layout(document, config, np.random.default_rng([seed, *document.key.encode()]))
    for document in documents
  ]


def pack(layouts: list[Layout], config: ConfigDict) -> tuple[dict, dict[str, tuple[int, slice]]]:
  """The flat batch of `config.data.rows` rows, and document key to its (row, slots).

  Slots are those of the stream that speaks, whose logits tests compare.
  """
  module = find_fusion(config)
  packer = Packer(module.fields(config), module.axes(config), config.data.rows)
  assert packer.add(layouts), "the documents of a test fit one step"
  packed = packer.build()
  where = {}
  for row, content in enumerate(packed.rows):
    start = 0
    for layout in content:
      where[layout.key] = row, slice(start, start + layout.sizes[module.STREAM])
      start += layout.sizes[module.STREAM]
  return packed.arrays, where


def alone(layout: Layout, config: ConfigDict) -> dict:
  """The flat batch of one document, in the shapes of a whole step."""
  return pack([layout], config)[0]


def same_network(config: ConfigDict) -> FrozenConfigDict:
  """The config without what only layouts read, so that strategies share compiled programs."""
  config = config.copy_and_resolve_references()
  config.fusion.update(name="", image_attention="")
  config.data.sources.pairs.form = ""
  return FrozenConfigDict(config)


def noise_params(config: ConfigDict, scale: float = 0.3) -> dict:
  """Every parameter overwritten with noise: no norm or bias is at a value that hides a bug."""
  return _noise_params(find_fusion(config), same_network(config), scale)


@functools.cache
def _noise_params(module: ModuleType, config: FrozenConfigDict, scale: float) -> dict:
  row = from_flat(batches.empty(module.fields(config), module.axes(config), 1))
  shapes = jax.eval_shape(module.Model(config).init, jax.random.key(0), row)["params"]
  rng = np.random.default_rng(7)
  noise = lambda leaf: jnp.asarray(rng.normal(0, scale, leaf.shape), leaf.dtype)
  return jax.tree.map(noise, meta.unbox(shapes))


@functools.cache
def _forward(model: type, config: FrozenConfigDict) -> Callable:
  run = lambda params, batch: model(config).apply({"params": params}, batch).logits()
  return jax.jit(run)


def logits(config: ConfigDict, params: dict, flat: dict) -> np.ndarray:
  """f32[B,T,V] of a flat batch; finite, and not constant."""
  forward = _forward(find_fusion(config).Model, same_network(config))
  out = np.asarray(forward(params, from_flat(flat)))
  assert np.isfinite(out).all() and out.std() > 1e-2
  return out


def alone_error(config: ConfigDict, params: dict, documents: list[Encoded], where: dict,
                out: np.ndarray) -> float:
  """How far packed logits are from those of every document alone."""
  worst = 0.0
  for layout in lay_out(documents, config):
    single = logits(config, params, alone(layout, config))
    row, slots = where[layout.key]
    worst = max(worst, error(out[row, slots], single[0, : slots.stop - slots.start]))
  return worst


@functools.cache
def forward_cached(model: type, config: FrozenConfigDict) -> Callable:
  """A jitted (params, batch, cache) -> Output."""
  run = lambda params, batch, cache: model(config).apply({"params": params}, batch, cache=cache)
  return jax.jit(run)


@functools.cache
def loss_and_grad(model: type, config: FrozenConfigDict, losses: Callable) -> Callable:
  """A jitted (params, flat, scale f32[sources]) -> (scaled sum of the losses, gradients)."""

  def total(params, batch: Batch, scale):
    output = model(config).apply({"params": params}, batch)
    return jnp.sum(losses(output, batch, config)["lm"] * scale)

  grad = jax.jit(jax.value_and_grad(total))
  return lambda params, flat, scale: grad(params, from_flat(flat), scale)


def value_and_grad(config: ConfigDict, params: dict, flat: dict, scale=None) -> tuple:
  """The loss, every source divided by its weight (or times `scale`), and its gradients."""
  module = find_fusion(config)
  if scale is None:
    weights = np.asarray(module.weights(from_flat(flat), config)["lm"])
    scale = np.where(weights > 0, 1 / np.maximum(weights, 1), 0).astype(np.float32)
  run = loss_and_grad(module.Model, same_network(config), module.losses)
  loss, grads = run(params, flat, np.asarray(scale, np.float32))
  return loss, silence(grads)


def silence(grads: dict) -> dict:
  """Zeroes the gradients that only rounding makes: softmax does not see what all keys share."""
  flat = flatten(grads)
  for path, leaf in flat.items():
    if path.endswith(SILENT):
      assert np.abs(leaf).max() < 1e-6
      flat[path] = np.zeros(leaf.shape, leaf.dtype)
  return unflatten(flat)


def heard_masks(config: ConfigDict) -> list[str]:
  """The masks that logits depend on."""
  module = find_fusion(config)
  return sorted(mask_axes(heard(module.fields(config), module.STREAM)))


def reads_table(config: ConfigDict) -> bool:
  """Whether a mask of the strategy has the media table for keys."""
  return any(keys == "table" for _, keys in mask_axes(find_fusion(config).fields(config)).values())


def joined(masks: dict, config: ConfigDict, table: int = 0) -> np.ndarray:
  """bool[..., n, n + table], who sees whom among the slots of all streams, in the order of fields.

  Args:
    masks: of a batch or of one document.
    config: of a strategy.
    table: rows of the media table, further columns; 0 where no mask has it for keys.
  """
  fields = find_fusion(config).fields(config)
  streams, blocks = streams_of(fields), mask_axes(fields)
  size = {name: mask.num_queries for name, mask in masks.items() if name in streams}
  size |= {"table": table}
  rows = []
  for queries in streams:
    row = []
    for keys in [*streams, *["table"] * bool(table)]:
      name = next((name for name, axes in blocks.items() if axes == (queries, keys)), None)
      lead = masks[queries].lo.shape[:-1]
      row.append(np.zeros((*lead, size[queries], size[keys]), bool) if name is None
                 else np.asarray(masks[name].dense(size[keys])))
    rows.append(np.concatenate(row, axis=-1))
  return np.concatenate(rows, axis=-2)


def error(got, expected) -> float:
  """Largest difference as a share of the largest expected value, over all leaves."""
  leaves = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
  return max(
    float(np.abs(np.asarray(a) - np.asarray(b)).max(initial=0)
          / np.abs(np.asarray(b)).max(initial=1e-30))
    for a, b in leaves
  )
