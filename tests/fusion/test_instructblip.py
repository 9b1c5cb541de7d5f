"""InstructBLIP: which picture is told what. Its packed rows keep the contract beside the others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.fusion import testing as t
from tests.fusion.test_contract import pictures
from vlm_jax.connectors import qformer
from vlm_jax.core.document import Pixels
from vlm_jax.core.errors import UsageError
from vlm_jax.core.layout import TOLD
from vlm_jax.core.tree import flatten
from vlm_jax.fusion import instructblip
from vlm_jax.generate import program
from vlm_jax.train import state as states
from vlm_jax.train.optimizer import make_optimizer


def test_docstring_picture_is_the_q_formers_mask():
  labels, drawn = next(one for one in pictures(instructblip.__doc__) if "q" in one[0])
  rows = [line.split()[1:] for line in drawn.splitlines()[1:]]
  seen = np.array(rows) == "1"
  mask = jax.tree.map(np.asarray, qformer.mask_of_told(jnp.array([2]), 2, 2))
  np.testing.assert_array_equal(seen[:, :4], mask.dense()[0])
  # Of the picture only queries see something: `test_words_see_the_picture_only_through_queries`.
  assert labels == "qqwwxy"
  np.testing.assert_array_equal(seen[:, 4:], np.array([[True], [True], [False], [False]]) * [1, 1])


def test_every_picture_is_told_its_own_words():
  """Other words change the logits that other pixels do, and no others, in packed rows."""
  config = t.get_config("instructblip", None, True)
  params = t.noise_params(config)
  flat, _ = t.pack(t.lay_out(t.documents(0, True), config), config)
  out = t.logits(config, params, flat)
  images = np.argwhere(flat["media/images/segment_ids"] > 0)
  assert len(images) > 3
  changed = set()
  for row, image in images:
    other = {path: flat[path].copy() for path in (TOLD, "media/images/values")}
    told = other[TOLD][row, image]
    told[told >= 0] = (told[told >= 0] + 7) % t.READS
    other["media/images/values"][row, image] = 255 - other["media/images/values"][row, image]
    words, pixels = ((t.logits(config, params, flat | {path: other[path]}) != out).any(-1)
                     for path in (TOLD, "media/images/values"))
    np.testing.assert_array_equal(words, pixels)
    assert words.any()
    changed.add(words.tobytes())
  assert len(changed) == len(images)
  # Room behind the words is not read: it holds nothing, whatever is there.
  wider = np.where(flat[TOLD] < 0, -5, flat[TOLD])
  np.testing.assert_array_equal(t.logits(config, params, flat | {TOLD: wider}), out)


def test_what_nobody_reads_never_trains():
  """Of the bridge exactly what has a gradient trains; words are read but for their last layer."""
  config = t.get_config("instructblip", None, True)
  config.fusion.stage = "bridge"
  config.connector.update(depth=4)
  flat, _ = t.pack(t.lay_out(t.documents(0, True), config), config)
  grads = flatten(t.value_and_grad(config, t.noise_params(config), flat)[1])
  _, leaves = states.initializer(instructblip, config)
  trainable = make_optimizer(config, instructblip.STAGES, leaves).trainable
  silent = 0
  for path, leaf in grads.items():
    if not path.startswith("connector/"):
      continue
    whole = leaf.reshape(2, -1) if path.startswith("connector/layers/") else leaf.reshape(1, -1)
    reached, trains = whole.any(1), np.zeros(len(whole), bool)
    trains |= np.asarray(trainable.get(path, False)).reshape(-1)
    np.testing.assert_array_equal(trains, reached | path.endswith(t.SILENT), err_msg=path)
    silent += (~trains).sum()
  assert silent == 6  # two maps and a norm, each with a bias


def test_fields_that_do_not_go_together():
  for fields, sentence in (
      (dict(connector=dict(vocab_size=0)), "'instructblip' tells a Q-Former words; set"),
      (dict(connector=dict(name="mlp")), "set config.connector.name='qformer'"),
      (dict(data=dict(instruction_tokens=9)), "instruction_tokens is 9, of config.connector.pos")):
    config = t.get_config("instructblip")
    for node, values in fields.items():
      config[node].update(values)
    with pytest.raises(UsageError, match=sentence):
      instructblip.fields(config)


def test_more_words_than_there_is_room_for():
  config = t.get_config("instructblip", None, True)
  document = t.documents(0)[2]
  long = lambda part: (dataclasses.replace(part, words=np.arange(7, dtype=np.int32))
                       if isinstance(part, Pixels) else part)
  document = dataclasses.replace(document, parts=tuple(map(long, document.parts)))
  with pytest.raises(UsageError, match="tells 7 words about a picture but config.data.instr"):
    instructblip.layout(document, config, np.random.default_rng(0))


def test_programs_of_jax_have_no_second_tokenizer(tmp_path):
  with pytest.raises(UsageError, match="'instructblip' reads the prompt by a second tokenizer"):
    program.write(tmp_path, t.get_config("instructblip"), {}, None)


@pytest.mark.parametrize("path, places", [
  ("words", 0), ("layers/layer0/text_mlp/up/kernel", 6), ("project/kernel", t.K),
  ("layers/layer0/attention/query/kernel", t.K + 6), ("layers/layer0/cross/key/kernel", 4)])
def test_words_are_work_of_their_picture(path, places):
  config = t.get_config("instructblip")
  assert instructblip.uses(config, f"connector/{path}") == {"images/images": places}
  assert instructblip.uses(config, "llm/norm/scale") is None
