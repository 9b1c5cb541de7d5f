"""`data prepare`: all or nothing, whatever kills it, and never the same work twice."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vlm_jax.core.errors import DataError, DiskError, RetryError, UsageError
from vlm_jax.data import prepare, records
from vlm_jax.data.sources import easy_vqa, find_source, pydoc

ROOT = Path(__file__).parents[2]
QUIET = lambda line: None
SMALL = dict(sources=["pydoc"], vocab_size=300)


def hashes(root):
  manifest = records.check(str(root), verify=True)
  return {name: entry["sha256"] for name, entry in manifest["files"].items()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  root = tmp_path_factory.mktemp("reference") / "root"
  prepare.prepare(str(root), **SMALL, log=QUIET)
  return hashes(root)


def run(code):
  """Runs code in a fresh process that may be killed without harm to this one."""
  head = """
    import os, signal, sys
    from vlm_jax.data import prepare, records, tokenizer
    quiet = lambda line: None
    def child(function):
      pid = os.fork()
      if pid == 0:
        try:
          function()
        except BaseException as error:
          print(type(error).__name__, error, flush=True)
          os._exit(1)
        sys.stdout.flush()
        os._exit(0)
      return pid
    die = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
  """
  done = subprocess.run([sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(code)],
                        cwd=ROOT, capture_output=True, text=True, timeout=120,
                        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)})
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


POINTS = ["write", "train", "commit", "replace 0", "replace 1", "replace 2", "cleanup"]


def test_killed_at_any_point_leaves_nothing_half_made(tmp_path, reference):
  # Two folders a point: an empty one, and one that holds other data, which is replaced.
  prepare.prepare(str(tmp_path / "old"), sources=["pydoc"], vocab_size=280, log=QUIET)
  for point in POINTS:
    shutil.copytree(tmp_path / "old", tmp_path / f"old {point}")
  old = hashes(tmp_path / f"old {POINTS[0]}")
  run(f"""
    def killed(point, root):
      name, _, number = point.partition(" ")
      if name == "replace":
        real, left = os.replace, [int(number)]
        def replace(*args):
          if left[0] == 0: die()
          left[0] -= 1
          return real(*args)
        os.replace = replace
      elif name == "write": records.write = die
      elif name == "train": tokenizer.train = die
      elif name == "commit": prepare._commit = die
      else:  # after the last rename; the first call clears what an earlier prepare left
        calls, real = [], prepare.shutil.rmtree
        prepare.shutil.rmtree = lambda *a, **k: die() if calls else calls.append(a)
      prepare.prepare(root, {SMALL["sources"]}, {SMALL["vocab_size"]}, log=quiet)
    for point in {POINTS}:
      for kind in ("new", "old"):
        root = os.path.join({str(tmp_path)!r}, kind + " " + point)
        _, status = os.waitpid(child(lambda: killed(point, root)), 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (point, status)
  """)
  for point in POINTS:
    for kind in ("new", "old"):
      root = tmp_path / f"{kind} {point}"
      try:
        left = hashes(root)
      except DataError as error:
        assert "no prepared data" in str(error)
        assert kind == "new" or point.startswith("replace"), point
      else:
        assert left == (reference if point == "cleanup" else old), (kind, point)
      prepare.prepare(str(root), **SMALL, log=QUIET)
      assert hashes(root) == reference
      assert sorted(os.listdir(root)) == [
        ".prepare.lock", "manifest.json", "pydoc", "tokenizer.json"], (kind, point)


def test_two_at_once(tmp_path, reference):
  root = str(tmp_path / "root")
  out = run(f"""
    work = lambda: prepare.prepare({root!r}, {SMALL["sources"]}, {SMALL["vocab_size"]}, log=print)
    for pid in [child(work), child(work), child(work)]:
      assert os.waitpid(pid, 0)[1] == 0
  """)
  assert hashes(root) == reference
  assert out.count("is already prepared") == 2 and out.count("training 300 tokens") == 1


def test_says_when_another_is_at_work(tmp_path):
  with prepare._locked(str(tmp_path), False, QUIET), pytest.raises(RetryError, match="another"):
    prepare.prepare(str(tmp_path), **SMALL, wait=False, log=QUIET)


def test_is_idempotent_and_repairs(tmp_path, reference):
  root, lines = tmp_path / "root", []
  prepare.prepare(str(root), **SMALL, log=QUIET)
  (root / "cache").mkdir()
  before = (root / "manifest.json").stat().st_mtime_ns
  prepare.prepare(str(root), **SMALL, log=lines.append)
  assert len(lines) == 1 and "already prepared" in lines[0]
  assert (root / "manifest.json").stat().st_mtime_ns == before
  path = root / "pydoc" / "train.array_record"
  damaged = bytearray(path.read_bytes())
  damaged[len(damaged) // 2] ^= 1
  path.write_bytes(damaged)
  records.check(str(root))  # the size is right: only the sha256 can tell
  with pytest.raises(DataError, match="train.array_record is damaged"):
    records.check(str(root), verify=True)
  path.write_bytes(damaged[:-5])
  with pytest.raises(DataError, match=r"train.array_record has \d+ bytes"):
    records.open_split(str(root), "pydoc", "train")
  prepare.prepare(str(root), **SMALL, log=lines.append)
  assert hashes(root) == reference and (root / "cache").is_dir()
  assert any("preparing again" in line for line in lines)


def test_manifest_says_where_the_data_is_from(root):
  manifest = records.check(root, verify=True)
  assert manifest["sources"]["easy_vqa"]["records"] == {
    "train": 3600, "validation": 400, "test": 1000}
  assert manifest["sources"]["easy_vqa"]["licence"].startswith("MIT")
  assert manifest["sources"]["easy_vqa"]["version"] == "1.0"
  assert manifest["sources"]["pydoc"]["licence"].startswith("PSF-2.0")
  assert json.dumps(manifest) and len(manifest["files"]) == 10


def test_errors_name_the_way_out(tmp_path, root, monkeypatch):
  with pytest.raises(DataError, match="run `vlm-jax data prepare"):
    records.open_split(str(tmp_path), "pydoc", "train")
  with pytest.raises(UsageError, match="did you mean 'pydoc'"):
    records.open_split(root, "pydocs", "train")
  with pytest.raises(UsageError, match="did you mean 'validation'"):
    records.open_split(root, "pydoc", "valid")
  with pytest.raises(UsageError, match="did you mean 'pydoc'"):
    prepare.prepare(str(tmp_path), ["pydox"], log=QUIET)
  file = tmp_path / "file"
  file.write_text("")
  with pytest.raises(DiskError, match="file"):
    prepare.prepare(str(file), **SMALL, log=QUIET)
  monkeypatch.setattr(easy_vqa.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UsageError, match=r"vlm_jax\[quickstart\]"):
    easy_vqa.prepare()


def test_full_disk(tmp_path):
  out = run(f"""
    import resource
    def full():
      signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
      resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
      prepare.prepare({str(tmp_path / "root")!r}, {SMALL["sources"]}, 300, log=quiet)
    assert os.WEXITSTATUS(os.waitpid(child(full), 0)[1]) == 1
  """)
  assert out.startswith("DiskError") and "free space" in out
  with pytest.raises(DataError, match="no prepared data"):
    records.check(str(tmp_path / "root"))


def test_splits_do_not_overlap():
  splits = {name: list(items) for name, items in easy_vqa.prepare().items()}
  keys = {name: {record["key"] for record in items} for name, items in splits.items()}
  assert [len(keys[name]) for name in ("train", "validation", "test")] == [3600, 400, 1000]
  assert not keys["train"] & keys["validation"] and not keys["train"] & keys["test"]
  questions = sum(len(record["questions"]) for record in splits["test"])
  assert questions == 9673
  topics = {name: {record["key"].rsplit("/", 1)[0] for record in items}
            for name, items in pydoc.prepare().items()}
  assert all(topics.values()) and not topics["train"] & topics["test"]
  assert not topics["train"] & topics["validation"]


@pytest.mark.parametrize("name", ["easy_vqa", "pydoc"])
def test_every_form_writes_documents(root, name):
  source = find_source(name)
  record = records.open_split(root, name, "train")[0]
  assert all(isinstance(text, str) for text in source.texts(record))
  for form in source.FORMS:
    assert source.parts(record, form)
  if name == "easy_vqa":
    fan_out, talk, single, choice, caption = (source.parts(record, form) for form in source.FORMS)
    count = len(record["questions"])
    assert len(fan_out) == len(talk) == 1 and len(single) == count
    assert [part.branch for part in fan_out[0][1::2]] == list(range(1, count + 1))
    assert {part.branch for part in talk[0][1:]} == {0}
    assert len(talk[0]) == len(fan_out[0]) == 1 + 2 * count
    assert len(choice) == count
    assert all(sum(part.loss for part in one[2::2]) == 1 < len(one[2::2]) for one in choice)
    assert len(caption) == 1 and caption[0][1].text.startswith("a ") and caption[0][1].loss


@pytest.mark.parametrize(
  "pairs, caption",
  [
    ([["what color is the shape?", "teal"], ["what shape is present?", "circle"]], "a teal circle"),
    ([["what is the red shape?", "triangle"]], "a red triangle"),
    ([["is there not a red circle?", "no"]], "a red circle"),
    ([["is a red shape present?", "no"], ["what shape is present?", "circle"]], ""),
    ([["is no blue shape present?", "yes"], ["is there a circle?", "yes"]], ""),
    ([["what is the red shape?", "triangle"], ["what is the blue shape?", "triangle"]], ""),
  ],
)
def test_captions_say_only_what_the_answers_say(pairs, caption):
  parts = find_source("easy_vqa").parts({"image": b"", "questions": pairs}, "caption")
  assert [document[1].text for document in parts] == ([caption] if caption else [])
