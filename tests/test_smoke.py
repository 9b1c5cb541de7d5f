"""Everything imports, every strategy takes steps and speaks: what must work on any JAX in range."""

import importlib
import json
import pkgutil

import numpy as np
import pytest
from PIL import Image

import vlm_jax
from vlm_jax.cli import main as cli


def test_everything_imports():
  names = [info.name for info in pkgutil.walk_packages(vlm_jax.__path__, "vlm_jax.")
           if not info.name.endswith("__main__")]
  assert len(names) > 40
  for name in names:
    importlib.import_module(name)


@pytest.mark.parametrize("recipe", ["simvlm", "quickstart", "llava"])
def test_train_resume_evaluate_generate(recipe, root, tmp_path, capsys, request):
  if recipe == "simvlm":  # which trains long enough to learn
    request.getfixturevalue("optimized")
  workdir = tmp_path / "run"
  train = ["train", f"--config=configs/{recipe}.py:debug", f"--workdir={workdir}",
           f"--config.data.root={root}"]
  assert cli.main(train) == 0
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  losses = [row["loss"] for row in rows if "loss" in row]
  assert len(losses) >= 3 and np.isfinite(losses).all()
  if recipe == "simvlm":  # 50 steps, enough to see it learn
    assert rows[-1]["step"] == 50 and np.mean(losses[-3:]) < 0.75 * losses[0], losses
  assert cli.main(train) == 0, "the same command again continues, here: at the end"
  assert cli.main([*train, "--config.optim.lr=1.0"]) == 2, "another config is refused"
  capsys.readouterr()

  assert cli.main(["evaluate", f"--workdir={workdir}", "--only=text"]) == 0
  capsys.readouterr()
  picture = tmp_path / "x.png"
  Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(picture)
  assert cli.main(["generate", f"--workdir={workdir}", f"--image={picture}",
                   "--prompt=what shape is this?", "--json", "--max-tokens=4"]) == 0
  answer = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
  assert isinstance(answer["text"], str)


def test_contrastive(root, tmp_path, capsys):
  """Pairs of pictures and texts: trained in two micro-batches, evaluated; nothing can be said."""
  workdir = tmp_path / "run"
  train = ["train", "--config=configs/contrastive.py:siglip,debug", f"--workdir={workdir}",
           f"--config.data.root={root}"]
  assert cli.main(["plan", *train[1:2], *train[3:]]) == 0
  assert "documents/captions/tokens" in capsys.readouterr().out
  assert cli.main(train) == 0
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  losses = [row["loss"] for row in rows if "loss" in row]
  assert len(losses) >= 3 and np.isfinite(losses).all()
  assert rows[0]["texts/captions"] == rows[0]["images/images"] == 32
  assert cli.main(["data", "inspect", *train[1:2], *train[3:], "--steps=1"]) == 0
  capsys.readouterr()
  assert cli.main(["evaluate", f"--workdir={workdir}", "--json"]) == 0
  results = json.loads(capsys.readouterr().out.splitlines()[-1])["evals"]
  assert set(results) == {"find", "openmoji", "shapes"} and results["find"]["pictures"] == 16
  assert cli.main(["generate", f"--workdir={workdir}", "--prompt=what is it?"]) == 2
  assert "says nothing" in capsys.readouterr().err
  assert cli.main(["report", f"--workdir={workdir}"]) == 0
