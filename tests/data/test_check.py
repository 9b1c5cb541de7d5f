"""`data check` says what training would do; and what it says, training does."""

import json
import os
import re

import numpy as np
import pytest

from tests.data import written
from tests.data.conftest import ROOT
from tests.data.test_formats import (  # noqa: F401
  CAPTIONS,
  WRITERS,
  folder,
  llava,
  own,
  records,
  write_vqa,
)
from tests.data.test_pipeline import steps
from vlm_jax.cli import main as cli
from vlm_jax.configs import base
from vlm_jax.core.errors import UsageError
from vlm_jax.data import check, pipeline, prepare, sources, toy
from vlm_jax.data import records as prepared
from vlm_jax.train import trackers
from vlm_jax.train.loop import train

KINDS = {name: "messages" if name in ("data urls", "marks") else name.split()[0]
         for name in WRITERS} | {"llava lines": "llava_json"}


def test_formats_are_known_by_sight(folder, records):  # noqa: F811
  for case, (name, write) in WRITERS.items():
    assert check.guess(write(folder, records)["path"]) == KINDS[case] == name
  for name, write in CAPTIONS.items():
    assert check.guess(write(folder, records)["path"]) == name
  assert check.guess(write_vqa(folder, [(1, [("x?", "y")])])["path"]) == "vqav2"
  assert check.guess(str(llava(folder, records))) == "llava_json"
  with pytest.raises(UsageError, match="name one of array_record, coco, llava_json"):
    check.guess(written.jsonl(folder / "unknown.jsonl", [{"picture": 1}]))
  assert set(sources.formats()) == {*KINDS.values(), *CAPTIONS, "vqav2"}


def test_what_it_says_is_what_training_does(own, folder, records):  # noqa: F811
  bad = [records[3] | {"image": name} for name in ("../x.jpg", "gone.jpg")]
  config = own("llava_json", llava(folder, [*records, *bad]))
  text, dropped = check.check(config, "mine", examples=3)
  assert dropped == pytest.approx(2 / 14)
  assert "14 records of split 'train'" in text and "12 records give" in text
  assert "outside_root 1:" in text and "mine/train[12]: ../x.jpg" in text
  assert "missing_file 1:" in text and "gone.jpg" in text
  answer = records[0]["conversations"][1]["value"]
  assert f"<assistant>[[{answer}<eos>]]" in text
  epoch = float(re.search(r"about ([\d.]+) steps", text)[1])
  config.data.bad_limit = 1.0
  packed = [info["documents"]["mine"] for _, info, _ in steps(config, 4)]
  assert 0.5 < epoch / (12 / np.mean(packed)) < 2 and epoch > 1
  some, _ = check.check(config, "mine", examples=0, limit=2)
  assert "the first 2 read" in some and "row 0" not in some and "fill" not in some
  # Of two records, whose lengths are random; an epoch of only those two would be a sixth.
  assert 0.25 < float(re.search(r"about ([\d.]+) steps", some)[1]) / epoch < 4


def test_the_command(folder, records, tmp_path, capsys, monkeypatch):  # noqa: F811
  monkeypatch.chdir(tmp_path)
  path, root = str(llava(folder, records)), f"--image-root={folder}/images"
  assert cli.main(["data", "check", path, root]) == 0
  assert "llava_json, 12 records" in capsys.readouterr().out
  assert cli.main(["data", "check", path]) == 65  # the images are not beside the file
  assert "missing_file 11" in (out := capsys.readouterr().out) and "training would stop" in out
  for argv, code, sentence in [
    (["nowhere.json"], 65, "nowhere.json does not exist"),
    ([path, "--format=lava_json"], 2, "did you mean 'llava_json'"),
    ([path, "--limit=-1"], 2, "--limit"),
    ([], 2, "needs a FILE"),
    ([path, "--tokenizer=none.json"], 65, "none.json"),
  ]:
    assert cli.main(["data", "check", *argv]) == code
    assert sentence in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_the_readme_is_true(tmp_path, capsys, monkeypatch):
  """Its table names every format with fields that exist, and its commands work as they stand."""
  text = (ROOT / "README.md").read_text().split("## Your own data")[1].split("\n## ")[0]
  rows = re.findall(r"^\| `(name=.*?)` \|", text, re.MULTILINE)
  entries = [eval(f"dict({row})") for row in rows]
  assert sorted(entry["name"] for entry in entries) == sources.formats()
  assert all(set(entry) <= set(base.source()) for entry in entries)
  commands = re.findall(r"^    vlm-jax (.*?)(?: +#.*)?$", text, re.MULTILINE)
  monkeypatch.chdir(tmp_path)
  toy.write(".")
  (tmp_path / "my.py").write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
  for command in commands[:3]:
    assert command.startswith("data ") and cli.main(command.split()) == 0, command
  assert "llava_json, 40 records" in (out := capsys.readouterr().out) and "json, 35 records" in out
  assert [command.split()[0] for command in commands[3:]] == ["train", "evaluate"]
  for argv, words in (([], "my.json exists"), (["--help"], "forty records"),
                      (["my.json"], "cannot be written")):
    with pytest.raises(SystemExit, match=words):
      toy.main(argv)
  assert not os.path.exists("--help")


def test_prepare_teaches_the_tokenizer_a_users_own_texts(folder, records, tmp_path):  # noqa: F811
  config = base.get_config()
  path = llava(folder, records, "learn.json")
  config.data.sources.mine = base.source(name="llava_json", path=str(path))
  lines = []
  request = dict(sources=[], vocab_size=270, config=config, log=lines.append)
  prepare.prepare(str(tmp_path / "root"), **request)
  manifest = prepared.check(str(tmp_path / "root"))
  assert list(manifest["files"]) == ["tokenizer.json"] and manifest["sources"] == {}
  config.data.root, config.llm.vocab_size = str(tmp_path / "root"), 270
  words = pipeline.load_tokenizer(config)
  text = " ".join(turn["value"] for record in records for turn in record["conversations"])
  assert len(words.encode(text)) < len(text.encode())  # some pairs of its letters are one token
  prepare.prepare(str(tmp_path / "root"), **request)
  assert "is already prepared" in lines[-1]
  llava(folder, records + records, "learn.json")
  prepare.prepare(str(tmp_path / "root"), **request)
  assert any("preparing again" in line for line in lines)
  with pytest.raises(UsageError, match="reads your own files and needs no preparing"):
    prepare.prepare(str(tmp_path / "root"), ["llava_json"])


def test_trains_from_a_tfds_data_set(root, folder, tmp_path):  # noqa: F811
  """Two steps of the real loop from files that TFDS wrote, TensorFlow being absent."""
  rows = [{"image": str(path), "captions": [{"text": f"a picture of the number {i}"}]}
          for i, path in enumerate(sorted((folder / "images").glob("0*.jpg")))]
  features = lambda f: f.FeaturesDict({"image": f.Image(),
                                       "captions": f.Sequence({"text": f.Text()})})
  config = base.get_config()
  config.fusion.name = "tests.data.tiny_strategy"
  config.tower.update(image_size=16, patch=8)
  config.llm.width = 32
  config.data.root = str(tmp_path)
  config.data.tokenizer, config.llm.vocab_size = f"{root}/tokenizer.json", 1024
  config.data.update(rows=2, tokens=64, images=2)
  config.data.sources.mine = base.source(
    name="tfds", path=written.tfds(folder, "trained_from", features, rows), split="train[:90%]")
  config.train.update(steps=2, log_every=1)
  train(config, tmp_path / "run")
  made = trackers.read(tmp_path / "run" / "metrics.jsonl")
  losses = [row["loss/lm/mine"] for row in made]
  assert len(losses) == 2 and np.isfinite(losses).all() and losses[0] != losses[1]
  assert all(row["images/images"] > 0 for row in made)
  frozen = json.loads((tmp_path / "run" / "config.json").read_text())
  assert frozen["data"]["sources"]["mine"]["split"] == "train[:90%]"
