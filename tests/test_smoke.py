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


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  """Prepared data, once."""
  folder = tmp_path_factory.mktemp("data")
  assert cli.main(["data", "prepare", f"--root={folder}"]) == 0
  return folder


@pytest.mark.parametrize("recipe", ["quickstart", "llava", "simvlm"])
def test_train_resume_evaluate_generate(recipe, root, tmp_path, capsys):
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
