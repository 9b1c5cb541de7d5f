"""Flamingo: text reads images through gated layers between frozen ones (arXiv:2204.14198).

Images are never among the tokens. An image is one slot of the text (e), whose token is the
strategy's, and K rows of the media table (x, y the rows of two images), which gated layers read:

    y + tanh(a) attention(norm y, media), y + tanh(b) mlp(norm y)     a = b = 0 at first

Rows of text are causal; columns of the table are the last image so far (section 3.1.3), or all of
them with `config.fusion.image_attention` "all". What stands before the first image sees none:

    last, as published:                    all, its control:

          t e t t e t x x x x y y y y            t e t t e t x x x x y y y y
        t 1 . . . . . . . . . . . . .          t 1 . . . . . . . . . . . . .
        e 1 1 . . . . 1 1 1 1 . . . .          e 1 1 . . . . 1 1 1 1 . . . .
        t 1 1 1 . . . 1 1 1 1 . . . .          t 1 1 1 . . . 1 1 1 1 . . . .
        t 1 1 1 1 . . 1 1 1 1 . . . .          t 1 1 1 1 . . 1 1 1 1 . . . .
        e 1 1 1 1 1 . . . . . 1 1 1 1          e 1 1 1 1 1 . 1 1 1 1 1 1 1 1
        t 1 1 1 1 1 1 . . . . 1 1 1 1          t 1 1 1 1 1 1 1 1 1 1 1 1 1 1

In fan-out documents every branch reads the last image of the trunk (a, b tokens of two branches):

          t e a a b b x x x x
        t 1 . . . . . . . . .
        e 1 1 . . . . 1 1 1 1
        a 1 1 1 . . . 1 1 1 1
        a 1 1 1 1 . . 1 1 1 1
        b 1 1 . . 1 . 1 1 1 1
        b 1 1 . . 1 1 1 1 1 1

The attention of a row that sees no image is 0, but once its gate is open the feed-forward block
changes that row too: with images or without, a trained bridge is not the bare language model.

A video is one image in all of this: one slot of the text, K rows of the table, which its connector
made of all frames together. With `config.data.frames` documents may have videos of at most so many;
every frame takes a place of `config.data.images`.

Of web pages (form "document") a share `next_image` reads the image that comes next instead
(appendix A.3.2); what stands behind the last image then sees none. `config.bridge` says where the
gated layers stand and what they are made of.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers
from ml_collections import ConfigDict

from vlm_jax.core import mask as masks
from vlm_jax.core.batch import Batch
from vlm_jax.core.document import Encoded, Pixels
from vlm_jax.core.errors import UsageError, nearest
from vlm_jax.core.fusion import Cache, Output, Stage, find_connector, find_llm
from vlm_jax.core.layout import (
  LEARNED,
  TIME,
  Field,
  Layout,
  Slots,
  image_fields,
  mask_fields,
  write_slots,
)
from vlm_jax.core.mask import IntervalMask
from vlm_jax.core.mesh import constrain
from vlm_jax.core.precision import Precision, precision
from vlm_jax.core.typing import Array
from vlm_jax.fusion import concat
from vlm_jax.fusion.concat import STREAM, axes, losses, rows, weights
from vlm_jax.llm._decoder import Embed, Head
from vlm_jax.nn import stack
from vlm_jax.nn.attention import Columns, Context, CrossAttention, make_context
from vlm_jax.nn.linear import parameter
from vlm_jax.nn.mlp import feed_forward
from vlm_jax.nn.model import Configured
from vlm_jax.nn.norms import norm

__all__ = ["RUNS", "STAGES", "STREAM", "GatedLayer", "Model", "attention_shapes", "axes", "fields",
           "images_read", "layout", "losses", "order", "rows", "uses", "vocabulary", "weights"]

STAGES = (
  Stage("all", (".*",)),
  Stage("bridge", ("(connector|bridge|new_embed|new_head)/.*",)),  # tower and language model stay
  Stage("finetune", ("(connector|bridge|new_embed|new_head|llm)/.*",)),  # the tower stays
)
RUNS = ("bridge",)
IMAGE_ATTENTION = ("last", "all")
GATES = ("scalar", "vector")
PAGE = "document"  # the form of sources whose documents are web pages


def fields(config: ConfigDict) -> dict[str, Field]:
  """Those of `concat`, the time of frames, and the mask "media" of slots and rows of the table."""
  side = config.tower.image_size
  return (concat.fields(config) | image_fields(side, side, frames=config.data.frames > 0)
          | mask_fields("media", STREAM, "table", classes=False))


def vocabulary(config: ConfigDict) -> int:
  """Ids of the language model and new ones; the last stands where an image is."""
  return config.llm.vocab_size + config.fusion.new_tokens


def uses(config: ConfigDict, path: str) -> dict[str, int] | None:
  """Keys and values of the gated layers are made of the rows of the table, not of the text."""
  made = path.startswith(("bridge/attention/key", "bridge/attention/value"))
  items = "items/images" if config.data.frames else "images/images"
  return {items: len(rows(config))} if made else None


def attention_shapes(config: ConfigDict) -> dict[str, tuple[int, int, int]]:
  """Layers, heads and channels of one of the attention to the table."""
  return {"media": (_count(config), *heads_of(config))}


def order(config: ConfigDict, image: Pixels) -> np.ndarray:
  """i32[1]: an image or a video is one slot of the text, whatever the tower sees.

  Raises:
    UsageError: an image in tiles, or with a grid of its own, or a video of too many frames.
  """
  concat.refuse_grid(config, image)
  concat.refuse_tiles(config, image)
  frames, most = len(image.squares), config.data.frames
  if frames > max(most, 1):
    raise UsageError(f"a document has a video of {frames} frames but config.data.frames is {most}; "
                     "raise it, or give fewer frames of it")
  return np.array([LEARNED], np.int32)


def layout(encoded: Encoded, config: ConfigDict, rng: np.random.Generator) -> Layout:
  """Writes the document out in reading order, an image being one slot.

  Args:
    encoded: the document.
    config: of the run.
    rng: draws whether the text of a page reads the next image.

  Raises:
    UsageError: an unknown image_attention, no token for images, a share that is none, videos that
      the connector does not read, a new token that is to be said and cannot be, or as `order` and
      `concat.layout`.
  """
  check(config)
  slots = write_slots(encoded, rows(config), lambda image: order(config, image))
  source = config.data.sources.get(encoded.source)
  ahead = source is not None and source.form == PAGE and rng.random() < config.fusion.next_image
  index = images_read(slots.image > 0, ahead)
  weight = slots.weight
  if not config.fusion.predict_unseen and slots.image.any():
    weight = weight * (np.append(index[1:], 0) > 0).astype(np.float32)
  slots = dataclasses.replace(slots, weight=weight)
  _refuse_unsaid(encoded, slots, config)
  made = concat.assemble(encoded, slots, masks.causal(len(slots)), config)
  size, picture = len(rows(config)), vocabulary(config) - 1
  first = index - 1 if config.fusion.image_attention == "last" else np.zeros_like(index)
  lo, hi = np.where(index > 0, (first * size, index * size), 0).astype(np.int32)
  tokens = np.where(slots.image > 0, picture, slots.tokens).astype(np.int32)
  more = {f"streams/{STREAM}/tokens": tokens, "masks/media/lo": lo, "masks/media/hi": hi}
  items = [len(part.squares) for part in encoded.parts if isinstance(part, Pixels)]
  if config.data.frames:
    more[TIME] = np.concatenate([np.arange(count) for count in (0, *items)]).astype(np.int32)
  return dataclasses.replace(made, arrays=made.arrays | more,
                             sizes=made.sizes | {"table": len(items) * size})


def _refuse_unsaid(encoded: Encoded, slots: Slots, config: ConfigDict) -> None:
  """Raises UsageError for a predicted token that the vocabulary's matrix has no column for."""
  said = vocabulary(config) if config.fusion.say_new else config.llm.vocab_size
  wrong = slots.targets[(slots.weight > 0) & (slots.targets >= said)]
  if len(wrong):
    raise UsageError(f"document {encoded.key} is to say token {wrong[0]}, one of the new tokens; "
                     "set config.fusion.say_new=True")


def check(config: ConfigDict) -> None:
  """Refuses fields of `config.fusion`, and numbers of frames, that cannot be, as UsageError."""
  fusion, frames, learned = config.fusion, config.data.frames, config.connector.frames
  if fusion.image_attention not in IMAGE_ATTENTION:
    raise UsageError(f"config.fusion.image_attention is '{fusion.image_attention}'; "
                     f"{nearest(fusion.image_attention, IMAGE_ATTENTION)}")
  if fusion.new_tokens < 1:
    raise UsageError(f"config.fusion.new_tokens is {fusion.new_tokens}; '{fusion.name}' needs one "
                     "for pictures, use 1 or more")
  if not 0 <= fusion.next_image <= 1 or fusion.next_image and fusion.image_attention == "all":
    raise UsageError(f"config.fusion.next_image is {fusion.next_image}; use a share from 0 to 1, "
                     "and 0 where image_attention is 'all'")
  if frames and not getattr(find_connector(config), "VIDEOS", False):
    raise UsageError(f"config.data.frames is {frames} but config.connector.name "
                     f"'{config.connector.name}' reads images one by one; use 'perceiver', or 0")
  if 0 < learned < frames:
    raise UsageError(f"config.data.frames is {frames} but config.connector.frames {learned}: later "
                     "frames have no embedding, and none are interpolated (Flamingo did in "
                     "evaluation only); make them equal, or show fewer frames")


def images_read(pictures: np.ndarray, ahead: bool = False) -> np.ndarray:
  """i32[T], 1 + the image that a slot reads, 0: none.

  Args:
    pictures: bool[T], the slots of images; each of them reads its own.
    ahead: whether text reads the next image rather than the last one.
  """
  last = np.cumsum(pictures, dtype=np.int32)
  if not ahead:
    return last
  following = last + ~pictures
  return np.where(following <= pictures.sum(), following, 0).astype(np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Media:
  """What all gated layers share.

  Attributes:
    rows: f[B,R,W], the media table; None where its keys are cached, or there are no images.
    context: of T queries and R keys; None where there are no images.
  """

  rows: Array | None
  context: Context | None


class GatedLayer(nn.Module):
  """Cross-attention and a feed-forward block, each behind a gate that starts shut (figure 4)."""

  config: ConfigDict
  implementation: str
  precision: Precision

  @nn.compact
  def __call__(self, x: Array, columns: Columns | None, context: Media
               ) -> tuple[Array, Columns | None]:
    """See `nn.stack`; columns are the keys and values f[B,R,H,C] of the media table."""
    bridge, width = self.config.bridge, x.shape[-1]
    make = lambda name: norm(bridge.norm, bridge.norm_eps, self.precision, name)
    x = constrain(x, ("batch", None, None))
    if context.context is not None:
      heads, head_dim = heads_of(self.config)
      y, columns = CrossAttention(
        heads=heads,
        groups=heads,
        head_dim=head_dim,
        bias=False,
        implementation=self.implementation,
        precision=self.precision,
        qk_norm=bridge.qk_norm or None,
        qk_norm_eps=bridge.norm_eps,
        name="attention",
      )(make("attention_norm")(x), context.rows, columns, context.context)
      x = x + self._gate("attention_gate", width) * y
    y = feed_forward(bridge.feed_forward, width, bridge.mlp or 4 * width, bridge.activation, False,
                     self.precision, "mlp")(make("mlp_norm")(x))
    return x + self._gate("mlp_gate", width) * y, columns

  def _gate(self, name: str, width: int) -> Array:
    """tanh of a scalar f[1] or of a number f[D] for every channel."""
    kind = self.config.bridge.gate
    if kind not in GATES:
      raise UsageError(f"config.bridge.gate is '{kind}'; {nearest(kind, GATES)}")
    gate = parameter(self, name, initializers.zeros, (1 if kind == "scalar" else width,),
                     ("norm",), self.precision.param)
    return jnp.tanh(gate.astype(jnp.float32)).astype(self.precision.compute)


def heads_of(config: ConfigDict) -> tuple[int, int]:
  """Heads of the gated layers' attention, and the channels of one."""
  bridge, llm = config.bridge, config.llm
  return bridge.heads or llm.heads, bridge.head_dim or llm.head_dim or llm.width // llm.heads


def _count(config: ConfigDict) -> int:
  """How many gated layers there are; none is a UsageError."""
  every, first = config.bridge.every, config.bridge.first
  count = stack.visits(config.llm.depth, every, first) if 0 <= first < every else 0
  if not count:
    raise UsageError(f"config.bridge.every is {every} and first {first}: of config.llm.depth = "
                     f"{config.llm.depth} layers none has a gated one before it; use a first "
                     "from 0 to every - 1 and below the depth")
  return count


class Model(Configured):
  """Vision tower, connector, and a language model with gated layers between its own."""

  @nn.compact
  def __call__(
    self, batch: Batch, *, rng: Array | None = None, cache: Cache | None = None
  ) -> Output:
    """Runs a packed batch.

    Args:
      batch: stream "text", its mask and "media"; media "images" unless there are none, or `cache`
        has their keys.
      rng: unused, the model has no randomness.
      cache: keys and values of the slots before these, and of the images; see `llm.Model`.

    Returns:
      hidden f[B,T,D], one per slot.

    Raises:
      UsageError: the language model cannot execute the mask, or has no layer for a gated one.
    """
    del rng
    config, dtypes = self.config, precision(self.config)
    text, mask = batch.streams[STREAM], batch.masks[STREAM]
    language = find_llm(config, "decoder", {STREAM: mask})
    llm = language.Model(config.llm, config.attention, dtypes, name="llm")
    sizes = config.fusion.new_tokens, config.llm.width, dtypes
    number = text.tokens - config.llm.vocab_size
    new = Embed(*sizes, name="new_embed")(jnp.maximum(number, 0))
    x = llm.embed(jnp.where(number < 0, text.tokens, 0))
    x = jnp.where((number < 0)[..., None], x, new.astype(x.dtype))
    output = llm(x, text.positions, mask, cache, self._visitors(batch, cache, dtypes))
    if config.fusion.say_new:
      head, own = output.head, Head(*sizes, name="new_head")()
      head = jnp.concatenate([head, own.astype(head.dtype)], axis=1)
      output = dataclasses.replace(output, head=head)
    return output

  def _visitors(self, batch: Batch, cache: Cache | None, dtypes: Precision) -> stack.Visitors:
    """The gated layers, and what they read."""
    config, columns, table = self.config, None, None
    count = _count(config)
    if "images" in batch.media:
      table = concat.media_table(batch.media["images"], config, config.connector.width)
    elif cache is not None:
      columns = cache.memory
    size: Any = table if columns is None else jax.tree.leaves(columns)[0]
    media = Media(table, None if size is None else self._context(
      batch.masks["media"], size.shape[-2 if columns is None else -3], dtypes))
    run = stack.run(GatedLayer, count, remat=config.llm.remat, config=config,
                    implementation=config.attention.implementation, precision=dtypes, name="bridge")
    return stack.Visitors(run, config.bridge.every, config.bridge.first, columns, media)

  def _context(self, mask: IntervalMask, keys: int, dtypes: Precision) -> Context:
    attention = self.config.attention
    return make_context(mask, None, (attention.block_q, attention.block_k), keys=keys,
                        width=heads_of(self.config)[1], dtype=dtypes.compute)
