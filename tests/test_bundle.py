"""`vlm_jax.load`: what a bundle says is what training and evaluation compute, from wherever."""

import dataclasses
import io
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from PIL import Image as PIL

import vlm_jax
from tests.data.broken_source import png
from tests.evals.conftest import SOURCE, setup  # noqa: F401 (prepared data and a tiny model)
from tests.fusion import contrast
from tests.fusion import testing as t
from vlm_jax.configs import base
from vlm_jax.core.batch import from_flat
from vlm_jax.core.document import Document, Image, Text, Video
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.core.fusion import speaking
from vlm_jax.core.tree import flatten, unflatten
from vlm_jax.data import images, pipeline, template
from vlm_jax.data.pack import Packer
from vlm_jax.evals import likelihood
from vlm_jax.evals.run import evaluate
from vlm_jax.fusion import blip2_itg
from vlm_jax.generate.sampling import Sampling
from vlm_jax.train import checkpoint_tools

TOLERANCE = 2e-5  # of logits and log-probabilities, whose measured errors are below 4e-7
RECIPE = """from tests.generate.helpers import tiny
from vlm_jax.configs import base

def get_config(arg=""):
  config = tiny()
  config.llm.vocab_size = 270
  config.data.root = {root!r}
  config.data.sources.pictures = base.source(name="tests.evals.tiny_source", form="fan_out")
  config.train.compilation_cache = {cache!r}
  config.fusion.init = arg
  return config
"""


@pytest.fixture(scope="module")
def run(setup, tmp_path_factory):  # noqa: F811
  """A run directory of two checkpoints, in which the second is another model."""
  config, params = setup
  folder = tmp_path_factory.mktemp("runs") / "run"
  config = config.copy_and_resolve_references()
  config.train.compilation_cache = str(folder.parent / "cache")
  checkpoint_tools.write_run(folder, config.to_json(), 3, params, {})
  other = jax.tree.map(lambda leaf: leaf * 1.5, params)
  checkpoint_tools.write_run(folder, config.to_json(), 4, other, {})
  return folder


@pytest.fixture(scope="module")
def bundle(run):
  return vlm_jax.load(run, step=3, outside=True)


@pytest.fixture(scope="module")
def recipe(setup, tmp_path_factory):  # noqa: F811
  path = tmp_path_factory.mktemp("recipe") / "recipe.py"
  path.write_text(RECIPE.format(root=setup[0].data.root, cache=str(path.parent / "cache")))
  return path


def same(a, b):
  a, b = flatten(a), flatten(b)
  return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def test_a_run_is_opened_by_its_directory_or_a_checkpoint(setup, run, bundle):  # noqa: F811
  assert bundle.step == 3 and same(bundle.params, setup[1])
  newest = vlm_jax.load(run, outside=True)
  assert newest.step == 4 and not same(newest.params, setup[1])
  one = vlm_jax.load(run / "checkpoints" / "3", outside=True)
  assert one.step == 3 and same(one.params, setup[1])
  assert one.module.__name__ == "vlm_jax.fusion.prefix_lm" and one.config.is_locked
  assert one.tokenizer.vocab_size == 270


@pytest.fixture(scope="module")
def split(bundle):
  """The documents of a split with their answers, plain and fan-out."""
  opened = [pipeline.documents(bundle.config, name, "test", form)
            for name, form in (("words", "text"), ("pictures", "fan_out"))]
  return [one[index] for one in opened for index in range(3)]


def test_scores_are_those_of_the_evaluation(setup, bundle, run):  # noqa: F811
  other = vlm_jax.load(run, outside=True)
  config = setup[0].copy_and_resolve_references()
  config.evals.look = base.evaluation(kind="perplexity", source="pictures", form="fan_out",
                                      split="test", batch=3, controls=())
  for name in ("read", "look"):
    entry = config.evals[name]
    want = evaluate(config, bundle.params, None, names=[name])[name]
    documents = pipeline.documents(config, entry.source, "test", entry.form or "text")
    # The fourth is damaged: its number is drawn from all the same.
    some = [documents[index if index != 3 else 0] for index in range(len(documents))]
    def error(asked, documents=some, want=want):
      scores = asked.score(documents)
      scores.pop(3)
      log_p = np.concatenate([one.log_probs for one in scores]).astype(np.float64)
      assert len(log_p) == want["tokens"] > 20
      return abs(-log_p.mean() - want["loss"]) / want["loss"]

    found = error(bundle)
    print(f"{name}: loss within {found:.1e}")
    assert found < TOLERANCE < error(other) / 100


def test_scores_are_of_the_logits(bundle, split):
  logits, scores = bundle.logits(split), bundle.score(split)
  for layout, one, score in zip(bundle._layouts(split), logits, scores, strict=True):
    assert one.shape[1] == 270 and np.isfinite(one).all() and one.std() > 0.1
    assert score.log_prob == pytest.approx(score.log_probs.sum(), abs=1e-4)
    weight = layout.arrays["streams/text/loss_weights/lm"] > 0
    by_hand = np.asarray(jax.nn.log_softmax(one))[weight, list(score.tokens)]
    off = np.asarray(jax.nn.log_softmax(one))[np.roll(weight, 1), list(score.tokens)]
    error = lambda log_p, score=score: np.abs(log_p - score.log_probs).max() / np.abs(log_p).max()
    print(f"score and logits within {error(by_hand):.1e}")
    assert error(by_hand) < TOLERANCE < error(off) / 100


def test_packed_is_alone(bundle, split):
  """All documents in one row against each in its own."""
  config, module = bundle.config, bundle.module
  layouts, alone = bundle._layouts(split), bundle.logits(split)

  def error(change):
    packer = Packer(module.fields(config), module.axes(config) | {"images": 4}, 1)
    assert packer.add(layouts)
    flat = packer.build().arrays
    change(flat)
    packed = np.asarray(likelihood.logits(FrozenConfigDict(config), bundle.params, flat))[0]
    start, worst = 0, 0.0
    for layout, want in zip(layouts, alone, strict=True):
      got = packed[start : start + len(want)]
      worst = max(worst, float(np.abs(got - want).max() / np.abs(want).max()))
      start += layout.sizes["text"]
    return worst

  def leak(flat):
    flat["masks/text/lo"][:] = 0

  found = error(lambda flat: None)
  print(f"packed and alone within {found:.1e}")
  assert found < TOLERANCE < error(leak) / 100


def test_answers_do_not_depend_on_their_batch(bundle, split):
  ask = [bundle.question("what is it?", [png(1, 16)]), split[3], bundle.question("why", []),
         Document((Image(png(2, 16)), Text("red?", "user"), Text("yes", "assistant", loss=True),
                   Text("why", "user")), "", "chat")]
  options = dict(max_tokens=5, sampling=Sampling(temperature=2.0, seed=7))
  together = bundle.generate(ask, rows=4, **options)
  assert [len(one) for one in together] == [1, len(split[3].parts) // 2, 1, 1]
  by_twos = bundle.generate(ask, rows=2, **options)
  for a, b in zip(together, by_twos, strict=True):
    assert [(x.text, x.tokens, x.stopped) for x in a] == [(x.text, x.tokens, x.stopped) for x in b]
  assert together != bundle.generate(ask, rows=4, max_tokens=5,
                                     sampling=Sampling(temperature=2.0, seed=8))
  pieces = []
  whole = bundle.generate(ask[3:], max_tokens=5)
  assert bundle.generate(ask[3:], max_tokens=5, write=pieces.append) == whole
  assert "".join(pieces) == whole[0][0].text
  # The answer it has already is not read.
  said = Document((*ask[3].parts, Text("no such thing", "assistant", loss=True)), "", "said")
  assert bundle.generate([said], max_tokens=5)[0][0].tokens == whole[0][0].tokens
  assert bundle.slots(ask[3]) == bundle.slots(said) == whole[0][0].prompt_tokens
  with pytest.raises(UsageError, match="2 documents cannot be written out at once"):
    bundle.generate(ask[:2], write=pieces.append)
  with pytest.raises(UsageError, match="open turns, which cannot be written out"):
    bundle.generate(split[5:6], write=pieces.append)


def odd(kind):
  """A JPEG that lies on its side, a palette, transparency."""
  rng, file = np.random.default_rng(3), io.BytesIO()
  picture = PIL.fromarray(rng.integers(0, 256, (20, 36, 4), np.uint8), "RGBA")
  if kind == "jpeg":
    exif = PIL.Exif()
    exif[0x0112] = 6
    picture.convert("RGB").save(file, "JPEG", exif=exif)
  else:
    (picture.convert("RGB").quantize(9) if kind == "palette" else picture).save(file, "PNG")
  return file.getvalue()


@pytest.mark.parametrize("kind", ["jpeg", "palette", "transparent"])
def test_pixels_of_whatever_a_picture_is_given_as(bundle, kind, tmp_path):
  data = odd(kind)
  (tmp_path / "x").write_bytes(data)
  how = images.decoding(bundle.config)
  want = images.picture(data, bundle.config.tower.image_size, how).values
  opened = PIL.open(io.BytesIO(data))
  for given in (data, tmp_path / "x", str(tmp_path / "x"), opened, Image(data),
                images.decode(data, how)):
    np.testing.assert_array_equal(bundle.processor(given).values, want)
  assert opened.size == (36, 20), "the caller's picture was turned"
  flat = np.asarray(opened.convert("RGB"))  # as it lies in the file, colours under transparency
  assert (kind == "palette") == np.array_equal(bundle.processor(flat).values, want)
  video = bundle.processor(Video((Image(str(tmp_path / "x")), Image(data), Image(flat))))
  for frame, same in zip(video.squares, (want, want, bundle.processor(flat).values), strict=True):
    np.testing.assert_array_equal(frame, same)


def test_a_recipe_is_what_training_begins_with(recipe, run):
  from vlm_jax.core.fusion import find_fusion
  from vlm_jax.core.mesh import make_mesh
  from vlm_jax.train import state
  from vlm_jax.train.optimizer import make_optimizer

  fresh = vlm_jax.load(recipe)
  config, module = fresh.config, find_fusion(fresh.config)
  init, leaves = state.initializer(module, config)
  optimizer = make_optimizer(config, module.STAGES, leaves)
  abstract = state.abstract_state(leaves, optimizer.init, make_mesh(config, jax.devices()[:1]))
  assert same(fresh.params, state.create(init, optimizer.init, abstract, config.seed).params)
  assert fresh.step == 0 and fresh.tokenizer.vocab_size == 270
  # A whole model to start from: the newest checkpoint of a run, or the one that is named.
  for place, step in ((run, 4), (run / "checkpoints" / "3", 3)):
    started = vlm_jax.load(f"{recipe}:{place}")
    assert same(started.params, vlm_jax.load(run, step=step, outside=True).params)
    assert not same(started.params, fresh.params)


def test_a_whole_model_of_another_shape_is_refused(recipe, run, tmp_path):
  wide = tmp_path / "wide.py"
  wide.write_text(recipe.read_text().replace("  return config", "  config.llm.mlp = 56\n"
                                             "  return config"))
  with pytest.raises(DataError, match="fusion.init=.*llm/.* is .*expected.*56.*another model"):
    vlm_jax.load(f"{wide}:{run}")


def test_what_cannot_be_opened(run, recipe, bundle, tmp_path):
  with pytest.raises(UsageError, match="nowhere is no run directory.*recipe.*Hugging Face"):
    vlm_jax.load(tmp_path / "nowhere")
  with pytest.raises(UsageError, match="no file 'nowhere.py'"):
    vlm_jax.load("nowhere.py:debug")
  with pytest.raises(UsageError, match="has no steps"):
    vlm_jax.load(recipe, step=3)
  with pytest.raises(UsageError, match="takes no dtype"):
    vlm_jax.load(run, dtype="float32")
  with pytest.raises(UsageError, match="of step 3, and --step is 4"):
    vlm_jax.load(run / "checkpoints" / "3", step=4, outside=True)
  with pytest.raises(UsageError, match="no checkpoint of step 9.*3, 4"):
    vlm_jax.load(run, step=9, outside=True)
  with pytest.raises(DataError, match="document 'bad': .*no such file.*gone.png"):
    bundle.score([Document((Image("gone.png"), Text("a", loss=True)), "", "bad")])
  with pytest.raises(DataError, match="document 'mute': no token of the document"):
    bundle.score([Document((Text("a"),), "", "mute")])
  with pytest.raises(DataError, match="the picture: the bytes are not an image"):
    bundle.processor(b"no picture")
  with pytest.raises(UsageError, match="prefix_lm' speaks and gives no embeddings"):
    bundle.embed(texts=["a"])
  with pytest.raises(AttributeError, match="no attribute 'lod'"):
    vlm_jax.lod  # noqa: B018


@pytest.fixture(scope="module")
def first_stage(setup):  # noqa: F811
  """A model of BLIP-2's first stage, which captions under the name of another strategy."""
  config = contrast.get_config("blip2_qformer")
  words = setup[0].llm.vocab_size
  config.llm.update(vocab_size=words, positions=12)
  config.connector.update(vocab_size=words, positions=12)
  config.data.update(root=setup[0].data.root, bad_limit=0.5, template="caption")
  config.data.sources.pictures = base.source(name=SOURCE, form="caption")
  config.evals.say = base.evaluation(kind="caption", source="pictures", split="test", batch=3,
                                     max_tokens=4, controls=())
  # Loud enough that pictures are told apart: what they change is little beside the head's bias.
  loud = re.compile(".*attention/.*/kernel|.*cross/.*/kernel|caption/norm/scale")
  params = {path: leaf * (4 if loud.fullmatch(path) else 1)
            for path, leaf in flatten(contrast.sharp_params(config)).items()}
  return vlm_jax.Bundle(config.lock(), unflatten(params))


@pytest.fixture(scope="module")
def captioned(first_stage):
  """Pictures with the first of their captions, one a record, without the damaged one."""
  opened = pipeline.documents(first_stage.config, "pictures", "test", "caption")
  found = {}
  for one in map(opened.__getitem__, range(len(opened))):
    if "broken" not in one.key:
      found.setdefault(one.key.split("?")[0], one)
  return list(found.values())


def test_the_first_stage_writes_the_captions_of_the_evaluation(first_stage, captioned, tmp_path):
  evaluate(first_stage.config, first_stage.params, tmp_path)
  rows = [json.loads(line) for line in open(tmp_path / "predictions" / "say.jsonl")]
  want = [(row["prediction"], pytest.approx(row["log_prob"], abs=1e-4)) for row in rows]
  say = lambda documents, **options: [
    (one.text, one.log_prob) for (one,) in first_stage.generate(documents, max_tokens=4, **options)]
  assert len(want) == len(captioned) == 7 and len({row["prediction"] for row in rows}) > 1
  assert say(captioned) == want == say(captioned, rows=3)
  assert [row for one in captioned for row in say([one], write=lambda piece: None)] == want
  shown = [one.parts[0] for one in captioned]
  asked = [first_stage.answer("", [picture], max_tokens=4) for picture in shown]
  assert [(one.text, one.log_prob) for one in asked] == want
  assert first_stage.slots(first_stage.question("", shown[:1])) == asked[0].prompt_tokens == t.K + 1
  twin = [dataclasses.replace(one, parts=(picture, *one.parts[1:]))
          for one, picture in zip(captioned, shown[1:] + shown[:1], strict=True)]
  assert say(twin) != want


def test_the_first_stage_scores_captions_as_its_whole_pass_does(first_stage, captioned):
  voice = speaking(first_stage.config).copy_and_resolve_references()
  voice.data.rows = len(captioned)
  encoded = [template.encode(one, first_stage.tokenizer, first_stage._decode) for one in captioned]
  flat, where = contrast.pack(t.lay_out(encoded, voice), voice)
  out = jax.jit(lambda params, flat: blip2_itg.Model(voice).apply(
    {"params": params}, from_flat(flat)))(first_stage.params, flat)
  whole = np.asarray(out.hidden, np.float64) @ np.asarray(out.head, np.float64)
  scores, logits = first_stage.score(captioned), first_stage.logits(captioned)
  for one, score, found in zip(captioned, scores, logits, strict=True):
    row = where[one.key][0]
    said = flat["streams/text/tokens"][row, t.K : len(found)]
    assert score.tokens == tuple(said[1:]) and len(score.tokens) > 2
    want = whole[row, : len(found)]
    assert np.abs(found - want).max() < TOLERANCE * np.abs(want).max()
    log_p = want[t.K : -1] - np.logaddexp.reduce(want[t.K : -1], axis=-1, keepdims=True)
    by_hand = log_p[np.arange(len(said) - 1), said[1:]].sum()
    off = log_p[np.arange(len(said) - 1), said[1:] - 1].sum()  # twin: the words beside them
    error = lambda total, score=score: abs(total - score.log_prob) / abs(score.log_prob)
    assert error(by_hand) < TOLERANCE < error(off) / 100


def test_what_the_first_stage_cannot_do(first_stage, captioned):
  with pytest.raises(UsageError, match="attention-map.*language model.*'blip2_qformer' has none"):
    first_stage.answer("", [captioned[0].parts[0]], attention_map="x.png")
  with pytest.raises(UsageError, match="says one text behind one picture"):
    first_stage.score([Document((Text("a noise", loss=True),), "pictures", "x")])
  config = first_stage.config.copy_and_resolve_references()
  with config.unlocked():
    del config.fusion.objectives.itg
  silent = vlm_jax.Bundle(config, first_stage.params)
  for ask in (silent.score, silent.logits, silent.generate):
    with pytest.raises(UsageError, match="'blip2_qformer' compares pictures with texts and says"):
      ask(captioned)


def test_importing_the_package_loads_nothing_heavy():
  code = "import sys, vlm_jax; print([one for one in ('jax', 'numpy') if one in sys.modules])"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                        timeout=60)
  assert done.stdout.strip() == "[]"
