"""A prompt continued from a cache is the document read at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from tests.generate.helpers import (
  ROWS,
  SLOTS,
  VOCAB,
  alone,
  answered,
  fan_out,
  forward,
  noise,
  question,
  tiny,
)
from tests.numbers import same
from vlm_jax.core.batch import from_flat
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_fusion, find_llm
from vlm_jax.core.mask import NEVER
from vlm_jax.generate import decode
from vlm_jax.generate.prompts import layouts, stack
from vlm_jax.generate.sampling import Sampling

TOLERANCE = 2e-6
NEW = 5
PROMPTS = (
  fan_out([3, 6, 4], seed=1), fan_out([2], seed=2), question(7, seed=3),
  question(3, seed=4, image=False),
)
QUESTIONS = [(row, turn, asked) for row, prompt in enumerate(PROMPTS)
             for turn, asked in enumerate(alone(prompt) or [prompt])]


@functools.cache
def model(fusion="prefix_lm", attend="bidirectional"):
  config = tiny(fusion, attend=attend)
  return config, noise(config)


def prompts_of(documents, config, **shape):
  shape = dict(rows=ROWS, bucket=SLOTS, turns=3) | shape
  return stack(layouts(documents, config), config, **shape)


def generate(documents, *, max_tokens=NEW, shape=None, stop=(), **options):
  config, params = model()
  prompts = prompts_of(documents, config, **(shape or {}))
  stop = (*stop, *[-1] * (len(QUESTIONS) - len(stop)))  # always as many: one program
  return decode.generate(config, params, prompts, max_tokens=max_tokens, stop=stop, **options)


@functools.partial(jax.jit, static_argnames="config")
def prefilled(config, params, batch, ends, context):
  rows, columns = context.masks[context.stream].k_index.shape
  cache = find_llm(config).empty_cache(config.llm, rows, columns, jnp.float32)
  return decode.prefill(find_fusion(config).Model(config), params, batch, ends, context, cache)


@functools.partial(jax.jit, static_argnames="config")
def extended(config, params, tokens, step, context, cache):
  return decode.extend(find_fusion(config).Model(config), params, tokens, step, context, cache)


def error(config, params, spoil=lambda context: context):
  """The largest error of the logits of prefill and extend, as a share of the largest logit."""
  prompts = prompts_of(PROMPTS, config)
  answers = np.random.default_rng(0).integers(6, VOCAB, (*prompts.ends.shape, NEW)).astype(np.int32)
  frozen, batch, ends = FrozenConfigDict(config), from_flat(prompts.flat), jnp.asarray(prompts.ends)
  context = spoil(decode.make_context(find_fusion(config), config, batch, ends, NEW))
  logits, cache = prefilled(frozen, params, batch, ends, context)
  got = [np.asarray(logits)]
  apart, cache = decode.split(frozen, params, cache)
  for step in range(NEW - 1):
    logits, cache = extended(frozen, apart, answers[..., step], step, context, cache)
    got.append(np.asarray(logits))
  got = np.stack(got)

  documents = [answered(prompt, answers[row]) for row, prompt in enumerate(PROMPTS)]
  whole = forward(config, params, documents)
  worst = []
  for row, turn, _ in QUESTIONS:
    logits, classes = whole[row]
    assert np.isfinite(logits).all() and logits.std() > 0.1
    mine = np.flatnonzero(classes == (turn + 1 if classes.any() else 0))
    # The last NEW slots are the answer; the slot before each of them predicts it.
    want = logits[mine[-NEW - 1 : -1]]
    worst.append(np.abs(got[:, row, turn] - want).max() / np.abs(logits).max())
  return max(worst)


@pytest.mark.parametrize(
  "fusion, attend", [("prefix_lm", ""), ("concat", "causal"), ("concat", "bidirectional"),
                     ("simvlm", "")]
)
def test_prefill_and_extend_are_the_full_forward(fusion, attend):
  assert error(*model(fusion, attend or "bidirectional")) < TOLERANCE


@pytest.mark.parametrize("fusion, fault", [
  *[("prefix_lm", fault) for fault in ("index", "pad", "class", "position")],
  *[("simvlm", fault) for fault in ("class", "cross_class", "cross_end")],
])
def test_a_wrong_cache_is_seen(fusion, fault):
  def changed(context, name, **fields):
    mask = dataclasses.replace(context.masks[name], **fields)
    return dataclasses.replace(context, masks={**context.masks, name: mask})

  def spoil(context):
    own, cross = context.masks[context.stream], context.masks.get("cross")
    if fault == "index":  # each new token believes to come one earlier, and does not see itself
      return dataclasses.replace(context, length=context.length - 1)
    if fault == "pad":
      visible = jnp.where(own.k_index == NEVER, 0, own.k_index)
      return changed(context, context.stream, k_index=visible)
    if fault == "class":
      return changed(context, context.stream, q_class=jnp.zeros_like(own.q_class))
    if fault == "cross_class":
      return changed(context, "cross", q_class=jnp.zeros_like(cross.q_class))
    if fault == "cross_end":
      return changed(context, "cross", hi=cross.hi - 1)
    return dataclasses.replace(context, position=context.position + 1)

  assert error(*model(fusion), spoil) > 100 * TOLERANCE


def test_greedy_is_the_full_forward_run_again_for_every_token():
  config, params = model()
  out = generate(PROMPTS)
  active = prompts_of(PROMPTS, config).ends >= 0
  assert (np.asarray(out.lengths)[active] == NEW).all() and active.sum() == len(QUESTIONS) == 6
  assert int(out.steps) == NEW and not np.asarray(out.stopped).any()
  said = {(row, turn): [] for row, turn, _ in QUESTIONS}
  for step in range(NEW):
    documents = [answered(asked, [said[row, turn]]) if step else asked
                 for row, turn, asked in QUESTIONS]
    whole = forward(config, params, documents[:ROWS]) + forward(config, params, documents[ROWS:])
    for (row, turn, _), (logits, _) in zip(QUESTIONS, whole, strict=True):
      said[row, turn].append(int(logits[-1].argmax()))
      log_prob = logits[-1].max() - np.logaddexp.reduce(logits[-1])
      assert np.asarray(out.log_probs)[row, turn, step] == pytest.approx(log_prob, abs=1e-4)
  for (row, turn), tokens in said.items():
    assert np.asarray(out.tokens)[row, turn].tolist() == tokens
  # What is said must depend on the question, or nothing is shown.
  assert len({tuple(tokens) for tokens in said.values()}) > 3


def test_a_ragged_batch_is_each_question_alone():
  config, _ = model()
  together = generate(PROMPTS)
  for row, turn, asked in QUESTIONS:
    one = generate([asked], shape=dict(rows=1, bucket=32, turns=1))
    assert one.tokens.shape == (1, 1, NEW)
    assert (np.asarray(one.tokens)[0, 0] == np.asarray(together.tokens)[row, turn]).all()
    np.testing.assert_allclose(
      np.asarray(one.log_probs)[0, 0], np.asarray(together.log_probs)[row, turn], atol=1e-4
    )
  silent = prompts_of(PROMPTS, config).ends < 0
  assert silent.any() and (np.asarray(together.tokens)[silent] == 0).all()
  assert (np.asarray(together.lengths)[silent] == 0).all()


def test_stop_tokens_end_an_answer_and_the_loop():
  free = generate(PROMPTS)
  tokens = np.asarray(free.tokens)
  stop = tuple({int(tokens[row, turn, 1 + turn]) for row, turn, _ in QUESTIONS})
  out = generate(PROMPTS, stop=stop)
  lengths = []
  for row, turn, _ in QUESTIONS:
    said = tokens[row, turn]
    length = next(i for i, token in enumerate(said) if token in stop)
    lengths.append(length)
    assert int(out.lengths[row, turn]) == length and bool(out.stopped[row, turn])
    assert np.asarray(out.tokens)[row, turn].tolist() == [*said[:length], *[0] * (NEW - length)]
    kept, log_probs = (np.asarray(x.log_probs)[row, turn] for x in (free, out))
    np.testing.assert_allclose(log_probs[: length + 1], kept[: length + 1], atol=1e-5)
    assert (log_probs[length + 1 :] == 0).all()
  assert int(out.steps) == 1 + max(lengths) < NEW


def test_seeds_reproduce_and_do_not_depend_on_the_batch():
  def draw(prompts, seeds, sampling):
    seeds = np.resize(seeds, ROWS)
    return np.asarray(generate(prompts, sampling=sampling, seeds=seeds).tokens)

  warm = Sampling(temperature=1.5, top_p=0.95)
  both = draw(PROMPTS[1:3], [7, 8], warm)
  assert (both == draw(PROMPTS[1:3], [7, 8], warm)).all()
  assert (both[1] == draw(PROMPTS[2:3], [8], warm)[0]).all()
  assert (both != draw(PROMPTS[1:3], [9, 10], warm)).any()
  # Cold enough, or with the narrowest nucleus, sampling is greedy.
  greedy = draw(PROMPTS[1:3], [1, 2], Sampling())
  assert (greedy != both).any()
  assert (greedy == draw(PROMPTS[1:3], [1, 2], Sampling(temperature=1e-6))).all()
  assert (greedy == draw(PROMPTS[1:3], [1, 2], Sampling(temperature=1.0, top_p=1e-6))).all()


def test_an_encoder_is_read_once_and_every_turn_answers():
  config, params = model("simvlm")
  prompts = prompts_of(PROMPTS, config)
  out = decode.generate(config, params, prompts, max_tokens=NEW,
                        sampling=Sampling(temperature=1.5))
  said = {(row, turn): np.asarray(out.tokens)[row, turn].tolist() for row, turn, _ in QUESTIONS}
  documents = [answered(asked, [said[row, turn]]) for row, turn, asked in QUESTIONS]
  whole = forward(config, params, documents[:ROWS]) + forward(config, params, documents[ROWS:])
  for (row, turn, _), (logits, _) in zip(QUESTIONS, whole, strict=True):
    # From the start of the decoder on, each slot gives the probability of the next token.
    logits = logits[-NEW - 1 : -1].astype(np.float64)
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    want = log_p[np.arange(NEW), said[row, turn]]
    np.testing.assert_allclose(np.asarray(out.log_probs)[row, turn], want, atol=1e-4)
  assert len({tuple(tokens) for tokens in said.values()}) > 3
  with pytest.raises(UsageError, match="config.llm.positions is 48, too few for 49 new tokens"):
    decode.generate(config, params, prompts, max_tokens=SLOTS + 1)


def test_one_token_needs_no_columns_of_its_own():
  one = generate(PROMPTS, max_tokens=1)
  assert (np.asarray(one.tokens)[..., 0] == np.asarray(generate(PROMPTS).tokens)[..., 0]).all()
  with pytest.raises(ValueError, match="max_tokens"):
    generate(PROMPTS, max_tokens=0)


@pytest.mark.parametrize("fusion", ["prefix_lm", "simvlm"])
def test_the_loop_slices_no_layer(fusion):
  config, params = model(fusion)
  first = decode._arguments(config, params, prompts_of(PROMPTS, config), NEW, (), Sampling(), None)
  frozen, (stop, _, temperature, top_p, limit) = first[0], first[4:]
  split, saying = jax.eval_shape(functools.partial(decode.begin, frozen, max_tokens=NEW),
                                 *first[1:-1])
  loop = lambda params, saying: decode.advance(frozen, params, saying, stop, temperature, top_p,
                                               limit)
  assert "scan" not in (text := str(jax.make_jaxpr(loop)(split, saying))) and "while" in text


@pytest.mark.parametrize("chunk", [1, 3, NEW])
def test_a_stream_is_the_whole_loop_in_pieces(chunk):
  """With sampling and stops, and every piece begins as the whole does."""
  config, params = model()
  prompts = prompts_of(PROMPTS, config)
  said = np.asarray(generate(PROMPTS).tokens)
  stop = (int(said[0, 0, 2]), *[-1] * (len(QUESTIONS) - 1))
  options = dict(max_tokens=NEW, stop=stop, sampling=Sampling(temperature=0.7, top_p=0.9, seed=3))
  whole = jax.device_get(decode.generate(config, params, prompts, **options))
  pieces = list(decode.stream(config, params, prompts, chunk=chunk, **options))
  assert len(pieces) == 1 + -(-(NEW - 1) // chunk)
  for name in ("tokens", "lengths", "stopped", "steps"):
    assert (getattr(pieces[-1], name) == getattr(whole, name)).all(), name
  assert same(pieces[-1].log_probs, whole.log_probs)
  for piece in pieces:
    count = int(piece.steps)
    assert (piece.tokens[..., :count] == whole.tokens[..., :count]).all()
    assert (piece.tokens[..., count:] == 0).all()
  assert len(np.unique(whole.tokens)) > 5


def test_a_stream_ends_with_its_answers():
  config, params = model()
  said = np.asarray(generate(PROMPTS[2:3], shape=dict(rows=1, turns=1)).tokens)[0, 0]
  pieces = list(decode.stream(config, params, prompts_of(PROMPTS[2:3], config, rows=1, turns=1),
                              max_tokens=NEW, stop=(int(said[1]),), chunk=1))
  first = int(np.argmax(said == said[1]))
  assert int(pieces[-1].lengths[0, 0]) == first and len(pieces) == first + 1
  assert bool(pieces[-1].stopped[0, 0])
  with pytest.raises(ValueError, match="chunk"):
    next(decode.stream(config, params, prompts_of(PROMPTS, config), max_tokens=2, chunk=0))
