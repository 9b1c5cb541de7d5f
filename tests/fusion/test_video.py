"""Documents with videos: Flamingo reads them, and nobody else drops a frame."""

import dataclasses
import functools

import numpy as np
import pytest

from tests.fusion import contrast
from tests.fusion import testing as t
from vlm_jax.connectors import perceiver
from vlm_jax.core.document import Encoded, Pixels
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_fusion, names
from vlm_jax.core.layout import TIME
from vlm_jax.generate import prompts

TOLERANCE, LOUD = 2e-6, 100  # of the largest logit; a twin is so many times off
VALUES = "media/images/values"


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


# Flamingo. All below share two compiled programs, with and without embeddings of time.


def config_of(learned: int = 3):
  config = t.get_config("flamingo", "last")
  config.connector.frames = learned
  config.data.update(frames=3, images=8)
  return config


@functools.cache
def documents() -> tuple[Encoded, ...]:
  """Videos of three frames and of two, before, between and behind texts and images."""
  rng = np.random.default_rng(4)
  text = functools.partial(t.tokens, rng)
  parts = {
    "film": (text(2), video(rng, 3), text(2, 3), t.pixels(rng), text(1, 3)),
    "pair": (t.pixels(rng), text(3, 4)),
    "clips": (video(rng, 2), text(2, 2), video(rng, 3), text(1, 3)),
    "words": (text(1, 6),)}
  return tuple(Encoded(content, "words" if key == "words" else "pairs", key)
               for key, content in parts.items())


@functools.cache
def packed(learned: int = 3):
  """Config, noisy parameters, the flat batch of two rows, where documents are, logits."""
  config = config_of(learned)
  params = t.noise_params(config)
  flat, where = t.pack(t.lay_out(list(documents()), config), config)
  return config, params, flat, where, t.logits(config, params, flat)


def frames_of(where) -> dict[tuple[str, int], list[tuple[int, int, int]]]:
  """(document, number of an item) to (row, place on the image axis, first slot that may tell)."""
  found, used = {}, {}
  for document in sorted(documents(), key=lambda one: where[one.key][1].start):
    row, slots = where[document.key]
    at, item = slots.start, 0
    for part in document.parts:
      if isinstance(part, Pixels):
        start, count = used.get(row, 0), len(part.squares)
        used[row] = start + count
        found[document.key, item] = [(row, start + frame, at) for frame in range(count)]
        item += 1
      at += 1 if isinstance(part, Pixels) else len(part.ids)
  return found


def test_frames_lie_where_the_packer_says():
  _, _, flat, where, _ = packed()
  places = frames_of(where)
  assert {row for row, _ in where.values()} == {0, 1}
  assert sorted(len(frames) for frames in places.values()) == [1, 1, 2, 3, 3]
  shown = {(document.key, item): part.squares for document in documents()
           for item, part in enumerate(p for p in document.parts if isinstance(p, Pixels))}
  for key, frames in places.items():
    for (row, place, _), pixels in zip(frames, shown[key], strict=True):
      np.testing.assert_array_equal(flat[VALUES][row, place], pixels)
    assert [flat[TIME][row, place] for row, place, _ in frames] == list(range(len(frames)))


def test_packed_is_alone(monkeypatch):
  config, params, flat, where, out = packed()
  error = functools.partial(t.alone_error, config, params, list(documents()), where)
  assert error(out) < TOLERANCE
  # Twins: every text also sees the row of the table before its own; every frame is an item.
  media = "masks/media/lo"
  for wrong in (flat | {media: np.maximum(flat[media] - 1, 0)},
                flat | {TIME: np.minimum(flat[TIME], 0)}):
    assert error(t.logits(config, params, wrong)) > LOUD * TOLERANCE
  # And latents that see the frames of every item of their row.
  masked = perceiver.mask_of_items

  def every_frame(time, patches, latents):
    mask = masked(time, patches, latents)
    return dataclasses.replace(mask, lo=mask.lo * 0, hi=mask.hi * 0 + 8 * (patches + latents))

  t._forward.cache_clear()
  monkeypatch.setattr(perceiver, "mask_of_items", every_frame)
  try:
    assert t.error(t.logits(config, params, flat), out) > LOUD * TOLERANCE
  finally:
    t._forward.cache_clear()


def test_a_frame_changes_the_text_behind_its_video_and_no_other():
  config, params, flat, where, out = packed()
  ends = {key: slots.stop for key, (_, slots) in where.items()}
  for (key, _), frames in frames_of(where).items():
    for row, place, first in frames:
      values = flat[VALUES].copy()
      values[row, place] = 255 - values[row, place]
      changed = (t.logits(config, params, flat | {VALUES: values}) != out).any(-1)
      expected = np.zeros_like(changed)
      expected[row, first : ends[key]] = True
      np.testing.assert_array_equal(changed, expected, err_msg=f"{key} {place}")


@pytest.mark.parametrize("learned", [3, 0])
def test_the_order_of_frames_is_told_by_their_time(learned):
  """Without embeddings of it a video is a set of frames; with them it is not."""
  config, params, flat, where, out = packed(learned)
  row, place, first = frames_of(where)["film", 0][0]
  values = flat[VALUES].copy()
  values[row, place : place + 3] = values[row, place : place + 3][[2, 0, 1]]
  other = t.logits(config, params, flat | {VALUES: values})
  found = t.error(other, out)
  print(f"{learned} embeddings: {found:.1e}")
  assert found > LOUD * TOLERANCE if learned else found < TOLERANCE
  behind = slice(first, where["film"][1].stop)
  there = np.delete(np.arange(out.shape[1]), behind)
  assert np.array_equal(other[row, there], out[row, there])
  assert np.array_equal(other[1 - row], out[1 - row])
  # Twin of both: the embeddings of all times made alike, or what is shown made another.
  if learned:
    same = dict(params, connector=params["connector"] | {
      "time": np.broadcast_to(params["connector"]["time"][:1], (3, 24))})
    one, two = (t.logits(config, same, flat | {VALUES: v}) for v in (flat[VALUES], values))
    assert t.error(two, one) < TOLERANCE
  else:
    values[row, place] = values[row, place + 1]
    assert t.error(t.logits(config, params, flat | {VALUES: values}), out) > LOUD * TOLERANCE


def test_the_times_that_are_shown_learn():
  config, params, flat, _, _ = packed()
  _, grads = t.value_and_grad(config, params, flat)
  assert (np.abs(grads["connector"]["time"]) > 0).any(-1).all()
  images = flat | {TIME: np.minimum(flat[TIME], 0)}
  _, grads = t.value_and_grad(config, params, images)
  assert (np.abs(grads["connector"]["time"]) > 0).any(-1).tolist() == [True, False, False]


def test_without_videos_the_batch_and_the_parameters_are_as_ever():
  config, other = t.get_config("flamingo", "last"), config_of()
  fields, more = (find_fusion(one).fields(one) for one in (config, other))
  assert [*more] == [path for path in more if path in fields or path == TIME]
  assert {*more} - {*fields} == {TIME}
  assert "time" not in t.noise_params(config)["connector"]
  assert t.noise_params(other)["connector"]["time"].shape == (3, 24)


def test_prompts_with_videos_are_answered_as_they_were_learned():
  """A prompt's row has as many places as its frames, and the logits of the packed row."""
  config, params, _, where, out = packed()
  shown = [document for document in documents() if document.key != "words"]
  stacked = prompts.stack(prompts.layouts(shown, config), config, rows=3, bucket=16)
  assert stacked.flat[TIME].shape == (3, 5)
  alone = t.logits(config, params, stacked.flat)
  for number, document in enumerate(shown):
    row, slots = where[document.key]
    got = alone[number, : slots.stop - slots.start]
    assert t.error(got, out[row, slots]) < TOLERANCE
