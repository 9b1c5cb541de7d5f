"""CLIP: a picture and a text meet in their cosine, and nowhere else (arXiv:2103.00020).

Two towers, each with a linear map into one space of unit vectors:

    picture --> tower --> pooled --> image_projection --.
                                                        cosine * exp(logit_scale)
    text -----> llm ----> pooled --> text_projection ---'

Every picture chooses its text among all texts of the global batch, and every text its picture
(section 2.3). The scale is learned and never more than 100 (section 2.5). One document is one
picture with one text of fixed length, cut or padded; either may be missing, and then the document
is no pair.

What does not apply of what strategies promise: there is no packed stream, so there is no mask, no
position and no cache (promises 3, 4 and 9), and nothing is said. The loss compares documents, so it
is that of the whole batch: it is not the sum of its parts (1, 2 and 7), and accumulates over cached
embeddings instead. Embeddings are each document's own.
"""

import functools
import hashlib
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers
from ml_collections import ConfigDict

from vlm_jax.core.batch import Batch
from vlm_jax.core.document import Encoded, Pixels, Tokens
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import Cache, Embeddings, Stage, find_llm, find_tower
from vlm_jax.core.layout import Field, Layout, image_fields, text_fields
from vlm_jax.core.precision import precision
from vlm_jax.core.typing import Array
from vlm_jax.fusion.concat import refuse_tiles, refuse_video, source_id
from vlm_jax.nn.linear import Linear, parameter
from vlm_jax.nn.model import Configured
from vlm_jax.ops.contrastive import Pairs, softmax_losses
from vlm_jax.ops.losses import source_sums

STAGES = (
  Stage("all", (".*",)),
  # Locked-image tuning: a text tower learns to read a finished image tower (arXiv:2111.07991).
  Stage("lit", ("llm/.*", "text_projection/.*", "logit_.*")),
)
STREAM = ""  # nothing speaks
GLOBAL = ("contrast",)
TEXT = "captions"
CEILING = math.log(100)  # of the learned log scale

# What is neither tower's: ours, theirs, operation (vlm_jax/convert/table.py).
KEYS = (
  ("image_projection/kernel", "visual_projection.weight", "in"),
  ("text_projection/kernel", "text_projection.weight", "in"),
  ("logit_scale", "logit_scale", "copy"),
)


def axes(config: ConfigDict) -> dict[str, int]:
  """Capacities of a row: pictures, and as many documents."""
  return {"images": config.data.images, "documents": config.data.images}


def fields(config: ConfigDict) -> dict[str, Field]:
  """One picture and one text a document."""
  side, grids = config.tower.image_size, config.data.decode.fit == "naflex"
  return text_fields(TEXT, config.llm.positions) | image_fields(side, side, grids)


def rows(config: ConfigDict) -> np.ndarray:
  """i32[0]: a picture takes no slot among tokens."""
  del config
  return np.zeros(0, np.int32)


def order(config: ConfigDict, image: Pixels) -> np.ndarray:
  """i32[0], as `rows`.

  Raises:
    UsageError: an image in tiles, or a video.
  """
  refuse_tiles(config, image)
  refuse_video(config, image)
  return rows(config)


def uses(config: ConfigDict, path: str) -> dict[str, int] | None:
  """Projections are applied once to a picture and to a text."""
  del config
  projected = {"image_projection": "images/images", "text_projection": f"texts/{TEXT}"}
  name = projected.get(path.partition("/")[0])
  return {name: 1} if name else None


def layout(encoded: Encoded, config: ConfigDict, rng: np.random.Generator) -> Layout:
  """The picture and the text of a document; a text that is too long keeps its last token.

  Raises:
    UsageError: several pictures or texts, neither, as `order`, or a source that the config does not
      have.
  """
  del rng  # nothing here is random
  images = [part for part in encoded.parts if isinstance(part, Pixels)]
  texts = [part for part in encoded.parts if isinstance(part, Tokens)]
  for image in images:
    order(config, image)  # which refuses what is no single square
  if len(images) > 1 or len(texts) > 1 or not encoded.parts:
    raise UsageError(f"document {encoded.key} has {len(images)} pictures and {len(texts)} texts; "
                     f"config.fusion.name '{config.fusion.name}' pairs one with one, so set the "
                     f"form of source '{encoded.source}' to one that captions pictures")
  length, side = config.llm.positions, config.tower.image_size
  tokens = np.zeros(length, np.int32)
  if texts:
    ids = texts[0].ids
    ids = ids if len(ids) <= length else np.append(ids[: length - 1], ids[-1])
    tokens[: len(ids)] = ids
  pixels = images[0].values if images else np.zeros((side, side, 3), np.uint8)
  one = lambda value: np.array([value], np.int32)
  arrays = {
    f"documents/{TEXT}/tokens": tokens[None],
    f"documents/{TEXT}/segment_ids": one(len(texts)),
    f"documents/{TEXT}/source_ids": one(source_id(encoded, config)),
    f"documents/{TEXT}/digests": digest(tokens)[None],
    "media/images/values": pixels[None],
    "media/images/segment_ids": one(len(images)),
  }
  if config.data.decode.fit == "naflex":
    arrays["media/images/grid"] = np.array([images[0].grid if images else (0, 0)], np.int32)
  # Both take their place even when absent: the n-th picture and the n-th text of a row are a pair.
  return Layout(arrays, {"images": 1, "documents": 1}, encoded.source, encoded.key)


def digest(tokens: np.ndarray) -> np.ndarray:
  """i32[2], by which equal texts are known."""
  found = hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=8).digest()
  return np.frombuffer(found, "<i4").astype(np.int32)


def there(batch: Batch) -> Array:
  """bool[B,M], documents with a picture and a text."""
  return (batch.documents[TEXT].segment_ids > 0) & (batch.media["images"].segment_ids > 0)


def pairs(output: Embeddings, batch: Batch) -> Pairs:
  """All N = B M documents of the batch, those that are no pair marked."""
  flat = lambda array: array.reshape(-1, *array.shape[2:])
  return Pairs(flat(output.image), flat(output.text), flat(there(batch)),
               flat(batch.documents[TEXT].digests))


def contrast(values: Array, batch: Batch, config: ConfigDict) -> dict[str, Array]:
  """contrast: the losses f32[N] of all pairs as sums f32[sources]."""
  source_ids = batch.documents[TEXT].source_ids
  return {"contrast": source_sums(values.reshape(source_ids.shape), source_ids,
                                  len(config.data.sources))}


def losses(output: Embeddings, batch: Batch, config: ConfigDict) -> dict[str, Array]:
  """contrast: half the cross-entropies of both directions over the global batch, f32[sources]."""
  return contrast(softmax_losses(pairs(output, batch), output.scale), batch, config)


def weights(batch: Batch, config: ConfigDict) -> dict[str, Array]:
  """contrast: the number of pairs, f32[sources]."""
  return contrast(there(batch).astype(jnp.float32).reshape(-1), batch, config)


class Model(Configured):
  """Both towers and their projections."""

  @nn.compact
  def __call__(
    self, batch: Batch, *, rng: Array | None = None, cache: Cache | None = None
  ) -> Embeddings:
    """Embeds the pictures of a batch, its texts, or both.

    Args:
      batch: media "images", documents "captions", or one of them.
      rng: unused, the model has no randomness.
      cache: unused, nothing is cached.

    Returns:
      Unit vectors of E = config.fusion.width.

    Raises:
      UsageError: the tower does not pool, or config.llm.name is no text tower.
    """
    del rng, cache
    config, dtypes = self.config, precision(self.config)
    project = lambda name: Linear((config.fusion.width,), ("embed", "norm"), False, dtypes,
                                  name=name)
    image, text = pool_image(batch, config), pool_text(batch, config)
    image = None if image is None else unit(project("image_projection")(image))
    text = None if text is None else unit(project("text_projection")(text))
    scale = parameter(self, "logit_scale", initializers.constant(math.log(1 / 0.07)), (), (),
                      dtypes.param)
    return Embeddings(image, text, jnp.exp(at_most(scale.astype(jnp.float32), CEILING)))


def pool_image(batch: Batch, config: ConfigDict) -> Array | None:
  """The pooled features f[B,M,D] of pictures; None without any.

  Called inside a compact module, which then has the submodule "tower".

  Raises:
    UsageError: the tower does not pool.
  """
  if "images" not in batch.media:
    return None
  module, media = find_tower(config), batch.media["images"]
  if media.grid is not None and not getattr(module, "GRIDS", False):
    raise UsageError(f"config.data.decode.fit is 'naflex', whose grids config.tower.name "
                     f"'{config.tower.name}' does not read; use another fit or 'siglip2'")
  tower = module.Model(config.tower, config.attention, precision(config), name="tower")
  pooled = (tower(media.values) if media.grid is None else tower(media.values, media.grid)).pooled
  if pooled is None:
    raise UsageError(f"config.tower.pool is '{config.tower.pool}', but config.fusion.name "
                     f"'{config.fusion.name}' needs one vector a picture; use 'tok', 'gap' or "
                     "'map' of config.tower.name 'vit'")
  return pooled


def pool_text(batch: Batch, config: ConfigDict) -> Array | None:
  """The pooled features f[B,M,D] of texts; None without any.

  Called inside a compact module, which then has the submodule "llm".

  Raises:
    UsageError: config.llm.name is no text tower.
  """
  if TEXT not in batch.documents:
    return None
  tokens = batch.documents[TEXT].tokens
  model = find_llm(config, "text tower").Model(config.llm, config.attention, precision(config),
                                               name="llm")
  pooled = model(tokens.reshape(-1, tokens.shape[-1]))
  return pooled.reshape(*tokens.shape[:2], -1)


def unit(x: Array) -> Array:
  """f[..., E] to f32[..., E] of length 1."""
  x = x.astype(jnp.float32)
  tiny = 1e-24  # a vector of zeros stays one, with gradient 0: of less, tiny^(-3/2) is infinite
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), tiny))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def at_most(x: Array, ceiling: float) -> Array:
  """min(x, ceiling), whose gradient still leads down from there.

  That of a plain minimum is 0 above the ceiling, and what once got there would stay for ever; the
  published training clips the parameter itself after every step, which cannot.
  """
  return jnp.minimum(x, ceiling)


def _at_most(x: Array, ceiling: float) -> tuple[Array, Array]:
  return at_most(x, ceiling), x < ceiling


def _down_from_most(ceiling: float, below: Array, gradient: Array) -> tuple[Array]:
  del ceiling
  return (jnp.where(below | (gradient > 0), gradient, 0),)


at_most.defvjp(_at_most, _down_from_most)
