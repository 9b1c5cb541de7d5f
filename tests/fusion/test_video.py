"""Documents with videos: who reads them, and that nobody else drops a frame."""

import dataclasses

import numpy as np
import pytest

from tests.fusion import contrast
from tests.fusion import testing as t
from vlm_jax.core.document import Encoded
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_fusion, names

pytestmark = pytest.mark.usefixtures("quick")


def video(rng: np.random.Generator, frames: int):
  """A random video."""
  first, *rest = (t.pixels(rng) for _ in range(frames))
  return dataclasses.replace(first, later=np.stack([one.values for one in rest]))


@pytest.mark.parametrize("name", sorted(names("fusion")))
def test_others_refuse_a_video(name):
  own = {variant[0]: variant for variant in t.VARIANTS}
  config = contrast.get_config("blip2_qformer" if name == "blip2_itg" else name) \
    if name in contrast.NAMES or name == "blip2_itg" else t.get_config(*own[name])
  config.fusion.name = name
  config.data.decode.grids = ()
  rng = np.random.default_rng(0)
  seen = lambda picture: Encoded((picture, t.tokens(rng, 2, 3)), "words", "shown")
  module = find_fusion(config)
  lay_out = lambda picture: module.layout(seen(picture), config, np.random.default_rng(0))
  lay_out(t.pixels(rng))
  reason = f"a document has a video.*config.fusion.name '{name}' does not read together.*'flamingo'"
  if name == "flamingo":
    reason = "a video of 3 frames but config.data.frames is 0; raise it"
  for refuse in (lay_out, lambda picture: module.order(config, picture)):
    with pytest.raises(UsageError, match=reason):
      refuse(video(rng, 3))
