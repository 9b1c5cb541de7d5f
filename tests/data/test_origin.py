"""The files behind a split: prepared ones by their manifest, a user's own by size and digest."""

import hashlib

from vlm_jax.configs import base
from vlm_jax.data import origin


def test_own_files_are_told_by_size_and_digest(tmp_path, monkeypatch):
  config = base.get_config()
  words = tmp_path / "words.json"
  words.write_bytes(b"a tokenizer")
  config.data.tokenizer = str(words)
  for split in ("train", "validation"):
    (tmp_path / f"asked_{split}.json").write_text(f"[{split!r}]")
    (tmp_path / f"said_{split}.json").write_text("[]")
  config.data.sources.mine = base.source(name="vqav2", path=f"{tmp_path}/asked_{{split}}.json",
                                         annotations=f"{tmp_path}/said_{{split}}.json")
  config.data.sources.theirs = base.source(name="tfds", path="coco_captions")
  sha = lambda data: hashlib.sha256(data).hexdigest()
  found = origin.files_of(config, "mine", "validation")
  assert found == {
    str(words): {"bytes": 11, "sha256": sha(b"a tokenizer")},
    f"{tmp_path}/asked_validation.json": {"bytes": 14, "sha256": sha(b"['validation']")},
    f"{tmp_path}/said_validation.json": {"bytes": 2, "sha256": sha(b"[]")}}
  # A file that changed is another one.
  (tmp_path / "said_validation.json").write_text("[ ]")
  assert origin.files_of(config, "mine", "validation") != found
  monkeypatch.setattr(origin, "WHOLE", 3)
  words.write_bytes(b"another tokenizer")
  assert origin.files_of(config, "mine", "validation")[str(words)] == {"bytes": 17}
  assert origin.files_of(config, "theirs", "train[:5%]")["coco_captions"] == {"split": "train[:5%]"}
