"""A file or directory is the old or the new one, and nothing else is left behind."""

import os
from pathlib import Path

import pytest

from vlm_jax.core.errors import DataError, DiskError, UsageError
from vlm_jax.core.writing import copy, new_directory, write_atomically


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "made" / "x"
  write_atomically(path, "old \u00e9")
  assert path.read_bytes() == b"old \xc3\xa9"
  monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "full")))
  with pytest.raises(DiskError, match=r"made/x cannot be written \(full\)"):
    write_atomically(path, "new")
  assert os.listdir(path.parent) == ["x"] and path.read_text(encoding="utf-8") == "old \u00e9"


def test_a_place_that_cannot_be(tmp_path):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(DiskError, match="file is no directory"):
    write_atomically(tmp_path / "file" / "x", "")
  (tmp_path / "folder").mkdir()
  with pytest.raises(DiskError, match="Is a directory"):
    write_atomically(tmp_path / "folder", "")
  assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
  with new_directory(tmp_path / "made" / "x") as directory:
    (directory / "a").write_text("1")
    assert not (tmp_path / "made" / "x").exists()
  assert os.listdir(tmp_path / "made") == ["x"] and os.listdir(tmp_path / "made" / "x") == ["a"]
  for error, kind in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "full"), DiskError)):
    with pytest.raises(kind), new_directory(tmp_path / "y") as directory:
      (directory / "a").write_text("1")
      raise error
  with pytest.raises(UsageError, match="holds something already"), (
      new_directory(tmp_path / "made")):
    pass
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(DiskError, match="cannot be written"), new_directory(tmp_path / "file" / "z"):
    pass
  assert sorted(os.listdir(tmp_path)) == ["file", "made"]


def test_a_copy_says_which_side_is_wrong(tmp_path, monkeypatch):
  (tmp_path / "a").write_bytes(b"1")
  (tmp_path / "b").mkdir()
  copy(tmp_path / "a", tmp_path / "b")
  assert (tmp_path / "b" / "a").read_bytes() == b"1"
  with pytest.raises(DataError, match="b cannot be read"):
    copy(tmp_path / "b", tmp_path)
  with pytest.raises(DiskError, match="c/a cannot be written"):
    copy(tmp_path / "a", tmp_path / "c")
  write = Path.write_bytes

  def full(path, content):
    write(path, b"")
    raise OSError(28, "full")

  (tmp_path / "d").mkdir()
  monkeypatch.setattr(Path, "write_bytes", full)
  with pytest.raises(DiskError, match=r"d/a cannot be written \(full\)"):
    copy(tmp_path / "a", tmp_path / "d")
  assert os.listdir(tmp_path / "d") == []
