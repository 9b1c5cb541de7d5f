"""The quickstart's own logic, with training replaced: what is kept, continued, and refused."""

import json

import pytest

from vlm_jax import quickstart, recipes
from vlm_jax.cli import main as cli
from vlm_jax.cli import quickstart as command
from vlm_jax.configs import older
from vlm_jax.configs import quickstart as recipe
from vlm_jax.core.errors import DataError, UsageError

KEYS = ["seconds", "easy_vqa", "easy_vqa_blind", "easy_vqa_shuffled", "openmoji",
        "openmoji_interval", "openmoji_blind", "openmoji_blind_interval", "openmoji_cider",
        "text_ppl_mixed", "text_ppl_text_only", "tokens_per_second", "token_fill", "image_fill",
        "workdir"]


class Trainer:
  """Stands for train: writes what the loop would, counts its calls, fails when told to."""

  def __init__(self, blind=0.6, fail=None):
    self.trained, self.blind, self.fail = [], blind, fail

  def __call__(self, config, workdir, evaluate, fill):
    assert fill is older.fill  # an interrupted quickstart may go on in a newer version
    if workdir.name == self.fail:
      raise KeyboardInterrupt
    self.trained.append((workdir.name, config))
    workdir.mkdir(parents=True, exist_ok=True)
    rows = [{"step": step, "tokens/text/second": rate, "fill/tokens/text": 0.9,
             "fill/images/images": 0.8} for step, rate in ((1, 100.0), (2, 300.0))]
    rows.append({"step": 2, "compile_seconds": 3.0})
    (workdir / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    accuracy = {"mixed": 0.98, "blind": self.blind, "text_only": None}[workdir.name]
    choices = {"mixed": 0.4, "blind": 0.25, "text_only": None}[workdir.name]
    return {"eval/openmoji/accuracy": choices, "eval/openmoji/low": 0.2,
            "eval/openmoji/high": 0.5, "eval/openmoji_captions/cider": 0.1,
            "eval/easy_vqa/accuracy": accuracy, "eval/easy_vqa/shuffled/accuracy": 0.59,
            "eval/text/perplexity": 40.0}


@pytest.fixture
def trainer(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  trainer = Trainer()
  monkeypatch.setattr(quickstart, "train", lambda *args, **kwargs: trainer(*args, **kwargs))
  monkeypatch.setattr(quickstart.page, "write", lambda path, outside: f"{path}/report.html")
  monkeypatch.setattr(quickstart.prepare, "prepare", lambda *args, **kwargs: None)
  return trainer


def last_line(capsys) -> dict:
  return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_the_last_line_has_the_promised_keys(trainer, capsys):
  assert cli.main(["quickstart", "debug"]) == 0
  out = capsys.readouterr().out
  line = json.loads(out.strip().splitlines()[-1])
  assert list(line) == KEYS and f"report: {line['workdir']}/mixed/report.html" in out
  assert line["easy_vqa"] == 0.98 and line["easy_vqa_blind"] == 0.6
  assert line["openmoji"] == 0.4 and line["openmoji_blind"] == 0.25
  assert line["openmoji_interval"] == line["openmoji_blind_interval"] == [0.2, 0.5]
  assert line["tokens_per_second"] == 200.0 and line["token_fill"] == 0.9
  parts = dict(trainer.trained)
  assert list(parts) == ["mixed", "blind", "text_only"]
  assert parts["blind"].data.sources.easy_vqa.images == "none"
  assert parts["blind"].evals.easy_vqa.images == "none"
  assert list(parts["text_only"].data.sources) == ["pydoc"]
  assert parts["mixed"].train.steps == parts["blind"].train.steps == parts["text_only"].train.steps


def test_interrupted_it_continues_and_finished_it_starts_anew(trainer, capsys):
  trainer.fail = "blind"
  assert cli.main(["quickstart", "debug"]) == 130
  trainer.fail = None
  assert cli.main(["quickstart", "debug"]) == 0
  first = last_line(capsys)["workdir"]
  assert [name for name, _ in trainer.trained] == ["mixed", "blind", "text_only"]
  assert cli.main(["quickstart", "debug"]) == 0
  assert last_line(capsys)["workdir"] != first and len(trainer.trained) == 6


def test_a_changed_recipe_has_a_directory_of_its_own(trainer, capsys):
  workdirs = set()
  for flags in ([], ["--config.train.steps=7"], ["--config.seed=1"]):
    assert cli.main(["quickstart", "debug", *flags]) == 0
    workdirs.add(last_line(capsys)["workdir"])
  assert len(workdirs) == 3
  assert trainer.trained[-1][1].seed == 1


def test_a_blind_model_that_knows_too_much_fails_the_run(trainer, capsys):
  trainer.blind = 0.70
  assert cli.main(["quickstart", "debug"]) == DataError.code
  captured = capsys.readouterr()
  assert "the blind control reached 0.700" in captured.err and "answers leak" in captured.err
  trainer.blind = quickstart.LEAK
  assert cli.main(["quickstart", "debug", "--config.seed=2"]) == 0


@pytest.mark.parametrize("spec,path,arg", [
  ("configs/quickstart.py", "configs/quickstart.py", ""),
  ("debug", "configs/quickstart.py", "debug"),
  ("configs/llava.py:debug", "configs/llava.py", "debug"),
  ("configs/llava.py", "configs/llava.py", ""),
])
def test_recipe_argument(spec, path, arg):
  assert command.split(spec) == (path, arg)


def test_recipe_words():
  with pytest.raises(UsageError, match="no argument 'debgu'; did you mean 'debug'"):
    recipe.get_config("debgu")
  with pytest.raises(UsageError, match="'blind,text_only' asks for two controls at once"):
    recipe.get_config("blind,text_only")
  with pytest.raises(UsageError, match="'blind,blind' asks for two controls at once"):
    recipe.get_config("blind,blind")
  for control in recipe.CONTROLS:
    both = (f"conversation,{control}", f"{control},conversation")
    assert len({recipe.get_config(words).to_json() for words in both}) == 1
  for name in ("quickstart", "llava"):
    for word in ("", *recipe.WORDS):
      recipes.load(f"configs/{name}.py:{word}")


@pytest.mark.parametrize("word", ["blind", "debug,text_only"])
def test_the_quickstart_makes_its_controls_itself(word, trainer, capsys):
  assert cli.main(["quickstart", word]) == UsageError.code
  assert "itself, beside the model; leave the word out" in capsys.readouterr().err


@pytest.mark.parametrize("word, sources, evals", [
  ("", {"captions", "easy_vqa", "openmoji", "pydoc"},
   {"easy_vqa", "openmoji", "openmoji_captions", "text"}),
  ("blind", {"easy_vqa", "openmoji", "pydoc"}, {"easy_vqa", "openmoji", "text"}),
  ("text_only", {"pydoc"}, {"text"}),
  ("image_only", {"captions", "easy_vqa", "openmoji"},
   {"easy_vqa", "openmoji", "openmoji_captions"}),
])
def test_controls_see_what_they_say(word, sources, evals):
  config = recipe.get_config(word)
  both = [recipe.get_config(f"debug,{word}"), recipe.get_config(f"{word},debug")]
  assert both[0].to_json() == both[1].to_json()
  assert set(config.data.sources) == sources and set(config.evals) == evals
  shown = {entry.images for name, entry in config.data.sources.items() if name != "pydoc"}
  shown |= {entry.images for name, entry in config.evals.items() if name != "text"}
  assert shown <= ({"none"} if word == "blind" else {"real"})
