"""Contract, 9: prefill and extend are the full forward pass, with rows of different lengths."""

import dataclasses

import numpy as np
import pytest

from tests.fusion import testing as t
from vlm_jax.core import layout as layouts
from vlm_jax.core.batch import Batch, Stream, from_flat
from vlm_jax.core.document import Encoded
from vlm_jax.core.fusion import find_fusion, find_llm
from vlm_jax.core.layout import mask_axes
from vlm_jax.core.mask import NEVER

TOLERANCE, LOUD = 2e-6, 100


def ragged(config, fan_out: bool) -> tuple[list, list]:
  """Documents of two rows and their prompts, which lack the last 4 (predicted) tokens."""
  rng = np.random.default_rng(5)
  text = lambda *args: t.tokens(rng, *args)
  heads = [(t.pixels(rng), text(3)), (text(2), t.pixels(rng), t.pixels(rng), text(5))]
  if fan_out:
    heads = [(*head, t.tokens(rng, 3, 1, 1), t.tokens(rng, 2, 0, 2)) for head in heads]
  tail = lambda: t.tokens(rng, 0, 4, 2 if fan_out else 0)
  make = lambda parts, row: Encoded(tuple(parts), "pairs", f"row-{row}")
  prompts = [make(head, row) for row, head in enumerate(heads)]
  full = [make((*head, tail()), row) for row, head in enumerate(heads)]
  return t.lay_out(full, config), t.lay_out(prompts, config)


def extended_error(config, params, columns_are_indices: bool) -> float:
  """The error of the logits of prompts and of the tokens after them, against one full pass."""
  full, prompts = ragged(config, any(s.form == "fan_out" for s in config.data.sources.values()))
  place = lambda layouts: {
    path: np.stack([t.alone(layout, config)[path][0] for layout in layouts])
    for path in t.alone(layouts[0], config)
  }
  flat = place(full)
  expected = t.logits(config, params, flat)
  module = find_fusion(config)
  run = t.forward_cached(module.Model, t.same_network(config))
  speaks, lengths = module.STREAM, np.array([layout.sizes[module.STREAM] for layout in prompts])
  batch, whole = from_flat(place(prompts)), from_flat(flat)
  slots, new = batch.streams[speaks].tokens.shape[1], 4
  k_index = np.full((2, slots + new), NEVER, np.int32)
  for row, length in enumerate(lengths):
    k_index[row, :length] = np.arange(length)
    k_index[row, slots:] = length + np.arange(new)
  if columns_are_indices:
    k_index[:, slots:] = slots + np.arange(new)
  k_class, later = None, whole.masks[speaks].k_class
  if later is not None:
    tail = [later[row, length : length + new] for row, length in enumerate(lengths)]
    k_class = np.concatenate([batch.masks[speaks].k_class, tail], axis=1)

  own = dataclasses.replace(batch.masks[speaks], k_index=k_index, k_class=k_class)
  batch = dataclasses.replace(batch, masks={**batch.masks, speaks: own})
  cache = find_llm(config).empty_cache(config.llm, 2, slots + new, np.float32)
  output = run(params, batch, cache)
  worst = 0.0
  for row, length in enumerate(lengths):
    worst = max(worst, t.error(output.logits()[row, :length], expected[row, :length]))
  asks = [name for name, (queries, _) in mask_axes(module.fields(config)).items()
          if queries == speaks]
  for step in range(new):
    here = (lengths + step)[:, None]
    at = lambda field, here=here: None if field is None else np.take_along_axis(
      np.asarray(field), here, axis=1)
    masks = {name: dataclasses.replace(mask, lo=at(mask.lo), hi=at(mask.hi),
                                       q_class=at(mask.q_class))
             for name, mask in whole.masks.items() if name in asks}
    masks[speaks] = dataclasses.replace(masks[speaks], k_class=k_class, k_index=k_index)
    text = whole.streams[speaks]
    stream = Stream(at(text.tokens), at(text.fill), at(text.positions), at(text.segment_ids),
                    at(text.source_ids))
    output = run(params, Batch({speaks: stream}, {}, masks), output.cache)
    got = np.asarray(output.logits())[:, 0]
    worst = max(worst, t.error(got, expected[np.arange(2), here[:, 0]]))
  return worst


@pytest.mark.parametrize("variant", [
  v for v in t.VARIANTS if v[2] or not any(fans for _, fans in t.STRATEGIES[v[0]].says)])
def test_prefill_and_extend_is_the_full_pass(variant):
  config = t.get_config(*variant)
  params = t.noise_params(config)
  assert extended_error(config, params, columns_are_indices=False) < TOLERANCE
  # Twin: the column of a new token taken for its index, which forgets that prompts are ragged.
  assert extended_error(config, params, columns_are_indices=True) > LOUD * TOLERANCE


@pytest.mark.parametrize("variant", t.VARIANTS)
def test_a_prompt_is_laid_out_as_in_training(variant):
  config = t.get_config(*variant)
  module = find_fusion(config)
  heard = layouts.heard(module.fields(config), module.STREAM)
  for full, prompt in zip(*ragged(config, variant[2]), strict=True):
    for path, values in prompt.arrays.items():
      if path.endswith(("targets", "lm")) or path not in heard:
        continue  # what is not there yet is not predicted, and what it is compared by not written
      np.testing.assert_array_equal(values, full.arrays[path][: len(values)], err_msg=path)
