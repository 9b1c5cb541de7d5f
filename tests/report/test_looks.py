"""Attention in a report: the maps of the very question and answer that stand above them."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.generate.helpers import noise
from tests.report.test_report import written
from vlm_jax import bundle
from vlm_jax.cli import main as cli
from vlm_jax.core.document import Document, Text
from vlm_jax.core.errors import USAGE
from vlm_jax.data import pipeline, template
from vlm_jax.generate import maps


@pytest.fixture
def loaded(config, monkeypatch):
  """The parameters that every checkpoint has here, and the steps that were read."""
  params, steps = noise(config), []
  monkeypatch.setattr(bundle, "load", lambda path, step, root, outside: (
    steps.append(step), bundle.Bundle(config, params, step))[1])
  return params, steps


def by_hand(config, params, record, branch, answer):
  """The maps behind an answer to question `branch` of a picture."""
  tokenizer, decode = pipeline.load_tokenizer(config), pipeline.image_decoder(config)
  document = next(document for document in pipeline.documents(config, "pictures", "test", "fan_out")
                  if document.key == f"pictures/test/r{record}")
  image, *texts = document.parts
  asked = next(part for part in texts if part.branch == branch)
  prompt = template.encode_prompt(
    Document((image, asked, Text("", "assistant", branch=branch)), "pictures", "x"), tokenizer,
    decode)
  return maps.draw(maps.word_maps(config, params, prompt, tokenizer.encode(answer), tokenizer),
                   prompt.images)


def test_samples_show_where_every_word_looked(run, config, loaded):
  params, steps = loaded
  found = written(run)
  assert steps == [100] and not found.faults  # read once, the checkpoint that answered
  large = [image for data in found.images
           if (image := Image.open(io.BytesIO(data)).convert("RGB")).width > 2 * image.height]
  assert len(large) == 2 and found.text.count("Bright: a large attention weight") == 2
  # Wrong answers stand first: those of records 0 and 3.
  for image, record in zip(large, (0, 3), strict=True):
    want = by_hand(config, params, record, 1, f"yes {record}")
    error = lambda other, image=image: np.abs(
      np.asarray(image, int) - np.asarray(other.quantize(64).convert("RGB"), int)).mean()
    assert image.size == want.size and error(want) == 0
  # Twins of the last: another picture, another answer.
  assert error(by_hand(config, params, 5, 1, "yes 3")) > 5
  assert error(by_hand(config, params, 3, 1, "no 3")) > 0.5
  assert len(written(run, "--attention-maps=0").images) == len(found.images) - 2


def test_what_cannot_be_drawn_is_said(run, config, loaded):
  for name in ("look", "look_shuffled"):  # ranked, not said
    file = run / "predictions" / f"{name}.jsonl"
    file.write_text(file.read_text().replace('"exact"', '"rank"'))
  assert "Bright" not in written(run).text and not loaded[1]
  assert cli.main(["report", f"--workdir={run}", "--attention-maps=-1"]) == USAGE


def test_a_run_without_its_checkpoint_keeps_its_samples(run):
  text = written(run).text
  assert "Attention is not shown: " in text and "question 4?" in text
