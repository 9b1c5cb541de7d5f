"""`vlm_jax.load` of a checkpoint of Hugging Face, as it lies there: theirs says the same."""

import json

import numpy as np
import pytest
import torch
from PIL import Image as PIL

import vlm_jax
from tests.convert.test_systems import SYSTEMS, data, their_model, write_tokenizer  # noqa: F401
from vlm_jax.cli import main as cli
from vlm_jax.core.document import Document, Image, Text
from vlm_jax.core.errors import DataError, UsageError
from vlm_jax.core.tree import flatten

TOLERANCE = 2e-4
LOGITS = 2e-5  # of logits and embeddings, whose measured errors are below 2e-6


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Directories of published checkpoints by system."""
  folder = tmp_path_factory.mktemp("published")

  def save(system):
    if not (place := folder / system).exists():
      their_model(system).save_pretrained(place)
      write_tokenizer(place, *SYSTEMS[system][1])
    return place

  return save


def error(a, b):
  a, b = np.asarray(a), np.asarray(b)
  assert a.shape == b.shape and np.isfinite(a).all() and b.std() > 1e-3
  return np.abs(a - b).max() / np.abs(b).max()


def pixels_of(bundle, picture):
  """What their processor hands to their tower: f32[1,3,H,W]."""
  tower = bundle.config.tower
  values = (bundle.processor(picture).values / 255 - np.array(tower.mean)) / np.array(tower.std)
  return torch.tensor(values.transpose(2, 0, 1)[None], dtype=torch.float32)


def test_a_llava_says_what_theirs_says(saved, data):  # noqa: F811
  bundle, model = vlm_jax.load(saved("llava")), their_model("llava").eval()
  assert bundle.config.data.tokens == 256 and bundle.step == 0
  picture = PIL.open(data / "0.png")
  document = Document((Image(str(data / "0.png")), Text("w20 w30 w11", "user"),
                       Text("w12 w13", "assistant", loss=True)), "", "x")
  layout = bundle._layouts([document])[0].arrays
  row = {word: row for row, word in SYSTEMS["llava"][1][0].items()}
  ids = np.where(layout["streams/text/fill"] >= 0, row["<image>"], layout["streams/text/tokens"])
  assert ids.tolist()[-4:] == [row["<x1>"], 12, 13, row["</s>"]] and 20 in ids
  with torch.no_grad():
    theirs = model(input_ids=torch.tensor(ids[None]).long(), pixel_values=pixels_of(bundle, picture)
                   ).logits[0].numpy()
  mine = bundle.logits([document])[0]
  print(f"logits within {error(mine, theirs):.1e}")
  assert error(mine, theirs) < LOGITS
  turned = picture.transpose(PIL.Transpose.ROTATE_180)
  other = Document((Image(np.asarray(turned.convert("RGB"))), *document.parts[1:]), "", "x")
  assert error(bundle.logits([other])[0], theirs) > 100 * LOGITS
  score = bundle.score([document])[0]
  assert score.tokens == (12, 13, row["</s>"])
  by_hand = torch.log_softmax(torch.tensor(theirs), -1)[-4:-1, list(score.tokens)].diagonal()
  assert error(score.log_probs, by_hand.numpy()) < TOLERANCE
  half = vlm_jax.load(saved("llava"), dtype="bfloat16")
  assert {leaf.dtype.name for leaf in flatten(half.params).values()} == {"bfloat16"}
  assert half.config.precision.param == "bfloat16"


def test_a_clip_embeds_what_theirs_embeds(saved, data):  # noqa: F811
  bundle, model = vlm_jax.load(saved("clip")), their_model("clip").eval()
  pictures = [data / f"{number}.png" for number in range(3)]
  found = bundle.embed(pictures, ["w20 w30", "w11"], rows=2)
  with torch.no_grad():
    theirs = [model.get_image_features(pixel_values=pixels_of(bundle, one)) for one in pictures]
    theirs = torch.cat([getattr(one, "pooler_output", one) for one in theirs])
    theirs = theirs / theirs.norm(dim=-1, keepdim=True)
  print(f"embeddings within {error(found.image, theirs):.1e}")
  assert error(found.image, theirs) < LOGITS < error(found.image[::-1], theirs) / 100
  ids = torch.tensor([[39, 20, 30, 40]])
  with torch.no_grad():
    text = model.get_text_features(input_ids=ids, attention_mask=torch.ones_like(ids))
    text = getattr(text, "pooler_output", text)
    text = (text / text.norm(dim=-1, keepdim=True)).numpy()
  assert error(found.text[:1], text) < LOGITS < error(found.text[1:], text) / 100
  assert float(found.scale) == pytest.approx(np.exp(1.5), rel=1e-5)
  one = bundle.embed(texts=["w11"])
  assert one.image is None and error(one.text, found.text[1:]) < 1e-6
  with pytest.raises(UsageError, match="says nothing; use `embed`"):
    bundle.logits([Document((Text("w20", loss=True),), "", "x")])
  with pytest.raises(UsageError, match="there is nothing to embed"):
    bundle.embed()


def test_a_paligemma_is_the_run_that_convert_makes_of_it(saved, data, tmp_path, capsys):  # noqa: F811
  theirs, run = saved("paligemma"), tmp_path / "run"
  assert cli.main(["convert", str(theirs), "--from=hf", f"--out={run}",
                   f"--config={data / 'recipe.py'}"]) == 0
  straight, converted = vlm_jax.load(theirs), vlm_jax.load(run)
  a, b = flatten(straight.params), flatten(converted.params)
  assert a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)
  picture = data / "1.png"
  said = [one.answer("w20 w30", [picture], max_tokens=4) for one in (straight, converted)]
  assert said[0].tokens == said[1].tokens and said[0].image_tokens > 1
  assert said[0].log_prob == pytest.approx(said[1].log_prob, rel=1e-5)
  capsys.readouterr()
  assert cli.main(["generate", f"--workdir={theirs}", "--prompt=w20 w30", f"--image={picture}",
                   "--max-tokens=4", "--json"]) == 0
  assert json.loads(capsys.readouterr().out)["tokens"] == list(said[0].tokens)


def test_what_is_wrong_with_a_checkpoint(saved, tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
  with pytest.raises(UsageError, match="model_type is 'gpt2'"):
    vlm_jax.load(tmp_path)
  whole = saved("llava")
  (tmp_path / "config.json").write_text((whole / "config.json").read_text())
  with pytest.raises(DataError):
    vlm_jax.load(tmp_path)
