"""Files of numbers: rows of steps that are done again go, everything else stays to the byte."""

import io
import json

import numpy as np
import pytest

from tests.fusion import contrast
from tests.fusion import testing as tiny
from tests.train import tiny_fusion
from vlm_jax.cli import plan
from vlm_jax.configs import base
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.mesh import make_mesh
from vlm_jax.train import metrics, trackers
from vlm_jax.train import state as state_lib


def test_rows_behind_the_checkpoint_are_cut(config, tmp_path):
  writer = metrics.Writer(config, tmp_path, 0)
  for step in range(1, 5):
    writer.metrics(step, {"loss": step / 3})
    writer.timing(step, {"step_seconds": 0.1})
  writer.close()
  whole = (tmp_path / "metrics.jsonl").read_bytes()
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 5, "lo')  # killed while writing
  writer = metrics.Writer(config, tmp_path, 2)
  assert [row["step"] for row in trackers.read(tmp_path / "metrics.jsonl")] == [1, 2]
  assert [row["step"] for row in trackers.read(tmp_path / "timing.jsonl")] == [1, 2]
  for step in (3, 4):
    writer.metrics(step, {"loss": step / 3})
  writer.close()
  assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_checksum_sees_every_bit_and_name():
  flat = {"a": np.arange(6, dtype=np.int32), "b": np.zeros((2, 2), np.uint8)}
  value = metrics.checksum(flat)
  assert metrics.checksum({"b": flat["b"], "a": flat["a"]}) == value
  changed = flat["b"].copy()
  changed[1, 1] = 1
  assert metrics.checksum(flat | {"b": changed}) != value
  assert metrics.checksum({"a": flat["a"], "c": flat["b"]}) != value


def test_work_of_empty_slots(config):
  _, leaves = state_lib.initializer(tiny_fusion, config)
  shapes = state_lib.abstract_batch(tiny_fusion, config, make_mesh(config))
  work = metrics.Work(config, leaves, shapes)
  assert work.slots == {"tokens/text": 96, "images/images": 16}
  full = work.fills({"tokens/text": 96, "images/images": 16})
  assert full["flops_empty_share"] == 0 and full["fill/tokens/text"] == 1
  half = work.fills({"tokens/text": 48, "images/images": 8})
  assert abs(half["flops_empty_share"] - 0.5) < 1e-12
  assert work.attention({"text": 10.0}) == 10 * 3 * 4 * config.llm.width * config.llm.depth


def test_work_of_two_streams_and_a_stem():
  config = base.get_config()
  config.tower.update(name="resnet", image_size=32, width=4, depths=(1, 2), norm="group")
  config.connector.name = "linear"
  config.llm.update(name="encoder_decoder", width=8, heads=2, kv_heads=2, mlp=16, depth=1,
                    encoder_depth=3, vocab_size=32, positions=16)
  config.fusion.name = "simvlm"
  config.data.update(rows=2, tokens=40, decoder_tokens=20, images=3)
  config.data.sources.pairs = base.source(name="pairs")
  module = find_fusion(config)
  _, leaves = state_lib.initializer(module, config)
  work = metrics.Work(config, leaves, state_lib.abstract_batch(module, config, make_mesh(config)))
  assert work.slots == {"tokens/encoder": 80, "tokens/decoder": 40, "images/images": 6}
  share = lambda **used: 1 - work.fills(
    {"tokens/encoder": used.get("encoder", 0), "tokens/decoder": used.get("decoder", 0),
     "images/images": used.get("images", 0)})["flops_empty_share"]
  d, f, total = 8, 16, work.dense()
  norms = lambda count: count * d
  encoder = 3 * (4 * d * d + 3 * d * f + norms(2)) + d
  decoder = 6 * d * d + 3 * d * f + norms(3) + d  # the cross keys and values are the encoder's
  assert share(encoder=80) * total == pytest.approx(6 * 80 * (encoder + 2 * d * d))
  assert share(decoder=40) * total == pytest.approx(6 * 40 * decoder)
  # A convolution of the stem costs its kernel at every place it is applied to.
  conv = 16**2 * (49 * 3 * 4 + 8)  # and its norm
  first = 8**2 * (4 * 4 + 9 * 16 + 2 * 4 * 16 + 8 + 8 + 64)
  second = 8**2 * (16 * 8 + 16) + 4**2 * (9 * 64 + 8 * 32 + 16 * 32 + 16 + 64 + 64)
  third = 4**2 * (32 * 8 + 9 * 64 + 8 * 32 + 16 + 16 + 64)
  connector = 4**2 * (32 * d + d)
  want = 6 * 6 * (conv + first + second + third + connector)
  assert share(images=6) * total == pytest.approx(want)
  pair = 3 * 4 * d
  assert work.attention({"encoder": 5.0, "decoder": 7.0, "cross": 2.0}) == pair * (5 * 3 + 9)


def work_of(config):
  """The Work of a config, and a function of a kind of slots to the FLOPs of one of them."""
  module = find_fusion(config)
  _, leaves = state_lib.initializer(module, config)
  work = metrics.Work(config, leaves, state_lib.abstract_batch(module, config, make_mesh(config)))
  none = dict.fromkeys(work.slots, 0)
  share = lambda name: 1 - work.fills(none | {name: work.slots[name]})["flops_empty_share"]
  return work, lambda name: share(name) * work.dense() / work.slots[name]


def vit(depth):
  """Parameters of a tower of `depth` blocks at every place: width 24, mlp 40, patches of 48."""
  return 48 * 24 + 24 + depth * (4 * (24 * 24 + 24) + 2 * 24 * 40 + 40 + 24 + 4 * 24)


def test_work_of_a_resampler_and_a_bridge():
  config = tiny.get_config("flamingo", "last")
  config.tower.update(feature_layer=-2, post_norm=False)  # of two blocks one is read
  config.connector.update(latents=3)
  config.bridge.update(every=2, first=1, heads=3, head_dim=5)
  work, flops = work_of(config)
  # Four patches, three latents that are keys too, two heads of 6 channels, rows of 24.
  keys = 2 * 24 * 12 * (4 + 3) + 2 * 24 * 4
  latents = 3 * (2 * 24 * 12 + 2 * 24 * 20 + 3 * 2 * 24)
  table = 3 * 2 * 24 * 15  # keys and values of the one gated layer
  assert flops("images/images") == pytest.approx(6 * (4 * vit(1) + keys + latents + table))
  gated = 2 * 32 * 15 + 2 * 32 * 40 + 2 * 2 * 32 + 2
  own = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32
  assert flops("tokens/text") == pytest.approx(6 * (gated + own))
  # Twice the language model's attention to text, once the bridge's to the table.
  assert work.attention({"text": 10.0, "media": 7.0}) == 12 * (10 * 2 * 32 + 7 * 1 * 15)
  assert plan.kernels(config)["media"]["heads"] == 3
  # With videos a frame has features, an item latents and rows; there are as many places of each.
  config.data.frames = config.connector.frames = 2
  other, flops = work_of(config)
  assert other.slots == work.slots | {"items/images": work.slots["images/images"]}
  assert other.dense() == pytest.approx(work.dense())
  of_features = 4 * (vit(1) + 2 * 24 * 12 + 2 * 24)
  assert flops("images/images") == pytest.approx(6 * of_features)
  assert flops("items/images") == pytest.approx(6 * (2 * 24 * 12 * 3 + latents + table))


def q_former(features, queries, words):
  """Parameters of the tests' Q-Former times the places they are applied to: width 18, mlp 24."""
  square, norm, mlp = 18 * 18 + 18, 2 * 18, 2 * 18 * 24 + 24 + 18
  both = (queries + words) * (norm + 2 * (4 * square + norm))
  cross = features * 2 * (24 * 18 + 18) + queries * (2 * square + norm)
  return both + cross + (queries + words) * 2 * (mlp + norm)


def test_work_of_a_q_former():
  config = tiny.get_config("blip2")
  config.tower.update(post_norm=False)
  config.connector.update(latents=3)
  _, flops = work_of(config)
  want = 4 * vit(2) + q_former(4, 3, 0) + 3 * (18 * 32 + 32)
  assert flops("images/images") == pytest.approx(6 * want)


def test_work_of_a_q_former_that_reads():
  config = contrast.get_config("blip2_qformer")
  config.tower.update(post_norm=False)
  config.connector.update(latents=3)
  _, flops = work_of(config)
  # Itself and three times more with a text; a text is also said.
  want = 4 * vit(2) + 4 * q_former(4, 3, 0) + 3 * (18 * 20 + 20) + 9 * (18 * 2 + 2)
  assert flops("images/images") == pytest.approx(6 * want)
  length = contrast.LENGTH
  spelled = 5 * (q_former(0, 0, length)) + length * (18 * 18 + 18 + 2 * 18)
  head = length * (tiny.VOCAB * 18 + tiny.VOCAB)
  assert flops("texts/captions") == pytest.approx(6 * (spelled + head + 18 * 20 + 20))


def test_work_of_two_halves_and_poolers():
  config = contrast.get_config("coca")
  config.tower.update(post_norm=False)
  config.connector.update(latents=3)
  config.llm.update(encoder_depth=1)
  work, flops = work_of(config)
  pooler = lambda wide, features, queries: (
    features * (2 * (wide * 32 + 32) + 2 * wide) + queries * (2 * (32 * 32 + 32) + 2 * 32))
  rows = 3 * 2 * 2 * (32 * 32 + 32)  # keys and values of two layers
  want = 4 * vit(2) + pooler(24, 4, 3) + pooler(32, 3, 1) + 32 * 20 + rows
  assert flops("images/images") == pytest.approx(6 * want)
  first = 4 * (32 * 32 + 32) + 2 * 32 * 48 + 32 + 48 + 2 * 2 * 32
  second = 2 * (first + 2 * (32 * 32 + 32) + 2 * 32)
  norms = 2 * 2 * 32
  assert flops("tokens/text") == pytest.approx(6 * (first + second + norms))
  assert flops("tokens/summary") == pytest.approx(6 * (first + norms))
  assert work.attention({"text": 5.0, "cross": 3.0, "reads": 2.0}) == 12 * 32 * (15 + 6 + 2)


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_progress():
  row = {"loss": 1.5, "lr": 1e-3, "grad_norm": 0.5}
  timing = {"step_seconds": 0.2, "data_wait_share": 0.25, "tokens/text/second": 1234.0,
            "token_fill": 0.874}
  plain, terminal = io.StringIO(), Terminal()
  for stream in (plain, terminal):
    progress = metrics.Progress(10, stream)
    progress.step(1, row, timing)
    progress.step(2, row, timing)
    progress.say("hello")
    progress.close()
  lines = plain.getvalue().splitlines()
  assert len(lines) == 3 and "step 2/10" in lines[1] and "data wait 25%" in lines[1]
  assert "1,234 tokens/s" in lines[0] and "fill 87%" in lines[0]
  assert terminal.getvalue().count("\r") == 2 and terminal.getvalue().count("\n") == 2


def test_fill_of_a_stretch():
  batch = lambda *held: {"media/images/segment_ids": np.ones((1, 9)), **{
    f"streams/{name}/{field}": np.pad(np.ones((2, count)), ((0, 0), (0, 10 - count)))
    for name, count in zip(("encoder", "decoder"), held, strict=True)
    for field in ("tokens", "segment_ids")}}
  clock = metrics.Clock()
  for held in ((10, 2), (4, 4)):
    clock.step(0.0, metrics.token_slots(batch(*held)))
  assert clock.row({}, 0.0)["token_fill"] == (12 + 8) / 40
  assert "token_fill" not in clock.row({}, 0.0)


def test_duration():
  assert [metrics.duration(s) for s in (5, 65, 3720)] == ["5s", "1m05s", "1h02m"]


def test_read_of_a_missing_file(tmp_path):
  assert trackers.read(tmp_path / "none.jsonl") == []
  (tmp_path / "x.jsonl").write_text(json.dumps({"step": 1}) + "\n{")
  assert trackers.read(tmp_path / "x.jsonl") == [{"step": 1}]
