"""The pictures and the table of docs/attention.md are what the functions of training make today."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def script():
  spec = importlib.util.spec_from_file_location("docs_attention", DOCS / "attention.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_pictures_and_table_are_todays(script, tmp_path, capsys):
  script.main(str(tmp_path))
  committed = sorted((DOCS / "attention").iterdir())
  assert [path.name for path in committed] == sorted(path.name for path in tmp_path.iterdir())
  for path in committed:
    assert path.read_bytes() == (tmp_path / path.name).read_bytes(), (
      f"{path.name} is out of date: run python docs/attention.py")
  text = (DOCS / "attention.md").read_text()
  assert capsys.readouterr().out.strip() in text, "copy the table that docs/attention.py prints"
  shown = re.findall(r"\(attention/(\w+)\.svg\)", text)
  assert shown == list(script.POLICIES)


def test_a_picture_notices_a_mask_off_by_one(script, monkeypatch):
  before = script.picture(script.POLICIES["causal"])
  packed = script.packed

  def broken(policy, size):
    mask, flat = packed(policy, size)
    return dataclasses.replace(mask, hi=np.maximum(mask.hi - 1, 0)), flat

  monkeypatch.setattr(script, "packed", broken)
  assert script.picture(script.POLICIES["causal"]) != before


def test_blocks_are_what_the_mask_says(script):
  for policy in script.POLICIES.values():
    mask, _ = script.packed(policy, script.PICTURE)
    keys, block = script.keys_of(policy, script.PICTURE), script.PICTURE.block
    pairs = mask.dense(keys)[0].reshape(-1, block, keys // block, block)
    kinds = script.kinds_of_blocks(mask, keys, block)
    # In these rows the plan is exact, also where there are classes.
    np.testing.assert_array_equal(kinds > 0, pairs.any((1, 3)))
    np.testing.assert_array_equal(kinds == 2, pairs.all((1, 3)))
    visible, computed, full = script.shares(policy, script.PICTURE)
    assert full <= visible <= computed < 0.5
