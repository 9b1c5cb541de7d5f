"""What SimVLM's layout gives to the encoder and to the decoder, draws and refuses."""

import numpy as np
import pytest

from tests.fusion import testing as t
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Encoded
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_fusion


def sides(parts, seed=0, fan_out=False, config=None, source="pairs"):
  """The streams and masks of one document, as `from_flat` reads them."""
  config = config or t.get_config("simvlm", fan_out=fan_out)
  document = Encoded(tuple(parts), source, "document")
  layout = find_fusion(config).layout(document, config, np.random.default_rng(seed))
  assert set(layout.arrays) == set(find_fusion(config).fields(config))
  assert layout.sizes["encoder"] == len(layout.arrays["streams/encoder/tokens"])
  assert layout.sizes["decoder"] == len(layout.arrays["streams/decoder/tokens"])
  batch = from_flat(layout.arrays)
  return batch.streams["encoder"], batch.streams["decoder"], batch.masks


def ids(*parts):
  return np.concatenate([part.ids for part in parts])


def test_a_question_is_read_and_its_answer_written():
  rng = np.random.default_rng(0)
  picture, turn, more = t.pixels(rng), t.tokens(rng, 3, 2), t.tokens(rng, 1, 2)
  encoder, decoder, masks = sides([picture, turn, more])
  np.testing.assert_array_equal(encoder.tokens, [0] * 4 + list(turn.ids[:3]))
  np.testing.assert_array_equal(encoder.fill, [0, 1, 2, 3, -1, -1, -1])
  np.testing.assert_array_equal(encoder.positions, [0] * 4 + [0, 1, 2])
  # The start, the answer, and the second turn, of which only the answer is predicted.
  written = ids(turn, more)[3:]
  np.testing.assert_array_equal(decoder.tokens, [0, *written])
  np.testing.assert_array_equal(decoder.targets, [*written, 0])
  np.testing.assert_array_equal(decoder.loss_weights["lm"], [1, 1, 0, 1, 1, 0])
  np.testing.assert_array_equal(decoder.positions, range(6))
  np.testing.assert_array_equal(masks["encoder"].hi, [7] * 7)
  np.testing.assert_array_equal(masks["cross"].hi, [7] * 6)
  np.testing.assert_array_equal(masks["decoder"].hi, range(1, 7))
  # A prompt alone is all encoder, and the decoder has its start to go on from.
  encoder, decoder, _ = sides([picture, t.tokens(rng, 1)])
  assert len(encoder.tokens) == 5 and decoder.tokens.tolist() == [0]


def test_the_prefix_of_a_text_is_uniform():
  text = t.tokens(np.random.default_rng(0), 1, 5)
  draws = 900
  config = t.get_config("simvlm")
  read = lambda seed: sides([text], seed, source="words", config=config)[0]
  cuts = [len(read(seed).tokens) for seed in range(draws)]
  counts = np.bincount(cuts, minlength=7)
  assert not counts[6:].any()  # something is always left to be predicted
  assert np.abs(counts[:6] - draws / 6).max() < 5 * np.sqrt(draws / 6)
  for seed in range(12):
    encoder, decoder, masks = sides([text], seed, source="words")
    cut = len(encoder.tokens)
    np.testing.assert_array_equal(np.append(encoder.tokens, decoder.tokens[1:]), text.ids)
    # All of the suffix is predicted, but for the token that opens the text.
    np.testing.assert_array_equal(decoder.loss_weights["lm"], [float(cut > 0)] + [1.0] * (5 - cut)
                                  + [0.0] if cut < 6 else [])
    assert (masks["cross"].hi == cut).all()


@pytest.mark.parametrize("before", [0, 2])
def test_images_are_always_in_the_prefix(before):
  rng = np.random.default_rng(0)
  picture, caption = t.pixels(rng), t.tokens(rng, 1, 4)
  parts = [t.tokens(rng, 0, before)] * (before > 0) + [picture, caption]
  cuts = set()
  for seed in range(40):
    encoder, decoder, _ = sides(parts, seed)
    assert (encoder.fill >= 0).sum() == 4 and (decoder.fill < 0).all()
    cuts.add(len(encoder.tokens) - 4 - before)
    assert decoder.loss_weights["lm"].sum() >= 1
  # A caption is cut anywhere behind its image; text that surrounds an image is a prompt.
  assert cuts == ({0, 1, 2, 3, 4} if not before else {0})


def test_branches_are_on_both_sides():
  rng = np.random.default_rng(0)
  picture, trunk = t.pixels(rng), t.tokens(rng, 2)
  branches = [t.tokens(rng, 3, 2, 1), t.tokens(rng, 2, 1, 2), t.tokens(rng, 1, 0, 3)]
  encoder, decoder, masks = sides([picture, trunk, *branches], fan_out=True)
  np.testing.assert_array_equal(encoder.positions, [0] * 4 + [0, 1] + [2, 3, 4] + [2, 3] + [2])
  np.testing.assert_array_equal(masks["encoder"].hi, [6] * 6 + [9] * 3 + [11] * 2 + [12])
  classes = [0] * 6 + [1] * 3 + [2] * 2 + [3]
  np.testing.assert_array_equal(masks["cross"].k_class, classes)
  np.testing.assert_array_equal(masks["encoder"].q_class, classes)
  np.testing.assert_array_equal(decoder.tokens, [0, *branches[0].ids[3:], 0, branches[1].ids[2], 0])
  np.testing.assert_array_equal(decoder.positions, [0, 1, 2, 0, 1, 0])
  np.testing.assert_array_equal(masks["decoder"].q_class, [1, 1, 1, 2, 2, 3])
  np.testing.assert_array_equal(masks["cross"].hi, [9] * 3 + [11] * 2 + [12])
  np.testing.assert_array_equal(decoder.loss_weights["lm"], [1, 1, 0, 1, 0, 0])


def test_a_trunk_that_answers_and_a_branch_that_only_answers():
  rng = np.random.default_rng(0)
  trunk, only = t.tokens(rng, 1, 2), t.tokens(rng, 0, 2, 1)
  encoder, decoder, masks = sides([trunk, only], fan_out=True)
  np.testing.assert_array_equal(encoder.tokens, trunk.ids[:1])
  np.testing.assert_array_equal(decoder.tokens, [0, *trunk.ids[1:], 0, *only.ids])
  np.testing.assert_array_equal(decoder.positions, [0, 1, 2, 3, 4, 5])
  np.testing.assert_array_equal(masks["decoder"].q_class, [0, 0, 0, 1, 1, 1])
  np.testing.assert_array_equal(masks["cross"].hi, [1] * 6)


def test_what_does_not_fit_is_refused():
  rng = np.random.default_rng(0)
  config = t.get_config("simvlm")
  with pytest.raises(UsageError, match="document document takes 26 slots of the decoder, which has "
                                       "24 in a row; raise config.data.decoder_tokens"):
    sides([t.tokens(rng, 2, 25)], config=config)
  config.llm.positions = 9
  with pytest.raises(UsageError, match="has 10 positions but config.llm.positions is 9"):
    sides([t.tokens(rng, 10, 2)], config=config)
  config = t.get_config("simvlm")
  config.connector.name = "pool"
  with pytest.raises(UsageError, match="config.connector.name 'pool' does not keep the tower's 2 x "
                                       "2 grid"):
    sides([t.pixels(rng)], config=config)
  branch = t.tokens(rng, 1, 1, 1)
  with pytest.raises(UsageError, match="form is 'fan_out'"):
    sides([branch])
  config = t.get_config("simvlm")
  config.llm.name = "llama"
  with pytest.raises(UsageError, match="config.llm.name 'llama' is of kind 'decoder'"):
    t.noise_params(config)


def test_capacities_follow_the_config():
  config = t.get_config("simvlm")
  module = find_fusion(config)
  assert module.axes(config) == {"encoder": 48, "decoder": 24, "images": 4, "table": 16,
                                 "documents": 24}
  config.data.decoder_tokens = 0
  assert module.axes(config)["decoder"] == 49
  fields = module.fields(config)
  assert (fields["masks/cross/lo"].axis, fields["masks/cross/lo"].shift) == ("decoder", "encoder")
  assert "streams/encoder/targets" not in fields and "masks/cross/q_class" not in fields
  fields = module.fields(t.get_config("simvlm", fan_out=True))
  assert fields["masks/cross/q_class"].axis == "decoder"
  assert fields["masks/cross/k_class"].axis == "encoder"
