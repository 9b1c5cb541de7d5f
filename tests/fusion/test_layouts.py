"""What the layouts of the strategies draw, refuse and predict."""

import dataclasses

import numpy as np
import pytest

from tests.fusion import testing as t
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Encoded, Tokens
from vlm_jax.core.errors import UsageError
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.mask import IntervalMask


def arrays(document, config, seed=0):
  layout = find_fusion(config).layout(document, config, np.random.default_rng(seed))
  return {path.split("/")[-1]: values for path, values in layout.arrays.items()}


def cut_of(out) -> int:
  """The prefix length that a layout drew: 0 and 1 make the same mask."""
  return int(out["hi"][0])


def test_prefix_length_is_uniform():
  config = t.get_config("prefix_lm")
  document = Encoded((t.tokens(np.random.default_rng(0), 1, 5),), "words", "text")
  draws = 3000
  counts = np.bincount(
    [cut_of(arrays(document, config, seed)) for seed in range(draws)], minlength=7
  )
  # T_p is uniform in 0..5; 0 and 1 both look like 1.
  expected = np.array([0, 2, 1, 1, 1, 1, 0]) * draws / 6
  assert np.abs(counts - expected).max() < 5 * np.sqrt(draws / 6)


def test_only_the_suffix_is_predicted():
  config = t.get_config("prefix_lm")
  document = Encoded((t.tokens(np.random.default_rng(0), 1, 9),), "words", "text")
  for seed in range(20):
    out = arrays(document, config, seed)
    cut = cut_of(out)
    predicted = np.flatnonzero(out["lm"]) + 1
    np.testing.assert_array_equal(predicted, np.arange(cut, 10))
    # No slot that predicts has seen its target.
    assert (out["hi"][predicted - 1] <= predicted).all()
  # The same draw again: the layout is a function of its generator.
  for path, values in arrays(document, config, 19).items():
    np.testing.assert_array_equal(values, out[path])


@pytest.mark.parametrize("variant", t.VARIANTS)
def test_no_slot_sees_what_it_predicts(variant):
  config = t.get_config(*variant)
  for layout in t.lay_out(t.documents(0, variant[2]), config):
    stream = find_fusion(config).STREAM
    get = lambda name, layout=layout, stream=stream: layout.arrays.get(f"masks/{stream}/{name}")
    dense = IntervalMask(get("lo"), get("hi"), get("q_class"), get("k_class")).dense()
    weight = layout.arrays[f"streams/{stream}/loss_weights/lm"]
    for slot in np.flatnonzero(weight):
      assert not dense[slot, slot + 1], (layout.key, slot)
    assert weight.sum() > 0


def test_a_prompt_is_prefix_and_an_answer_is_not():
  config = t.get_config("prefix_lm")
  rng = np.random.default_rng(0)
  turns = (t.pixels(rng), t.tokens(rng, 3, 2), t.tokens(rng, 2, 3))
  out = arrays(Encoded(turns, "pairs", "chat"), config)
  np.testing.assert_array_equal(out["hi"], [7] * 7 + list(range(8, 15)))
  np.testing.assert_array_equal(out["lm"], [0] * 6 + [1] * 2 + [0] * 2 + [1] * 3 + [0])
  # A prompt alone, with or without image, is all prefix.
  for parts in (turns[:1] + (t.tokens(rng, 3),), (t.tokens(rng, 3),)):
    out = arrays(Encoded(parts, "pairs", "prompt"), config)
    assert (out["hi"] == len(out["hi"])).all() and not out["lm"].any()


def test_a_prefix_of_one_is_the_causal_language_model():
  config = t.get_config("prefix_lm")
  document = Encoded((t.tokens(np.random.default_rng(0), 1, 5),), "words", "text")
  seed = next(seed for seed in range(99) if cut_of(arrays(document, config, seed)) == 1)
  causal = arrays(document, t.get_config("concat"))
  for path, values in arrays(document, config, seed).items():
    np.testing.assert_array_equal(values, causal[path], err_msg=path)


def test_capacities_and_classes_follow_the_config():
  plain, fans = t.get_config("concat"), t.get_config("concat", fan_out=True)
  module = find_fusion(plain)
  assert module.axes(plain) == {"text": 48, "images": 4, "table": 16, "documents": 48}
  assert "masks/text/q_class" not in module.fields(plain)
  assert {"masks/text/q_class", "masks/text/k_class"} <= set(module.fields(fans))
  for config in (plain, fans):
    for layout in t.lay_out(t.documents(0), config):
      assert set(layout.arrays) == set(module.fields(config))
  plain.connector.name = "pool"
  assert len(module.rows(plain)) == 1 and module.axes(plain)["table"] == 4


def test_losses_ignore_unpredicted_targets():
  config = t.get_config("concat")
  params, documents = t.noise_params(config), t.documents(0)
  flat, _ = t.pack(t.lay_out(documents, config), config)
  loss, _ = t.value_and_grad(config, params, flat)
  other = dict(flat)
  silent = flat["streams/text/loss_weights/lm"] == 0
  targets = flat["streams/text/targets"]
  other["streams/text/targets"] = np.where(silent, (targets + 5) % t.VOCAB, targets)
  assert loss == t.value_and_grad(config, params, other)[0]
  other["streams/text/targets"] = (targets + 5) % t.VOCAB
  assert loss != t.value_and_grad(config, params, other)[0]
  weights = find_fusion(config).weights(from_flat(flat), config)["lm"]
  predicted = [
    sum(int(part.loss.sum()) for document in documents if document.source == name
        for part in document.parts if isinstance(part, Tokens))
    for name in ("pairs", "words")
  ]
  np.testing.assert_array_equal(weights, predicted)


def refused(words, config, document):
  with pytest.raises(UsageError, match=words):
    find_fusion(config).layout(document, config, np.random.default_rng(0))


def test_what_cannot_be_is_refused():
  config = t.get_config("concat")
  document = t.documents(0)[0]
  branched = t.documents(0, fan_out=True)[-1]
  refused(r"no config.data.sources.\*.form is 'fan_out'", config, branched)
  refused("did you mean 'words'", config, dataclasses.replace(document, source="word"))
  config.fusion.image_attention = "bidirectonal"
  refused("did you mean 'bidirectional'", config, document)


def test_two_kinds_of_classes_are_refused():
  config = t.get_config("concat", fan_out=True)
  module = find_fusion(config)
  document = t.documents(0, fan_out=True)[-1]
  slots = module.write_slots(document, module.rows(config))
  mask = IntervalMask(np.zeros(len(slots), np.int32), np.arange(1, len(slots) + 1),
                      q_class=slots.image, k_class=slots.image)
  with pytest.raises(ValueError, match="strategy's own classes and fan-out branches"):
    module.assemble(document, slots, mask, config)


def test_a_prompt_of_no_source_is_laid_out():
  config = t.get_config("concat")
  out = arrays(dataclasses.replace(t.documents(0)[0], source=""), config)
  assert not out["source_ids"].any()
