"""Every file of the corpus becomes its pixels or is counted under its reason."""

import collections

import numpy as np
import pytest

from tests.data import odd_images
from tests.data.odd_images import HOW, SHAPE, exif, picture, saved
from vlm_jax.data import images
from vlm_jax.data.bad import Bad, BadExample, Tally

CORPUS = odd_images.corpus()


@pytest.mark.parametrize("name", CORPUS)
def test_file(name):
  data, expected = CORPUS[name]
  if isinstance(expected, str):
    with pytest.raises(BadExample) as caught:
      images.decode(data, HOW)
    assert caught.value.reason == expected
    with pytest.raises(BadExample):
      images.square(data, 16, HOW)
    return
  pixels, off = expected
  decoded = images.decode(data, HOW)
  assert decoded.dtype == np.uint8 and decoded.shape == pixels.shape
  assert np.abs(decoded.astype(int) - pixels).max() <= off
  assert images.square(data, 16, HOW).shape == (16, 16, 3)


def test_the_corpus_tells_its_pictures_apart():
  # A turn, a swapped channel or a forgotten background would be seen.
  pixels = picture().astype(int)
  assert pixels.shape[:2] == SHAPE
  for other in (pixels[:, ::-1], pixels[::-1], pixels[..., ::-1], 255 - pixels):
    assert np.abs(pixels - other).max() > 60
  white = images.decode(CORPUS["rgb with alpha"][0])
  assert np.abs(white.astype(int) - CORPUS["rgb with alpha"][1][0]).max() > 60
  assert len(odd_images.bad()) + len(odd_images.odd()) == len(CORPUS) >= 40


def test_a_source_of_them_is_counted_by_reason():
  tally = Tally("odd", limit=1.0)
  for name, (data, _) in CORPUS.items():
    try:
      images.square(data, 16, HOW)
      tally.count([])
    except BadExample as error:
      tally.count(Bad(error.reason, name))
  expected = collections.Counter(e for _, e in CORPUS.values() if isinstance(e, str))
  assert tally.bad == dict(expected) and tally.seen == len(CORPUS)
  assert tally.keys["extreme_aspect"] == ["long and thin"]


def test_reduced_jpegs_keep_their_orientation():
  whole = picture(480, 640)
  data = saved(whole, "jpeg", quality=95, exif=exif(6))
  reduced = images.square(data, 40, images.Decoding(draft=1)).astype(int)
  shown = images.square(np.ascontiguousarray(np.rot90(whole, -1)), 40, images.Decoding())
  assert np.abs(reduced - shown).max() < 10
