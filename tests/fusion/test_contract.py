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

from tests.fusion import contrast
from tests.fusion import testing as t
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Encoded, Pixels, Tokens
from vlm_jax.core.fusion import find_fusion, speaking
from vlm_jax.core.layout import IGNORE, streams_of
from vlm_jax.core.mask import IntervalMask, draw
from vlm_jax.core.tree import flatten

TOLERANCE = 2e-6  # of the largest logit
LOUD = 100
GRAD_TOLERANCE = 2e-5

variants = pytest.mark.parametrize(
  "variant", t.VARIANTS, ids=lambda v: "-".join(str(part) for part in v if part)
)
fan_outs = pytest.mark.parametrize(
  "variant", [v for v in t.VARIANTS if v[2]], ids=lambda v: "-".join(str(p) for p in v if p)
)


# One variant a strategy, where what is tested does not depend on its layout.
ones = pytest.mark.parametrize(
  "variant", [t.VARIANTS[0], ("prefix_lm", None, True), ("simvlm", None, True),
              ("llava_next", "causal", True), ("flamingo", "last", True)], ids=lambda v: v[0]
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
  # Those that embed keep the promises that apply to them in test_contrast.py, and who speaks for
  # them in a file of its own.
  embed = [contrast.get_config(name) for name in contrast.NAMES]
  voices = {speaking(config).fusion.name for config in embed}
  assert files == {name for name, _, _ in t.VARIANTS} | set(contrast.NAMES) | voices


# 1. Packed logits are those of each document alone.


@variants
def test_packed_is_alone(variant, made):
  config, params, documents, flat, where, out = made(variant)
  assert {row for row, _ in where.values()} == {0, 1}
  assert t.alone_error(config, params, documents, where, out) < TOLERANCE
  # Twin: one slot too many to the left, so every document also sees the end of the one before it.
  for path in (f"masks/{name}/lo" for name in t.heard_masks(config)):
    leaked = t.logits(config, params, dict(flat, **{path: np.maximum(flat[path] - 1, 0)}))
    assert t.alone_error(config, params, documents, where, leaked) > LOUD * TOLERANCE, path


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


def closure(masks: dict[str, IntervalMask], config) -> np.ndarray:
  """bool[B,T,n]: which of the slots of all streams, and behind them of the rows of a media table
  that is read, the logits of slot i depend on, itself included.

  Streams are computed one after the other, in the order of the fields, and a later one sees an
  earlier one as it is after its last layer. Those behind the one that speaks are not heard by it.
  """
  step = t.joined(masks, config, table_rows(config))
  unread = np.zeros((*step.shape[:-2], step.shape[-1] - step.shape[-2], step.shape[-1]), bool)
  step = np.concatenate([step, unread], axis=-2) | np.eye(step.shape[-1], dtype=bool)
  reach = np.broadcast_to(np.eye(step.shape[-1], dtype=bool), step.shape)
  start, speaks = 0, find_fusion(config).STREAM
  for stream in streams_of(find_fusion(config).fields(config)):
    mine = slice(start, start := start + masks[stream].num_queries)
    layers = config.llm.encoder_depth if stream == "encoder" else config.llm.depth
    for _ in range(layers):
      # Only this stream's rows change: first they see each other, then what other streams are.
      own = reach.copy()
      own[:, mine] = step[:, mine, mine] @ reach[:, mine]
      others = step[:, mine].copy()
      others[:, :, mine] = np.eye(mine.stop - mine.start, dtype=bool)
      own[:, mine] = others @ own
      reach = own
    if stream == speaks:
      return reach[:, mine]


def table_rows(config) -> int:
  """Rows of the media table that a mask has for keys."""
  return find_fusion(config).axes(config)["table"] if t.reads_table(config) else 0


def influence(config, params, flat, out) -> np.ndarray:
  """bool[B,T,n]: [b, i, j] whether the logits of slot i change when the input of slot j does; that
  of a row of the media table is the image it is made of."""
  result = []
  for stream in streams_of(find_fusion(config).fields(config)):
    fill, tokens = f"streams/{stream}/fill", f"streams/{stream}/tokens"
    for slot in range(flat[tokens].shape[1]):
      other = flat | {path: flat[path].copy() for path in (fill, tokens)}
      # An image slot becomes a token slot: its neighbours in the image keep their features.
      other[fill][:, slot] = IGNORE
      other[tokens][:, slot] = (other[tokens][:, slot] + 7) % t.VOCAB
      result.append((t.logits(config, params, other) != out).any(-1))
  images = "media/images/values"
  for image in range(flat[images].shape[1] * t.reads_table(config)):
    other = flat | {images: flat[images].copy()}
    other[images][:, image] = 255 - other[images][:, image]
    changed = (t.logits(config, params, other) != out).any(-1)
    result += [changed] * len(find_fusion(config).rows(config))
  return np.stack(result, axis=-1)


@variants
def test_influence_is_the_closure_of_the_mask(variant, made):
  config, params, _, flat, _, out = made(variant)
  got = influence(config, params, flat, out)
  masks = from_flat(flat).masks
  np.testing.assert_array_equal(got, closure(masks, config))
  # Twin: one more key to the right is noticed.
  for name in t.heard_masks(config):
    mask = masks[name]
    off = dataclasses.replace(mask, hi=np.where(mask.hi > mask.lo, mask.hi + 1, mask.hi))
    assert (got != closure({**masks, name: off}, config)).any(), name


# 4. The picture in the docstring is the mask.


def picture_document(labels: str) -> Encoded:
  """The document of a picture's labels: i image, n its newline, s c d predicted, a b c d branches.

  e is an image of one slot, whose rows of the media table are x, y: they are no slots. > is the
  start of a decoder, or a class token with padding z before it, which no document contains;
  branches come one after the other.
  """
  rng, parts, index = np.random.default_rng(0), [], 0
  labels = re.sub("[>xyz]", "", labels)
  branches = {"a": 1, "b": 2}
  if "c" in labels:
    branches |= {"c": 1, "d": 2}
  while index < len(labels):
    label = labels[index]
    if label == "e":
      parts.append(t.pixels(rng))
      index += 1
      continue
    if label == "i":
      parts.append(t.pixels(rng))
      index += t.K
      index += labels[index : index + 1] == "n"
      continue
    predicted = label in "scd"
    parts.append(Tokens(np.array([1], np.int32), np.array([predicted]), branches.get(label, 0)))
    index += 1
  parts.sort(key=lambda part: getattr(part, "branch", 0))
  return Encoded(tuple(parts), "pairs", "picture")


def pictures(text: str) -> list[tuple[str, str]]:
  """(labels, picture) of every picture in a docstring; pictures may stand side by side."""
  found = []
  lines = text.splitlines()
  for number, line in enumerate(lines):
    for match in re.finditer(r"(?<=  )[a-z]( [a-z>])+(?=  |$)", line):
      labels = match.group().replace(" ", "")
      rows = lines[number + 1 : number + 1 + len(re.sub("[xy]", "", labels))]
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
           if ("a" in labels) == fan_out and "z" not in labels]  # padding: in test_coca.py
  matches = []
  for labels, image in drawn:
    layout = t.lay_out([picture_document(labels)], config)[0]
    masks = from_flat({path: values for path, values in layout.arrays.items()
                       if path.startswith("masks/")}).masks
    table = layout.sizes["table"] * t.reads_table(config)
    matches.append(draw(t.joined(masks, config, table), labels) == image)
  drawn_for = [others for others, branched in t.STRATEGIES[name].says if branched == fan_out]
  if fan_out:
    del drawn_for[1:]  # branches are drawn for causal images alone
  assert matches == [attends == others for others in drawn_for]


# 5. The blocked kernel is the dense oracle; on every layout, gradients included.


@pytest.mark.parametrize("name, implementation", [("prefix_lm", "xla"), ("simvlm", "xla")])
def test_kernels_are_the_oracle(name, implementation, made):
  variant = (name, None, True)
  config, params, _, flat, _, _ = made(variant)
  got = {}
  for chosen in ("dense", implementation):
    config = t.get_config(*variant)
    config.attention.implementation = chosen
    got[chosen] = t.value_and_grad(config, params, flat)
  assert t.error(got[implementation], got["dense"]) < GRAD_TOLERANCE
  # Twins: the oracle of each mask without classes.
  for path in (path for path in flat if path.endswith("/q_class")):
    other = t.value_and_grad(t.get_config(*variant), params,
                             dict(flat, **{path: np.zeros_like(flat[path])}))
    assert t.error(got[implementation], other) > LOUD * GRAD_TOLERANCE, path


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
    assert t.alone_error(config, params, content, where, out) < TOLERANCE


@ones
def test_gradients_of_rows_of_one_kind(variant, made):
  config, params, documents = made(variant)[:3]
  text, rng = documents[0], np.random.default_rng(3)
  images = Encoded(tuple(t.pixels(rng) for _ in range(4)), "pairs", "images")
  loss, grads = t.value_and_grad(config, params, t.pack(t.lay_out([text], config), config)[0])
  assert np.isfinite(loss)
  # Text alone: no gradient reaches the image side, and what reaches the rest is finite. Gated
  # layers are on both sides: what they do to text is in test_flamingo.py.
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  images_only = [part for part in grads if part not in ("llm", "bridge")]
  assert {"tower", "connector"} <= set(images_only)
  assert not any(np.any(leaf) for part in images_only for leaf in jax.tree.leaves(grads[part]))
  loss, grads = t.value_and_grad(config, params, t.pack(t.lay_out([images], config), config)[0])
  assert loss == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


# 7. Micro-batches add up to the big batch.


@ones
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


@pytest.mark.parametrize("meshes, oks", [
  pytest.param((), 5, id="one"),
  # As many programs for eight devices as meshes, optimized with --full.
  pytest.param(("--all",), 20, id="all", marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
def test_eight_devices_are_one(meshes, oks):
  script = Path(__file__).with_name("eight_devices.py")
  command = [sys.executable, str(script), *meshes]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  assert done.stdout.count("ok") == oks, done.stdout


# 9 is in test_cache.py.


# 12. A gradient reaches exactly the parameters that a stage trains.


@ones
def test_gradients_reach_the_stage(variant, made):
  config, params, _, flat, _, _ = made(variant)
  _, grads = t.value_and_grad(config, params, flat)
  reached = {path: bool(np.any(leaf)) for path, leaf in flatten(grads).items()}
  # Softmax does not see what all keys share: only a bias of keys gets no gradient.
  assert all(path.endswith(t.SILENT) for path, there in reached.items() if not there)
  stages = find_fusion(config).STAGES
  assert stages[0].name == "all"
  for stage in stages:
    trained = {path for path in reached
               if any(re.fullmatch(pattern, path) for pattern in stage.trainable)}
    parts = {path.split("/")[0] for path in trained}
    # The strategy's own rows and layers train with the connector.
    learned = {"newline", "bridge", "new_embed"} & set(grads)
    assert parts == {"all": set(grads), "projector": {"connector"},
                     "bridge": {"connector"},
                     "finetune": {"connector", "llm"}}[stage.name] | learned
    assert trained == {path for path in reached if path.split("/")[0] in parts}


# Fan-out: every branch is answered as if it had been asked alone.


@fan_outs
def test_branches_are_asked_alone(variant, made):
  config, params, documents, flat, where, out = made(variant)
  document = documents[-1]
  assert document.branched
  trunk = [p for p in document.parts if isinstance(p, Pixels) or p.branch == 0]
  row, slots = where[document.key]
  classes = f"masks/{find_fusion(config).STREAM}/q_class"
  worst, seen = 0.0, 0
  ignored = {}  # twins: the classes of one mask ignored
  leaked = {path: t.logits(config, params, dict(flat, **{path: np.zeros_like(flat[path])}))
            for path in flat if path.endswith("/q_class")}
  for part in document.parts[len(trunk):]:
    single = Encoded((*trunk, dataclasses.replace(part, branch=1)), "pairs", "single")
    one = t.alone(t.lay_out([single], config)[0], config)
    expected = t.logits(config, params, one)[0, one[classes][0] == 1]
    mine = slots.start + np.flatnonzero(flat[classes][row, slots] == part.branch)
    seen += len(mine)
    worst = max(worst, t.error(out[row, mine], expected))
    for path, logits in leaked.items():
      ignored[path] = max(ignored.get(path, 0.0), t.error(logits[row, mine], expected))
  assert seen == (flat[classes][row, slots] > 0).sum() > 3
  assert worst < TOLERANCE
  assert all(one > LOUD * TOLERANCE for one in ignored.values()), ignored
