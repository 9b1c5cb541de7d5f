"""Recipes and flags: what is found, what is refused, and with which sentence."""

import pytest

from vlm_jax import recipes
from vlm_jax.cli.config import override
from vlm_jax.configs import base
from vlm_jax.core.errors import UsageError


def recipe(folder, body: str, arg: str = "") -> str:
  path = folder / "mine.py"
  path.write_text("from vlm_jax.configs import base\n" + body)
  return f"{path}:{arg}" if arg else str(path)


GOOD = "def get_config(arg=''):\n  c = base.get_config()\n  c.train.steps = len(arg)\n  return c\n"


def test_a_recipe_gets_its_argument(tmp_path):
  assert recipes.load(recipe(tmp_path, GOOD, "debug")).train.steps == 5
  assert recipes.load(recipe(tmp_path, GOOD)).train.steps == 0


def test_shipped_recipes_are_found_from_anywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert recipes.load("configs/quickstart.py:debug").fusion.name == "prefix_lm"


def test_a_file_here_comes_before_the_shipped_one(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "configs").mkdir()
  (tmp_path / "mine.py").write_text("from vlm_jax.configs import base\n" + GOOD)
  (tmp_path / "mine.py").rename(tmp_path / "configs/quickstart.py")
  assert recipes.load("configs/quickstart.py:xy").train.steps == 2


def test_missing_recipe_names_the_nearest():
  with pytest.raises(UsageError, match="no file 'configs/quikstart.py'; did you mean "
                                       "'configs/quickstart.py'"):
    recipes.load("configs/quikstart.py:debug")


@pytest.mark.parametrize("body,sentence", [
  ("def get_config(arg=''):\n  return undefined\n", r"line 3: NameError: .*undefined"),
  ("def get_config(arg='':\n", r"line 2: SyntaxError"),
  ("x = 1\n", r"has no function get_config"),
  ("def get_config(arg=''):\n  c = base.get_config()\n  c.train.stepz = 3\n  return c\n",
   r"sets config.train.stepz, which does not exist; did you mean 'steps'"),
  ("def get_config(arg=''):\n  c = base.get_config()\n"
   "  c.data.sources.a = base.source(raito=3)\n  return c\n",
   r"config.data.sources.a.raito, which does not exist; did you mean 'ratio'"),
  ("def get_config(arg=''):\n  c = base.get_config()\n  c.train.steps = 'many'\n  return c\n",
   r"line 4: TypeError"),
])
def test_a_broken_recipe_is_one_sentence(tmp_path, body, sentence):
  with pytest.raises(UsageError, match=sentence):
    recipes.load(recipe(tmp_path, body))


def changed(*overrides):
  config = base.get_config()
  config.data.sources.docs = base.source(name="pydoc")
  override(config, list(overrides))
  return config


@pytest.mark.parametrize("field,text,value", [
  ("train.steps", "100", 100),
  ("optim.lr", "3e-4", 3e-4),
  ("optim.lr", "1", 1.0),
  ("llm.tie_embeddings", "false", False),
  ("fusion.name", "concat", "concat"),
  ("seed", "-3", -3),
  ("data.sources.docs.ratio", "4", 4),
  ("data.sources.docs.augment", "flip, translate", ("flip", "translate")),
  ("data.sources.docs.augment", "", ()),
  ("optim.frozen", "('tower/.*',)", ("tower/.*",)),
  ("optim.groups", "[('llm/.*', 0.1)]", (("llm/.*", 0.1),)),
  ("tower.mean", "0.5,0.4,0.3", (0.5, 0.4, 0.3)),
])
def test_text_becomes_the_type_of_the_field(field, text, value):
  node = changed((field, text))
  for name in field.split("."):
    node = node[name]
  assert node == value and type(node) is type(value)


@pytest.mark.parametrize("field,text,sentence", [
  ("train.stpes", "3", "config.train has no field 'stpes'; did you mean 'steps'"),
  ("trian.steps", "3", "config has no field 'trian'; did you mean 'train'"),
  ("train.steps", "many", "config.train.steps must be a value of type int .as now: 1000., got 'm"),
  ("train.steps", "1.5", "must be a value of type int"),
  ("optim.lr", "fast", "config.optim.lr must be a value of type float .*got 'fast'"),
  ("llm.tie_embeddings", "maybe", "type bool"),
  ("train", "3", "is a group of fields; set one of them: .*steps"),
  ("train.steps.more", "3", "config.train.steps is a int, it has no fields"),
])
def test_a_wrong_flag_names_field_and_way_out(field, text, sentence):
  with pytest.raises(UsageError, match=sentence):
    changed((field, text))
