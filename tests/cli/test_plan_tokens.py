"""`vlm-jax plan --tokens`: what it prints is what the functions say, bad input is one sentence."""

import itertools
import json

import numpy as np
import pytest

from tests.report.test_report import Page
from vlm_jax.cli import main as cli
from vlm_jax.cli import plan_tokens
from vlm_jax.core import errors
from vlm_jax.core.mask import causal, full, prefix, see_until
from vlm_jax.ops.costs import LLM, LLMS
from vlm_jax.ops.visual_tokens import SYSTEMS, UNCOUNTED

ASKED = ["plan", "--tokens", "--image=1920x1080", "--text=50", "--answer=14"]


def test_the_table_has_every_system(capsys):
  assert cli.main(ASKED) == errors.OK
  text = capsys.readouterr().out
  lines = {line[:26].strip(): line[26:].split() for line in text.splitlines()}
  assert set(SYSTEMS) <= set(lines)
  assert lines["LLaVA-NeXT"][0] == "1,948", "an image is width x height"
  assert lines["Fuyu"][0] == "2,340"
  assert lines["LLaVA-1.5"][:3] == ["576", "-", f"{640 / 4096:.1%}"]
  assert lines["Flamingo"][:2] == ["1", "64"]
  for name, reason in UNCOUNTED.items():
    assert name in text and reason in text


def test_numbers_as_json(capsys):
  assert cli.main([*ASKED, "--json", "--memory=40"]) == errors.OK
  plan = json.loads(capsys.readouterr().out)
  assert plan == plan_tokens.compare((1920, 1080), 1, LLMS["vicuna-7b"], 50, 14, 40 * 10**9)
  row, llm = plan["systems"]["LLaVA-1.5"], LLMS["vicuna-7b"]
  assert row["sequence"] == 640 and row["kv_bytes"] == 640 * 32 * 4096 * 2 * 2
  assert row["pairs"] == 32 * 640 * 641 // 2
  assert row["batch"] == (40 * 10**9 - 2 * llm.matrices) // row["kv_bytes"]


def test_pairs_by_mask_are_those_of_the_masks():
  each, images, text, answer = 5, 2, 3, 2
  slots = each * images
  n = slots + text + answer
  ones = lambda mask: int(mask.dense().sum())
  made = plan_tokens.by_mask(each, images, text, answer)
  assert made["causal"] == ones(causal(n)) and made["full"] == ones(full(n))
  assert made["prefix"] == ones(prefix(n, slots + text))
  ends = np.array([each] * each + [slots] * each + [0] * (text + answer))
  assert made["bidirectional images"] == ones(see_until(causal(n), ends))
  assert made["cross-attention to all"] == ones(causal(text + answer)) + (text + answer) * slots
  assert made["to the last image"] == ones(causal(text + answer)) + (text + answer) * each


def test_several_images(capsys):
  assert cli.main([*ASKED, "--images=10", "--json"]) == errors.OK
  plan = json.loads(capsys.readouterr().out)["systems"]
  assert plan["LLaVA-1.5"]["sequence"] == 5760 + 64 and plan["LLaVA-1.5"]["context_share"] > 1
  assert plan["LLaVA-NeXT"]["slots"] == 19480
  assert (plan["Flamingo"]["slots"], plan["Flamingo"]["memory_rows"]) == (10, 640)


def test_slots_are_those_of_every_system_at_every_size():
  """What the tests of ops/visual_tokens.py hold to transformers is what is printed."""
  for width, height in itertools.product((50, 336, 640, 1080, 1920), repeat=2):
    plan = plan_tokens.compare((width, height), 1, LLMS["vicuna-7b"], 64, 64, 80 * 10**9)["systems"]
    assert plan.keys() == SYSTEMS.keys()
    for name, system in SYSTEMS.items():
      image = system.image(height, width)
      assert plan[name]["slots"] == max(image.slots, image.later or 0), (name, width, height)


@pytest.mark.parametrize("size", [(1, 1), (1, 100_000), (100_000, 1), (100_000, 100_000)])
def test_odd_images_have_costs_too(size):
  plan = plan_tokens.compare(size, 1, LLMS["vicuna-7b"], 0, 0, 80 * 10**9)
  for row in plan["systems"].values():
    assert row["kv_bytes"] > 0 and row["prefill_flops"] > 0 and row["batch"] > 0


def test_it_is_drawn(tmp_path, capsys):
  out = tmp_path / "drawn" / "tokens.html"
  assert cli.main([*ASKED, f"--out={out}"]) == errors.OK
  text = out.read_text()
  page = Page(text)
  assert not page.faults, "nothing in it loads or runs"
  assert text.count("<svg") == 7
  for name, system in SYSTEMS.items():
    assert name in page.text and system.rule in page.text
  assert "1,948" in page.text and not capsys.readouterr().err


def test_a_language_model_of_ones_own():
  fields = "depth=3,width=64,heads=4,mlp=128,vocab_size=500,context=2048"
  assert plan_tokens.read_llm(fields) == LLM(3, 64, 4, 4, 16, 128, 500, 2048)
  assert plan_tokens.read_llm("vicuna-7b,kv_heads=8").kv_heads == 8
  grouped = plan_tokens.compare((9, 9), 1, plan_tokens.read_llm("vicuna-7b,kv_heads=8"), 9, 9,
                                10**11)
  whole = plan_tokens.compare((9, 9), 1, LLMS["vicuna-7b"], 9, 9, 10**11)
  key = lambda plan: plan["systems"]["LLaVA-1.5"]["kv_bytes"]
  assert key(whole) == 4 * key(grouped)


@pytest.mark.parametrize("flags,sentence", [
  (["--image=big"], "--image is 'big'; give width and height in pixels, e.g. 640x480"),
  (["--image=0x9"], "each 1 to 100000"),
  (["--image=640x480x3"], "--image is '640x480x3'"),
  (["--images=0"], "--images is 0; use 1 to 100000"),
  (["--text=-1"], "--text is -1; use 0 to 100000"),
  (["--text=few"], "--text: invalid int value"),
  (["--memory=nan"], "--memory is nan; use 1 to"),
  (["--llm=vicuna-7"], "no language model 'vicuna-7'; did you mean 'vicuna-7b'?"),
  (["--llm=vicuna-7b,widht=9"], "no field 'widht'; did you mean 'width'?"),
  (["--llm=vicuna-7b,width=many"], "width is 'many', not a positive whole number"),
  (["--llm=depth=2,width=8"], "heads, mlp, vocab_size, context missing"),
  (["--llm=vicuna-7b,kv_heads=5"], "cannot share 5 kv_heads evenly"),
  (["--out=drawn.pdf"], "name a file that ends in .html"),
  (["--config=configs/llava.py"], "reads no recipe; leave out --config"),
  (["--config.seed=3"], "reads no recipe; leave out --config"),
])
def test_bad_input(flags, sentence, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert cli.main(["plan", "--tokens", *flags]) == errors.USAGE
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1 and sentence in lines[0], lines
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags,sentence", [
  ([], "plan needs a recipe, --config=FILE.py[:ARG], or --tokens"),
  (["--config=configs/llava.py", "--image=9x9"], "--image belongs to --tokens"),
  (["--llm=vicuna-7b"], "--llm belongs to --tokens"),
])
def test_flags_of_the_wrong_plan(flags, sentence, capsys):
  assert cli.main(["plan", *flags]) == errors.USAGE
  assert sentence in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
  (tmp_path / "taken").write_text("")
  assert cli.main([*ASKED, f"--out={tmp_path}/taken/x.html"]) == errors.DISK
  assert "cannot be written" in capsys.readouterr().err
