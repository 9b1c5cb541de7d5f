"""The Perceiver Resampler of Flamingo (arXiv:2204.14198, section 3.1 and appendix A.1.1).

Learned latents read the features of an image and each other: K of them come out, however many
features there are.

    z + attention(norm z; norm features and norm z), z + mlp(norm z)     repeated, norm

A video is read as one item: its K latents see the patches of all its frames, and no other's (x the
latents of a video whose three frames are a b c, y those of an image d; a row has more places for
items than items, and what stands in the others sees nothing):

         a b c d x y
       x 1 1 1 . 1 .
       y . . . 1 . 1

With `config.connector.frames` a learned embedding of its time is added to every patch of a frame
first, to those of an image the first; without, the order of frames makes no difference. Flamingo
learned 8 and interpolated them for the 30 frames of its evaluation; here there are never more
frames than embeddings. open_flamingo's `frame_embs` are the same; its `media_time_embs`, of the
n-th picture of a prompt, which no released model has, are not here.

What a family changes, no linear layer having a bias and heads any width:

                norm    feed_forward  activation    heads of keys
  Flamingo      layer   plain         relu2         all
  OpenFlamingo  layer   plain         gelu          all
  IDEFICS       layer   plain         relu          all
  Idefics2      rms     gated         silu          groups (`kv_heads`)

The latents are as wide as what the connector returns. Features of another width are projected to it
first, as in Idefics2; Flamingo's are that wide (`config.connector.width`).
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers
from ml_collections import ConfigDict

from vlm_jax.core.errors import UsageError
from vlm_jax.core.mask import NEVER, IntervalMask
from vlm_jax.core.mesh import constrain
from vlm_jax.core.precision import Precision
from vlm_jax.core.typing import Array
from vlm_jax.nn import pool, stack
from vlm_jax.nn.attention import Context, CrossAttention, make_context
from vlm_jax.nn.linear import Linear, parameter
from vlm_jax.nn.mlp import feed_forward
from vlm_jax.nn.norms import norm

VIDEOS = True
_ATTENTION = ("query", "key", "value", "out")


def _rows(latents: str, norms: dict[str, str], attention: tuple[str, str, str, str],
          mlp: dict[str, str], last: str) -> tuple[tuple[str, str, str], ...]:
  """A table of keys: of the latents, norms, projections and feed-forward of a layer, last norm."""
  found = [("latents", latents, "copy")]
  for ours, theirs in norms.items():
    found += [(f"layers/{ours}/scale", f"{theirs}.weight", "copy"),
              (f"layers/{ours}/bias", f"{theirs}.bias", "copy")]
  for ours, theirs in zip(_ATTENTION, attention, strict=True):
    found.append((f"layers/attention/{ours}/kernel", theirs, "out" if ours == "out" else "in"))
  found += [(f"layers/mlp/{ours}/kernel", theirs, "in") for ours, theirs in mlp.items()]
  return (*found, ("norm/scale", f"{last}.weight", "copy"), ("norm/bias", f"{last}.bias", "copy"))


_BLOCK, _LAYER = "blocks.{layer}.", "layers.{layer}."
# IdeficsPerceiverResampler of transformers.
KEYS = _rows(
  "latents",
  {"context_norm": _BLOCK + "0.context_layer_norm", "latents_norm": _BLOCK + "0.latents_layer_norm",
   "mlp_norm": _BLOCK + "1.ln", "attention/query_norm": _BLOCK + "0.q_layer_norm",
   "attention/key_norm": _BLOCK + "0.k_layer_norm"},
  (_BLOCK + "0.q_proj.weight", _BLOCK + "0.k_proj.weight", _BLOCK + "0.v_proj.weight",
   _BLOCK + "0.output_proj.weight"),
  {"up": _BLOCK + "1.fc.weight", "down": _BLOCK + "1.c_proj.weight"},
  "layer_norm",
)
# PerceiverResampler of open_flamingo.
OPEN_FLAMINGO_KEYS = (("time", "frame_embs", "copy"), *_rows(
  "latents",
  {"context_norm": _LAYER + "0.norm_media", "latents_norm": _LAYER + "0.norm_latents",
   "mlp_norm": _LAYER + "1.0"},
  (_LAYER + "0.to_q.weight", _LAYER + "0.to_kv.weight[0/2]", _LAYER + "0.to_kv.weight[1/2]",
   _LAYER + "0.to_out.weight"),
  {"up": _LAYER + "1.1.weight", "down": _LAYER + "1.3.weight"},
  "norm",
))
# Idefics2PerceiverResampler of transformers, whose norms have no biases.
IDEFICS2_KEYS = _rows(
  "latents",
  {"context_norm": _LAYER + "input_context_norm", "latents_norm": _LAYER + "input_latents_norm",
   "mlp_norm": _LAYER + "post_attention_layernorm"},
  (_LAYER + "self_attn.q_proj.weight", _LAYER + "self_attn.k_proj.weight",
   _LAYER + "self_attn.v_proj.weight", _LAYER + "self_attn.o_proj.weight"),
  {"gate": _LAYER + "mlp.gate_proj.weight", "up": _LAYER + "mlp.up_proj.weight",
   "down": _LAYER + "mlp.down_proj.weight"},
  "norm",
)


def slots(config: ConfigDict, frames: int, height: int, width: int) -> np.ndarray:
  """i32[k]: every latent is one slot, however many frames it read."""
  del frames, height, width
  return np.arange(config.latents, dtype=np.int32)


def uses(config: ConfigDict, path: str, features: int) -> int:
  """To how many places of one image a parameter is applied: latents are keys too."""
  if "context_norm" in path or path.startswith("project/"):
    return features
  return pool.uses(path, config.latents, features + config.latents)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Read:
  """What all layers read: features f[n,S,D], and the context of Q latents and S + Q keys.

  n images have S = P patches and Q = K latents each; n rows of N frames S = N P and Q = N K.
  """

  features: Array
  context: Context


class Layer(nn.Module):
  """Attention of the latents to features and latents, and a feed-forward block."""

  config: ConfigDict
  implementation: str
  precision: Precision

  @nn.compact
  def __call__(self, x: Array, columns: None, context: Read) -> tuple[Array, None]:
    """See `nn.stack`; x f[n,Q,D] are the latents."""
    config, precision, width = self.config, self.precision, x.shape[-1]
    make = lambda name: norm(config.norm, config.norm_eps, precision, name)
    x = constrain(x, ("batch", None, None))
    latents = make("latents_norm")(x)
    keys = jnp.concatenate([make("context_norm")(context.features), latents], axis=1)
    y, _ = CrossAttention(
      heads=config.heads,
      groups=config.kv_heads or config.heads,
      head_dim=config.head_dim,
      bias=False,
      implementation=self.implementation,
      precision=precision,
      qk_norm=config.qk_norm or None,
      qk_norm_eps=config.norm_eps,
      name="attention",
    )(latents, keys, None, context.context)
    x = x + y
    mlp = feed_forward(config.feed_forward, width, config.hidden or 4 * width, config.activation,
                       False, precision, "mlp")
    return x + mlp(make("mlp_norm")(x)), columns


def mask_of_items(time: Array, patches: int, latents: int) -> IntervalMask:
  """The mask of a row of N frames: queries are N * K latents of items, keys N * P patches and they.

  In the order of `k_index` the latents of an item stand behind the patches of its first frame.

  Args:
    time: i32[B,N] of `Media`.
    patches: P of a frame.
    latents: K of an item.
  """
  batch, slots = time.shape
  step, number = patches + latents, jnp.arange(slots)
  item = jnp.cumsum(time == 0, axis=1) - 1  # of every frame
  mine = (item[:, None] == number[:, None]) & (time >= 0)[:, None]  # [B, items, frames]
  first, count = jnp.argmax(mine, axis=-1) * step, jnp.sum(mine, axis=-1)
  place = number[:, None] * step + jnp.arange(patches)
  place = jnp.broadcast_to(place.reshape(-1), (batch, slots * patches))
  own = first[..., None] + patches + jnp.arange(latents)
  own = jnp.where(count[..., None] > 0, own, NEVER).reshape(batch, -1)
  of_queries = lambda field: jnp.repeat(field, latents, axis=1).astype(jnp.int32)
  return IntervalMask(of_queries(first), of_queries(first + count * step),
                      k_index=jnp.concatenate([place, own], axis=1).astype(jnp.int32))


class Model(nn.Module):
  """f[B,N,P,D_in] to f[B,N,K,width]."""

  config: ConfigDict
  width: int
  precision: Precision

  @nn.compact
  def __call__(self, features: Array, grid: tuple[int, int], time: Array | None = None) -> Array:
    """Reads images one by one, or with their `time` i32[B,N] the frames of items; see `Connector`.

    Raises:
      UsageError: heads that do not share keys evenly.
    """
    del grid
    config, precision = self.config, self.precision
    groups = config.kv_heads or config.heads
    if config.heads % groups:
      raise UsageError(f"config.connector.heads is {config.heads}, which must be a multiple of "
                       f"kv_heads, {groups}; change one of them")
    batch, images, count, wide = features.shape
    if wide != self.width:
      features = Linear((self.width,), ("embed", "mlp"), False, precision, name="project")(features)
    x = features.astype(precision.compute)
    learned = lambda name, rows: parameter(self, name, initializers.normal(1.0), (rows, self.width),
                                           (None, "norm"), precision.param)
    latents = learned("latents", config.latents)
    if config.frames:
      at = jnp.zeros((batch, images), jnp.int32) if time is None else jnp.maximum(time, 0)
      x = x + learned("time", config.frames)[at][:, :, None].astype(x.dtype)
    rows, together = (batch * images, 1) if time is None else (batch, images)
    x = x.reshape(rows, together * count, self.width)
    latents = jnp.broadcast_to(latents.astype(x.dtype), (len(x), *latents.shape))
    if time is None:
      see_all = jnp.zeros((len(x), config.latents), jnp.int32)
      mask = IntervalMask(see_all, see_all + count + config.latents)
    else:
      latents = jnp.tile(latents, (1, together, 1))
      mask = mask_of_items(time, count, config.latents)
    context = make_context(
      mask, None, (0, 0), keys=together * (count + config.latents), sharing=config.heads // groups,
      width=config.head_dim, dtype=precision.compute)
    latents, _ = stack.run(Layer, config.depth, config=config, implementation="auto",
                           precision=precision, name="layers")(latents, None, Read(x, context))
    latents = norm(config.norm, config.norm_eps, precision, "norm")(latents)
    return latents.reshape(batch, images, config.latents, self.width)
