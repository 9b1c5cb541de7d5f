"""What BLIP-2's first stage says, from a cache, held to the pass that it was trained in."""

import functools

import jax
import numpy as np
import pytest

from tests.fusion import contrast as c
from tests.fusion import testing as t
from tests.fusion.test_contract import pictures
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Encoded, Tokens
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_fusion, speaking
from vlm_jax.fusion import blip2_itg, blip2_qformer
from vlm_jax.generate.decode import generate
from vlm_jax.generate.prompts import Prompts, layouts, stack

TOLERANCE, LOUD = 2e-6, 100
ROWS, NEW = 4, c.LENGTH - 1


@functools.cache
def made():
  """Config of the first stage, that of its voice, parameters of noise, whole documents."""
  config = c.get_config("blip2_qformer", rows=ROWS)
  config.data.images = 1
  whole = [one for one in c.documents(0, 8) if len(one.parts) == 2][:ROWS]
  params = c.sharp_params(config)
  bias = params["caption"]["bias"].at[0].set(-30)  # in a text of the first stage 0 is padding
  return config, speaking(config), {**params, "caption": {**params["caption"], "bias": bias}}, whole


@functools.cache
def first_stage():
  """A jitted (params, flat) -> (what is said f32[B,L,V], sum of itg) of the first stage."""
  config = made()[0]

  def run(params, flat):
    batch = from_flat(flat)
    out = blip2_qformer.Model(config).apply({"params": params}, batch)
    return out.hidden @ out.head, blip2_qformer.losses(out, batch, config)["itg"]

  return jax.jit(run)


def packed(documents: list, config) -> dict:
  """One document a row, in order."""
  flat, where = c.pack(t.lay_out(documents, config), config)
  order = [where[one.key][0] for one in documents]
  return {path: values[order] for path, values in flat.items()}


def test_docstring_picture_is_the_mask():
  _, config, _, whole = made()
  config = config.copy_and_resolve_references()
  config.connector.latents = 2
  text = Tokens(np.arange(1, 4, dtype=np.int32), np.ones(3, bool))
  found = from_flat(blip2_itg.layout(Encoded((whole[0].parts[0], text), "pairs", "x"), config,
                                     None).arrays)
  ((labels, image),) = pictures(blip2_itg.__doc__)
  assert labels == "qqddd" and found.masks["text"].picture(labels) == image
  stream = found.streams["text"]
  assert stream.tokens.tolist() == [0, 0, config.fusion.start, 2, 3]
  assert stream.positions.tolist() == [0, 0, 0, 1, 2]
  assert stream.loss_weights["lm"].tolist() == [0, 0, 1, 1, 0]
  assert stream.targets[2:4].tolist() == [2, 3]


def test_its_loss_is_the_third_of_the_first_stage():
  config, voice, params, whole = made()
  _, expected = first_stage()(params, packed(whole, config))

  @jax.jit
  def run(params, flat):
    batch = from_flat(flat)
    out = blip2_itg.Model(voice).apply({"params": params}, batch)
    return blip2_itg.losses(out, batch, voice)["lm"]

  flat = packed(whole, voice)
  weights = {path: values for path, values in flat.items() if "loss_weights" in path}
  assert float(*[values.sum() for values in weights.values()]) == float(
    blip2_qformer.weights(from_flat(packed(whole, config)), config)["itg"].sum())
  off = lambda flat: t.error(run(params, flat), np.asarray(expected))
  assert off(flat) < TOLERANCE
  # Twins: one query unseen; words that stand one place before their own; another mark opens them.
  words, later = slice(t.K, None), slice(t.K + 1, None)
  for path, where, change in (("masks/text/lo", words, 1), ("streams/text/positions", later, -1),
                              ("streams/text/tokens", t.K, 1)):
    other = flat[path].copy()
    other[:, where] += change * (flat["streams/text/segment_ids"][:, where] > 0)
    assert off(flat | {path: other}) > LOUD * TOLERANCE, path


def test_greedy_from_a_cache_is_the_whole_pass_run_again():
  config, voice, params, whole = made()
  start = Tokens(np.ones(1, np.int32), np.zeros(1, bool))  # the mark that opens a page
  asked = [Encoded((one.parts[0], start), one.source, one.key) for one in whole]
  prompts = stack(layouts(asked, voice), voice, rows=ROWS, bucket=1)
  said = generate(voice, params, prompts, max_tokens=NEW)
  tokens, log_probs = np.asarray(said.tokens)[:, 0], np.asarray(said.log_probs)[:, 0]
  assert tokens.shape == (ROWS, NEW) and len({tuple(row) for row in tokens}) > 1
  # What stands at the last place is read by nobody.
  text = lambda row: Tokens(np.append(1, row[:-1]).astype(np.int32), np.arange(NEW) > 0)
  told = [Encoded((one.parts[0], text(row)), one.source, one.key)
          for one, row in zip(whole, tokens, strict=True)]
  assert tokens.min() > 0
  logits = np.asarray(first_stage()(params, packed(told, config))[0])[:, :NEW].astype(np.float64)
  assert np.isfinite(logits).all() and logits.std() > 0.1
  np.testing.assert_array_equal(logits.argmax(-1), tokens)
  expected = logits.max(-1) - np.logaddexp.reduce(logits, axis=-1)
  error = lambda found: np.abs(found - expected).max() / np.abs(logits[..., 1:]).max()
  print(f"log p {error(log_probs):.1e}")
  assert error(log_probs) < TOLERANCE
  positions = prompts.flat["streams/text/positions"].copy()
  positions[:, t.K] += 1  # twin: what is said stands one place behind its own
  moved = Prompts(prompts.flat | {"streams/text/positions": positions}, prompts.ends)
  assert error(np.asarray(generate(voice, params, moved, max_tokens=NEW).log_probs)[:, 0]) > (
    LOUD * TOLERANCE)


def test_who_has_a_voice_and_what_it_cannot_say():
  config, voice, _, whole = made()
  assert find_fusion(voice) is blip2_itg and speaking(voice) is voice
  assert config.fusion.name == "blip2_qformer"
  silent = config.copy_and_resolve_references()
  del silent.fusion.objectives.itg
  assert speaking(silent) is silent
  lay_out = lambda *parts: blip2_itg.layout(Encoded(parts, "pairs", "x"), voice, None)
  picture, text = whole[0].parts
  for parts in ((text,), (text, picture), (picture, picture, text), ()):
    with pytest.raises(UsageError, match="says one text behind one picture.*'none'"):
      lay_out(*parts)
  # A tokenizer may open a page with nothing; padding and what is too long are cut.
  of = lambda ids: lay_out(picture, Tokens(np.array(ids, np.int32), np.ones(len(ids), bool)))
  said = lambda ids: of(ids).arrays["streams/text/tokens"][t.K :].tolist()
  start = voice.fusion.start
  assert said([]) == [start] and said([5, 6, 0, 0]) == [start, 6]
  assert said(range(1, 12)) == [start, *range(2, c.LENGTH), 11]
