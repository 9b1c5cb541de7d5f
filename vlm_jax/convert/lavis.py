"""BLIP-2 as LAVIS writes it (.pth, arXiv:2301.12597), under the keys of Hugging Face.

A file is of the first stage, whose Q-Former has words and heads, or of the second, whose Q-Former
has a projection; either may lack what its stage keeps as it is: the language model, and the tower
but for the norm behind it. EVA's own file is the tower without that norm, and with the last block,
which BLIP-2 leaves out. The tower's queries and values have a bias and its keys none: zero.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from vlm_jax.connectors.qformer import norm_keys
from vlm_jax.convert.table import Keys, Shape, Source, renamer
from vlm_jax.core.errors import DataError

RULES = (
  (r"^(?=(cls_token|pos_embed|patch_embed|blocks)\b)", "visual_encoder."),  # EVA's own
  (r"^visual_encoder\.", "vision_model."),
  (r"^ln_vision\.", "vision_model.post_layernorm."),
  (r"^vision_model\.cls_token", "vision_model.embeddings.class_embedding"),
  (r"^vision_model\.pos_embed", "vision_model.embeddings.position_embedding"),
  (r"^vision_model\.patch_embed\.proj", "vision_model.embeddings.patch_embedding"),
  (r"^vision_model\.blocks\.(\d+)\.", r"vision_model.encoder.layers.\1."),
  (r"^(vision_model\..*)\.norm([12])\.", r"\1.layer_norm\2."),
  (r"^(vision_model\..*)\.attn\.proj\.", r"\1.self_attn.projection."),
  (r"^(vision_model\..*)\.attn\.", r"\1.self_attn."),
  (r"^Qformer\.bert\.embeddings\.LayerNorm", "qformer.layernorm"),
  (r"^Qformer\.bert\.embeddings\.", "embeddings."),
  (r"^Qformer\.bert\.", "qformer."),
  (r"^(qformer\..*attention)\.self\.", r"\1.attention."),
  (r"^(opt|t5|llm)_proj\.", "language_projection."),
  (r"^(opt|t5|llm)_model\.", "language_model."),
  (r"^(vision|text)_proj\.", r"\1_projection."),
)
_SAYS = "Qformer.cls.predictions."
# What no file of Hugging Face has: ours, theirs, operation.
KEYS: Keys = (
  ("temperature", "temp", "copy"),
  ("caption/linear/kernel", _SAYS + "transform.dense.weight", "in"),
  ("caption/linear/bias", _SAYS + "transform.dense.bias", "copy"),
  *norm_keys("caption/norm", _SAYS + "transform.LayerNorm"),
  ("caption/bias", _SAYS + "bias", "copy"),
)
WORDS, TIED = "embeddings.word_embeddings.weight", _SAYS + "decoder.weight"
# What only the first stage reads.
FIRST = re.compile(r"embeddings\..*|qformer\.encoder\.layer\.\d+\.(intermediate|output)\..*|temp"
                   r"|(vision|text)_projection\..*|itm_head\..*|Qformer\.cls\..*")
# Parts that a file may lack: the paths of our parameters, and where they may come from instead.
APART = {
  "tower": re.compile(r"tower/(?!post_norm/).*"),
  "llm": re.compile(r"llm/.*"),
  "connector": re.compile(r"connector/project/.*"),  # a second stage draws it
}
BEHIND = "post_norm/"  # of the tower, the bridge's
BIASES = ("q_bias", "v_bias")


def is_written_in(keys: Iterable[str]) -> bool:
  """Whether a state dict is a BLIP-2 of LAVIS, or EVA's tower."""
  found = {key.partition(".")[0] for key in keys}
  return "Qformer" in found or {"cls_token", "patch_embed", "blocks"} <= found


class View:
  """The tensors under the keys of Hugging Face, the biases of a tower's block as one."""

  def __init__(self, source: Source):
    """Names every tensor."""
    rename = renamer(RULES)
    self._source = source
    self._names: dict[str, tuple[str, ...]] = {}
    self.shapes: dict[str, Shape] = {}
    for key, shape in source.shapes.items():
      place, _, name = key.rpartition(".")
      if name == BIASES[1]:
        continue
      if name == BIASES[0]:
        self._names[theirs := rename(f"{place}.qkv.bias")] = (key, f"{place}.{BIASES[1]}")
        shape = (3 * shape[0],)
      else:
        self._names[theirs := rename(key)] = (key,)
      self.shapes[theirs] = shape

  def __getitem__(self, key: str) -> np.ndarray:
    found = [self._source[name] for name in self._names[key]]
    return found[0] if len(found) == 1 else np.concatenate(
      [found[0], np.zeros_like(found[0]), found[1]])


def check_tied(source: Source) -> None:
  """Raises a DataError where what captions are said with is not the embedding of words."""
  if TIED in source.shapes and WORDS in source.shapes and not np.array_equal(
      source[TIED], source[WORDS]):
    raise DataError(f"weights: {TIED} differs from the embedding of words, which ours is tied to; "
                    "the model that wrote them is another one")


def tower(source: Source, shapes: Mapping[str, Shape], depth: int
          ) -> tuple[dict[str, Shape], Callable[[str], bool]]:
  """What of a tower stands in a file, and which keys there may be left over.

  Args:
    source: the tensors of the tower.
    shapes: path below "tower/" to shape, of every parameter.
    depth: its blocks; EVA has one more.
  """
  bare = not any(key.startswith("post_layernorm.") for key in source.shapes)
  last = lambda key: bare and key.startswith(f"encoder.layers.{depth}.")
  return {path: shape for path, shape in shapes.items()
          if not (bare and path.startswith(BEHIND))}, last
