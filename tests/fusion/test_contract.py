"""The contract that every strategy passes; numbers refer to the list of promises it implements.

Numerical tests have a twin that breaks what they test: its error must be 100 times the tolerance,
so that no test passes because nothing depends on the thing tested.
"""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.fusion import testing as t
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Encoded, Pixels, Tokens
from vlm_jax.core.fusion import find_fusion
from vlm_jax.core.layout import IGNORE
from vlm_jax.core.mask import IntervalMask

TOLERANCE = 2e-6  # of the largest logit
LOUD = 100
GRAD_TOLERANCE = 2e-5

variants = pytest.mark.parametrize(
  "variant", t.VARIANTS, ids=lambda v: "-".join(str(part) for part in v if part)
)
fan_outs = pytest.mark.parametrize(
  "variant", [v for v in t.VARIANTS if v[2]], ids=lambda v: "-".join(str(p) for p in v if p)
)


@pytest.fixture(scope="module")
def made():
  """All about a variant, made once: config, params, documents, flat batch, places, logits."""
  cache = {}

  def make(variant):
    if variant not in cache:
      config = t.get_config(*variant)
      params = t.noise_params(config)
      documents = t.documents(0, variant[2])
      flat, where = t.pack(t.lay_out(documents, config), config)
      cache[variant] = config, params, documents, flat, where, t.logits(config, params, flat)
    return cache[variant]

  return make


def test_every_strategy_is_tested():
  folder = Path(find_fusion(t.get_config("concat")).__file__).parent
  files = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
  assert files == {name for name, _, _ in t.VARIANTS}


# 1. Packed logits are those of each document alone.


def alone_error(config, params, documents, where, out, change=lambda flat: flat) -> float:
  worst = 0.0
  for layout in t.lay_out(documents, config):
    single = t.logits(config, params, change(t.alone(layout, config)))
    row, slots = where[layout.key]
    worst = max(worst, t.error(out[row, slots], single[0, : layout.sizes["text"]]))
  return worst


@variants
def test_packed_is_alone(variant, made):
  config, params, documents, flat, where, out = made(variant)
  assert {row for row, _ in where.values()} == {0, 1}
  assert alone_error(config, params, documents, where, out) < TOLERANCE
  # Twin: one slot too many to the left, so every document also sees the end of the one before it.
  broken = dict(flat, **{"masks/text/lo": np.maximum(flat["masks/text/lo"] - 1, 0)})
  leaked = t.logits(config, params, broken)
  assert alone_error(config, params, documents, where, leaked) > LOUD * TOLERANCE


# 2. Perturbing one document leaves the others as they are, to the bit.


@variants
def test_other_documents_do_not_change(variant, made):
  config, params, documents, _, where, out = made(variant)
  rng = np.random.default_rng(1)
  for victim in ("words-0", "pairs-0", documents[-1].key):
    changed = [perturbed(d, rng) if d.key == victim else d for d in documents]
    other = t.logits(config, params, t.pack(t.lay_out(changed, config), config)[0])
    for key, (row, slots) in where.items():
      same = np.array_equal(out[row, slots], other[row, slots])
      assert same == (key != victim), key


def perturbed(document: Encoded, rng) -> Encoded:
  def change(part):
    if isinstance(part, Pixels):
      return Pixels(rng.integers(0, 256, part.values.shape).astype(np.uint8))
    ids = (part.ids + rng.integers(1, t.VOCAB - 1, part.ids.shape)) % t.VOCAB
    return dataclasses.replace(part, ids=ids.astype(np.int32))

  return dataclasses.replace(document, parts=tuple(map(change, document.parts)))


# 3. Perturbing a slot changes exactly what the transitive closure of the mask says.


def mask_of(flat: dict) -> IntervalMask:
  return from_flat(flat).masks["text"]


def closure(mask: IntervalMask, layers: int) -> np.ndarray:
  """bool[B,T,T]: the slots that query i depends on after `layers` layers, itself included."""
  dense = np.asarray(mask.dense())
  step = dense | np.eye(dense.shape[-1], dtype=bool)
  reach = step
  for _ in range(layers - 1):
    reach = reach @ step
  return reach


def influence(config, params, flat, out) -> np.ndarray:
  """bool[B,T,T]: [b, i, j] whether the logits of slot i change when the input of slot j does."""
  result = []
  for slot in range(t.SLOTS):
    other = {path: values.copy() for path, values in flat.items()}
    # An image slot becomes a token slot: its neighbours in the image keep their features.
    other["streams/text/fill"][:, slot] = IGNORE
    other["streams/text/tokens"][:, slot] = (other["streams/text/tokens"][:, slot] + 7) % t.VOCAB
    result.append((t.logits(config, params, other) != out).any(-1))
  return np.stack(result, axis=-1)


@variants
def test_influence_is_the_closure_of_the_mask(variant, made):
  config, params, _, flat, _, out = made(variant)
  got = influence(config, params, flat, out)
  np.testing.assert_array_equal(got, closure(mask_of(flat), config.llm.depth))
  # Twin: one more key to the right is noticed.
  mask = mask_of(flat)
  off = dataclasses.replace(mask, hi=np.where(mask.hi > mask.lo, mask.hi + 1, mask.hi))
  assert (got != closure(off, config.llm.depth)).any()


# 4. The picture in the docstring is the mask.


def picture_document(labels: str) -> Encoded:
  """The document of a picture's labels: i image, s c d predicted, a b c d in branches."""
  rng, parts, index = np.random.default_rng(0), [], 0
  branches = {"a": 1, "b": 2}
  if "c" in labels:
    branches |= {"c": 1, "d": 2}
  while index < len(labels):
    label = labels[index]
    if label == "i":
      parts.append(t.pixels(rng))
      index += t.K
      continue
    predicted = label in "scd"
    parts.append(Tokens(np.array([1], np.int32), np.array([predicted]), branches.get(label, 0)))
    index += 1
  return Encoded(tuple(parts), "pairs", "picture")


def pictures(text: str) -> list[tuple[str, str]]:
  """(labels, picture) of every picture in a docstring; pictures may stand side by side."""
  found = []
  lines = text.splitlines()
  for number, line in enumerate(lines):
    for match in re.finditer(r"(?<=  )[a-z]( [a-z])+(?=  |$)", line):
      labels = match.group().replace(" ", "")
      rows = lines[number + 1 : number + 1 + len(labels)]
      if len(labels) < 5 or not all(re.search(r"[1.] [1.]", row) for row in rows):
        continue
      start, stop = match.start() - 2, match.end()
      found.append((labels, "\n".join(row[start:stop] for row in [line, *rows])))
  return found


@variants
def test_docstring_picture_is_the_mask(variant):
  name, attends, fan_out = variant
  config = t.get_config(*variant)
  module = find_fusion(config)
  drawn = [(labels, image) for labels, image in pictures(module.__doc__)
           if ("a" in labels) == fan_out]
  matches = []
  for labels, image in drawn:
    layout = t.lay_out([picture_document(labels)], config)[0]
    mask = IntervalMask(*(layout.arrays.get(f"masks/text/{field}")
                          for field in ("lo", "hi", "q_class", "k_class")))
    matches.append(mask.picture(labels) == image)
  if name == "concat" and not fan_out:
    assert matches == [attends == "causal", attends == "bidirectional"]
  elif attends == "bidirectional":
    assert matches == [False]  # branches are drawn for causal images
  else:
    assert matches == [True]


# 5. The blocked kernel is the dense oracle; on every layout, gradients included.


def test_kernels_are_the_oracle(made):
  variant = t.VARIANTS[5]
  config, params, _, flat, _, _ = made(variant)
  got = {}
  for implementation in ("dense", "xla"):
    config = t.get_config(*variant)
    config.attention.implementation = implementation
    got[implementation] = t.value_and_grad(config, params, flat)
  assert t.error(got["xla"], got["dense"]) < GRAD_TOLERANCE
  # Twin: the oracle of a mask without classes.
  flat = dict(flat, **{"masks/text/q_class": np.zeros_like(flat["masks/text/q_class"])})
  other = t.value_and_grad(t.get_config(*variant), params, flat)
  assert t.error(got["xla"], other) > LOUD * GRAD_TOLERANCE


# 6. Rows without images, rows of only images, empty rows.


@variants
def test_rows_of_one_kind(variant, made):
  config, params, documents, _, _, _ = made(variant)
  rng = np.random.default_rng(3)
  text = documents[0]
  images = Encoded(tuple(t.pixels(rng) for _ in range(4)), "pairs", "images")
  for content in ([text], [images], [text, images]):
    layouts = t.lay_out(content, config)
    flat, where = t.pack(layouts, config)
    out = t.logits(config, params, flat)
    assert alone_error(config, params, content, where, out) < TOLERANCE


@pytest.mark.parametrize("variant", [t.VARIANTS[0], t.VARIANTS[5]], ids=["concat", "prefix_lm"])
def test_gradients_of_rows_of_one_kind(variant, made):
  config, params, documents = made(variant)[:3]
  text, rng = documents[0], np.random.default_rng(3)
  images = Encoded(tuple(t.pixels(rng) for _ in range(4)), "pairs", "images")
  loss, grads = t.value_and_grad(config, params, t.pack(t.lay_out([text], config), config)[0])
  assert np.isfinite(loss)
  # Text alone: no gradient reaches the image side, and what reaches the rest is finite.
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  assert not any(np.any(leaf) for part in ("tower", "connector")
                 for leaf in jax.tree.leaves(grads[part]))
  loss, grads = t.value_and_grad(config, params, t.pack(t.lay_out([images], config), config)[0])
  assert loss == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


# 7. Micro-batches add up to the big batch.


@pytest.mark.parametrize("variant", [t.VARIANTS[0], t.VARIANTS[5]], ids=["concat", "prefix_lm"])
def test_accumulation_is_one_big_batch(variant, made):
  config, params, _, flat, _, _ = made(variant)
  module = find_fusion(config)
  empty = t.batches.empty(module.fields(config), module.axes(config), 2)
  micros = []
  for row in range(2):
    micro = {path: values.copy() for path, values in empty.items()}
    for path in micro:
      micro[path][0] = flat[path][row]
    micros.append(micro)
  whole = t.value_and_grad(config, params, flat)
  scale = lambda weights: np.where(weights > 0, 1 / np.maximum(weights, 1), 0)
  weight = lambda arrays: np.asarray(module.weights(from_flat(arrays), config)["lm"])
  assert (weight(flat) > 0).all()
  np.testing.assert_array_equal(weight(micros[0]) + weight(micros[1]), weight(flat))
  add = lambda parts: jax.tree.map(lambda a, b: a + b, *parts)
  parts = [t.value_and_grad(config, params, micro, scale(weight(flat))) for micro in micros]
  assert t.error(add(parts), whole) < GRAD_TOLERANCE
  # Twin: every micro-batch divided by its own weight.
  parts = [t.value_and_grad(config, params, micro, scale(weight(micro)) / 2) for micro in micros]
  assert t.error(add(parts), whole) > LOUD * GRAD_TOLERANCE


# 8. Eight devices compute what one does.


@pytest.mark.parametrize(
  "meshes, oks", [((), 2), pytest.param(("--all",), 8, marks=pytest.mark.long)], ids=["one", "all"]
)
def test_eight_devices_are_one(meshes, oks):
  script = Path(__file__).with_name("eight_devices.py")
  command = [sys.executable, str(script), *meshes]
  done = subprocess.run(command, capture_output=True, text=True, timeout=500)
  assert done.returncode == 0, done.stdout + done.stderr
  assert done.stdout.count("ok") == oks, done.stdout


# 9 is in test_cache.py.


# 12. A gradient reaches exactly the parameters that a stage trains.


@pytest.mark.parametrize("variant", [t.VARIANTS[0], t.VARIANTS[5]], ids=["concat", "prefix_lm"])
def test_gradients_reach_the_stage(variant, made):
  config, params, _, flat, _, _ = made(variant)
  _, grads = t.value_and_grad(config, params, flat)
  reached = {
    "/".join(str(key.key) for key in path): bool(np.any(leaf))
    for path, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]
  }
  # Softmax does not see what all keys share: only a bias of keys gets no gradient.
  silent = {"tower/layers/attention/key/bias"}
  assert {path for path, there in reached.items() if not there} <= silent
  stages = find_fusion(config).STAGES
  assert stages[0].name == "all"
  for stage in stages:
    trained = {path for path in reached
               if any(re.fullmatch(pattern, path) for pattern in stage.trainable)}
    parts = {path.split("/")[0] for path in trained}
    assert parts == {"all": {"tower", "connector", "llm"}, "projector": {"connector"},
                     "finetune": {"connector", "llm"}}[stage.name]
    assert trained == {path for path in reached if path.split("/")[0] in parts}


# Fan-out: every branch is answered as if it had been asked alone.


@fan_outs
def test_branches_are_asked_alone(variant, made):
  config, params, documents, flat, where, out = made(variant)
  document = documents[-1]
  assert document.branched
  trunk = [p for p in document.parts if isinstance(p, Pixels) or p.branch == 0]
  base = sum(t.K if isinstance(p, Pixels) else len(p.ids) for p in trunk)
  row, slots = where[document.key]
  start = slots.start + base
  worst, ignored = 0.0, 0.0
  classless = dict(flat, **{"masks/text/q_class": np.zeros_like(flat["masks/text/q_class"])})
  leaked = t.logits(config, params, classless)
  for part in document.parts[len(trunk):]:
    single = Encoded((*trunk, dataclasses.replace(part, branch=1)), "pairs", "single")
    expected = t.logits(config, params, t.alone(t.lay_out([single], config)[0], config))[0]
    expected = expected[base : base + len(part.ids)]
    worst = max(worst, t.error(out[row, start : start + len(part.ids)], expected))
    ignored = max(ignored, t.error(leaked[row, start : start + len(part.ids)], expected))
    start += len(part.ids)
  assert start == slots.stop
  assert worst < TOLERANCE
  assert ignored > LOUD * TOLERANCE  # twin: classes ignored
